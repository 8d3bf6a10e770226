"""The module: one op a tensor, the same bits in training and in the served graph, and back to physical units."""

from typing import Any

import numpy as np
import pytest
import torch

from gpuops.errors import InputError
from gpuops.preprocess.module import PreprocessModule
from gpuops.preprocess.steps import Clip, Fill, Normalize, Part, Preprocess, Unpack

X = (
    Part("rain", 2, "int16", (Unpack(0.1, 5.0, -999), Fill(0.0), Clip(0.0, 40.0), Normalize((8.0, 9.0), (2.0, 3.0)))),
    Part("height", 1, "int16", (Unpack(28.0, -450.0), Normalize((100.0,), (500.0,)))),
)
WHOLE = Preprocess({"x": X, "month": (Part("month", 1, "int32"),)})
TARGET = Preprocess({"y": (Part("next", 2, "float32", (Normalize((8.0, -3.0), (2.0, 7.0)),)),)})


def raw(samples: int = 5) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    rain = generator.integers(-300, 600, (samples, 2, 6, 7)).astype(np.int16)
    rain[generator.random(rain.shape) < 0.2] = -999
    height = generator.integers(0, 200, (samples, 1, 6, 7)).astype(np.int16)
    month = np.arange(samples, dtype=np.int32)[:, None]
    return {name: torch.from_numpy(v) for name, v in (("rain", rain), ("height", height), ("month", month))}


def slot(wire: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"x": torch.cat([wire["rain"], wire["height"]], dim=1), "month": wire["month"]}


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def test_values_against_float64() -> None:
    wire = raw()
    ready = PreprocessModule(WHOLE)(wire)["x"].double().numpy()
    rain, height = wire["rain"].double().numpy(), wire["height"].double().numpy()
    physical = np.clip(np.where(rain == -999, 0, rain * 0.1 + 5), 0, 40)
    mean, std = (np.array(v).reshape(1, 2, 1, 1) for v in ((8, 9), (2, 3)))
    want = np.concatenate([(physical - mean) / std, (height * 28 - 450 - 100) / 500], axis=1)
    np.testing.assert_allclose(ready, want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_and_serving_give_the_same_bits(dtype: torch.dtype) -> None:
    module, wire = PreprocessModule(WHOLE, dtype), raw()
    packed, served = module.packed(slot(wire)), module(wire)
    assert packed["x"].dtype == dtype
    assert torch.equal(bits(packed["x"]), bits(served["x"]))
    assert set(packed) == set(served) == {"x", "month"}


def test_raw_tensors_pass_through_untouched() -> None:
    wire = raw()
    for ready in (PreprocessModule(WHOLE).packed(slot(wire)), PreprocessModule(WHOLE)(wire)):
        assert ready["month"] is wire["month"]
        assert ready["month"].dtype == torch.int32


def test_nan_stays_missing_in_float_targets() -> None:
    values = torch.tensor([[[1.0, float("nan")], [3.0, 4.0]]])
    ready = PreprocessModule(TARGET).packed({"y": values})["y"]
    assert ready.isnan().tolist() == [[[False, True], [False, False]]]
    filled = Preprocess({"y": (Part("next", 2, "float32", (Fill(2.0),)),)})
    assert PreprocessModule(filled).packed({"y": values})["y"][0, 0].tolist() == [1.0, 2.0]


def test_physical_is_the_inverse() -> None:
    module = PreprocessModule(TARGET)
    values = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)) * 20
    torch.testing.assert_close(module.physical("y", module.packed({"y": values})["y"]), values, atol=1e-5, rtol=1e-5)
    assert module.physical("y", values.bfloat16()).dtype == torch.float32
    assert module.physical("y", torch.zeros(1, 2)).tolist() == [[8.0, -3.0]]


def test_coefficients_are_no_weights() -> None:
    module = PreprocessModule(WHOLE)
    assert module.state_dict() == {}, "the JSON holds them: a checkpoint must not bring others"
    assert list(module.parameters()) == []
    assert {buffer.device.type for buffer in module.to("meta").buffers()} == {"meta"}


def test_a_tensor_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        PreprocessModule(TARGET).packed({"y": torch.zeros(1, 2, 3, dtype=torch.float64)})
    with pytest.raises(
        InputError, match="declared as int16: pass stored values"
    ):  # float32 has kernels, and other missing
        PreprocessModule(WHOLE).packed(slot(raw()) | {"x": torch.zeros(5, 3, 6, 7)})
    with pytest.raises(InputError, match="tensor 'month' is missing: got x"):
        PreprocessModule(WHOLE).packed({"x": slot(raw())["x"]})


def test_torch_export_keeps_one_op_a_tensor() -> None:
    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prepare = PreprocessModule(WHOLE)

        def forward(self, rain: Any, height: Any, month: Any) -> Any:
            ready = self.prepare({"rain": rain, "height": height, "month": month})
            return ready["x"] * 2, ready["month"]

    wire = raw()
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(Served(), tuple(wire.values()), dynamic_shapes={name: {0: batch} for name in wire})
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("gpuops.transform.default") == 1
    other = raw(9)
    x, month = program.module()(*other.values())
    assert torch.equal(x, PreprocessModule(WHOLE)(other)["x"] * 2)
    assert torch.equal(month, other["month"])
