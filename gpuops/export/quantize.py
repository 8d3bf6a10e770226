"""A network's convolutions and matrix products in 8 bits, with onnxruntime's static quantisation (QDQ).

Weights are int8, one scale a channel; activations are uint8, with ranges from samples that go through the graph itself,
and so through the real preprocessing. The preprocessing, the layers that give the answers, what is no convolution or
product with constant weights, and the way back to physical units stay float32.
"""

from __future__ import annotations

import ast
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gpuops.errors import InputError
from gpuops.spec import Arrays

OPERATORS = ("Conv", "Gemm", "MatMul")
"""What onnxruntime has 8-bit kernels for."""
_NETWORK = "model"
"""Attribute of the served graph that holds the network (gpuops.export.graph)."""


def quantize(source: Path, destination: Path, calibration: Iterable[Arrays]) -> list[str]:
    """Quantise the network of an exported graph.

    Args:
        source: the served graph as ONNX in float32, as `gpuops.export.formats.write` leaves it.
        destination: where the quantised graph goes.
        calibration: batches of stored samples by input name.

    Returns:
        Names of the quantised nodes.

    Raises:
        InputError: there is none to quantise.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    layers = layers_of(onnx.load(source))
    if not layers:
        raise InputError(
            "int8: the network has no convolution or product with constant weights before the layers that give its "
            "answers, which stay float32: leave int8 out of the formats"
        )
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what onnxruntime deprecates of onnx
        shaped = Path(scratch) / "shaped.onnx"
        # The exporter folded the constants and fused what can be; an optimiser would forget whose nodes are whose.
        quant_pre_process(str(source), str(shaped), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(shaped),
            str(destination),
            _Calibration(iter(calibration)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_quantize=layers,
            per_channel=True,
            # 7-bit weights: on x86 without VNNI sums of two 8-bit products overflow 16 bits, and answer otherwise.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    model = onnx.load(destination)
    _give_back_float32(model.graph, set(layers))
    onnx.save(model, destination)
    return layers


def layers_of(model: Any) -> list[str]:
    """Names of the nodes to quantise: the network's products with constant weights that another such one follows.

    What no other follows gives the answers: 8 bits would leave them 256 values.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    found, answers = [], {output.name for output in model.graph.output}
    for node in reversed(model.graph.node):
        layer = node.op_type in OPERATORS and node.input[1] in constant and _in_network(node)
        if not answers.isdisjoint(node.output):
            if not layer:
                answers.update(node.input)
        elif layer:
            found.append(str(node.name))
    return found[::-1]


def _in_network(node: Any) -> bool:
    """Whether a node came from the network and not from the preprocessing; torch notes the modules that it was in."""
    noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return bool(ast.literal_eval(noted)[1:2] == [_NETWORK])


def _give_back_float32(graph: Any, layers: set[str]) -> None:
    """Let whoever is no layer read what was there before it was quantised for a layer.

    onnxruntime gives the 8-bit tensor to every reader, also to the sum that a residual path ends in. What a layer
    itself answers is in 8 bits for all, as its kernel computes it so.
    """
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    computed = {output for node in graph.node if node.name in layers for output in node.output}
    before = {
        node.output[0]: quantized[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and quantized.get(node.input[0]) not in (None, *computed)
    }
    for node in graph.node:
        if node.name not in layers:
            for place, name in enumerate(node.input):
                node.input[place] = before.get(name, name)


class _Calibration:
    """Batches as onnxruntime's calibrator asks for them."""

    def __init__(self, batches: Iterator[Arrays]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next batch; None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)
