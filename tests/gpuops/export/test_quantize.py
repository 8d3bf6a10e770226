"""What is 8 bits in a quantised graph, what is not, and that real samples set the ranges."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small import samples
from torch import nn

from gpuops.bundle import read_bundle
from gpuops.errors import InputError
from gpuops.export.formats import write
from gpuops.export.int8 import _session
from gpuops.export.quantize import layers_of, quantize
from gpuops.spec import Arrays


@pytest.fixture(scope="module")
def int8(small: Path) -> onnx.ModelProto:
    return onnx.load(small / "model_int8.onnx")


def sources(model: onnx.ModelProto, name: str) -> Iterator[onnx.NodeProto]:
    """Every node that a tensor is computed from."""
    made = {output: node for node in model.graph.node for output in node.output}
    waiting, seen = [name], set()
    while waiting:
        node = made.get(waiting.pop())
        if node is not None and node.name not in seen:
            seen.add(node.name)
            yield node
            waiting += node.input


def scopes(node: onnx.NodeProto) -> list[str]:
    """Modules that a node came from, outermost first; nothing for what quantising added."""
    noted = {entry.key: entry.value for entry in node.metadata_props}
    return list(ast.literal_eval(noted.get("pkg.torch.onnx.name_scopes", "[]")))


def named(model: onnx.ModelProto, kind: str, scope: str) -> onnx.NodeProto:
    """The one node of a kind that came from a module."""
    (found,) = (node for node in model.graph.node if node.op_type == kind and scope in scopes(node))
    return found


def test_the_networks_inner_layers_are_quantised(small: Path) -> None:
    model = onnx.load(small / "model.onnx")
    enter, mix = named(model, "Conv", "model.enter"), named(model, "MatMul", "model.mix")
    assert layers_of(model) == [enter.name, mix.name]
    assert "MatMul" in {node.op_type for node in model.graph.node if "inputs" in scopes(node)}  # the resize


def product(name: str, a: str, b: str, scope: str) -> onnx.NodeProto:
    node = onnx.helper.make_node("MatMul", [a, b], [f"{name}_out"], name)
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", scope, name]))
    return node


def test_layers_are_the_networks_products_with_weights_before_the_last() -> None:
    nodes = [
        product("resize", "x", "w", "inputs"),
        product("first", "resize_out", "w", "model"),
        product("attend", "first_out", "first_out", "model"),
        product("second", "attend_out", "w", "model"),
        onnx.helper.make_node("Relu", ["second_out"], ["relu_out"], "relu"),
        product("last", "relu_out", "w", "model"),
        onnx.helper.make_node("Add", ["last_out", "b"], ["y"], "physical"),
    ]
    weights = [onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), name) for name in ("w", "b")]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in "xy")
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], weights))
    assert layers_of(model) == ["first", "second"]


def test_weights_are_seven_bits_with_a_scale_for_each_channel(int8: onnx.ModelProto) -> None:
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    weights = stored["model.enter.weight_quantized"]
    assert weights.dtype == np.int8
    assert np.abs(weights).max() <= 64  # pairs of 8-bit products overflow 16 bits on processors without VNNI
    assert stored["model.enter.weight_scale"].shape == (16,)
    assert stored["model.leave.weight"].dtype == np.float32
    mix = named(int8, "MatMul", "model.mix")
    (scale,) = (stored[node.input[1]] for node in int8.graph.node if node.output[0] == mix.input[1])
    assert scale.shape == (16,)


def test_what_comes_before_the_network_stays_float32(int8: onnx.ModelProto) -> None:
    enter = named(int8, "Conv", "model.enter")
    (dequantized,) = (node for node in int8.graph.node if node.output[0] == enter.input[0])
    (quantized,) = (node for node in int8.graph.node if node.output[0] == dequantized.input[0])
    before = list(sources(int8, quantized.input[0]))
    assert {"MatMul", "Clip"} & {node.op_type for node in before}
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in before}


def test_a_residual_path_reads_what_it_read_before(int8: onnx.ModelProto) -> None:
    """onnxruntime gives all readers of a quantised tensor the 8-bit one; x goes to a convolution and to the answer."""
    leave = named(int8, "Conv", "model.leave")
    (joined,) = (node for node in int8.graph.node if node.output[0] == leave.input[0])
    made = {output: node.op_type for node in int8.graph.node for output in node.output}
    assert joined.op_type == "Concat"
    assert [made[name] for name in joined.input] == ["Reshape", "Where"]  # the hidden channels, and x as resized
    (first,) = (node for node in sources(int8, "y") if node.op_type == "Slice")
    assert made[first.input[0]] == "Where"


def test_the_layer_that_answers_is_float32(int8: onnx.ModelProto) -> None:
    leave = named(int8, "Conv", "model.leave")
    after = [node.op_type for node in int8.graph.node if leave.output[0] in node.input]
    assert after == ["Add"]


def test_ranges_come_from_the_samples(small: Path, tmp_path: Path) -> None:
    """Dark samples give ranges that real ones exceed."""
    bundle = read_bundle(small)
    golden = bundle.golden()
    noise = {}
    for name, batches in {
        "real": [samples(5, seed) for seed in range(1, 9)],
        "dark": [{"rain": np.full_like(b["rain"], -50), "height": b["height"] // 50} for b in [samples(5, 1)]],
    }.items():
        quantize(small / "model.onnx", tmp_path / f"{name}.onnx", batches)
        answer = _session(tmp_path / f"{name}.onnx", ["y"])(golden.inputs)["y"]
        noise[name] = float(np.sqrt(np.mean((answer - golden.outputs["y"]) ** 2)))
    assert noise["dark"] > 5 * noise["real"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 8, 1)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.leave = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.enter(x)).transpose(1, 2)
        return self.leave(hidden + self.attend(hidden, hidden, hidden)[0])


class Served(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *raw: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(raw[0].float()),)


@pytest.mark.slow
def test_products_of_two_activations_stay_float32(tmp_path: Path) -> None:
    x: Arrays = {"x": np.random.default_rng(0).normal(size=(4, 3, 6)).astype(np.float32)}
    served = Served(Attention()).eval()
    write(served, x, ["y"], 4, tmp_path, ["onnx"])
    model = onnx.load(tmp_path / "model.onnx")
    layers = quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", [x])
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert sorted(kinds[name] for name in layers) == ["Conv", "Gemm", "MatMul"]  # enter; in_proj, out_proj
    answer = _session(tmp_path / "int8.onnx", ["y"])(x)["y"]
    with torch.no_grad():
        want = served(torch.from_numpy(x["x"]))[0].numpy()
    assert 0 < np.abs(answer - want).max() < 0.1 * want.std()


def test_a_graph_without_layers_of_a_network_is_refused(small: Path, tmp_path: Path) -> None:
    """Here none says that it came from the network; the resize's products are none of its layers."""
    model = onnx.load(small / "model.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="leave int8 out of the formats"):
        quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", [samples(5)])


def test_the_same_samples_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    for _ in range(2):
        quantize(small / "model.onnx", tmp_path / "model_int8.onnx", [samples(5, seed) for seed in range(1, 9)])
        assert (tmp_path / "model_int8.onnx").read_bytes() == (small / "model_int8.onnx").read_bytes()
