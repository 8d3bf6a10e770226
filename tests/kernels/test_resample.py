"""Resampling by tables: torch's own antialiased weights, exact areas, missing values, and the way out of PyTorch."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops_kernels.resample import METHODS, conservative, resample, weights

SIZES = st.integers(1, 40)
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(height=SIZES, width=SIZES, out=st.tuples(SIZES, SIZES), mode=st.sampled_from(["bilinear", "bicubic"]))
def test_antialiased_is_torch_s(height: int, width: int, out: tuple[int, int], mode: str) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.interpolate(x, out, mode=mode, antialias=True)
    got = resample(x, weights(height, out[0], mode), weights(width, out[1], mode))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(inputs=SIZES, outputs=SIZES, method=st.sampled_from(METHODS))
def test_a_constant_stays_and_area_keeps_the_mean(inputs: int, outputs: int, method: str) -> None:
    table = weights(inputs, outputs, method)
    torch.testing.assert_close(table.sum(1), torch.ones(outputs).double(), rtol=0, atol=1e-12)
    if method == "area":
        x = torch.randn(inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close((table @ x).mean(), x.mean(), rtol=0, atol=1e-12)
        if inputs % outputs == 0:
            torch.testing.assert_close(table @ x, x.view(outputs, -1).mean(1), rtol=0, atol=1e-12)


def test_latitude_bands_keep_the_integral_over_the_sphere() -> None:
    fine, coarse = (torch.sin(torch.deg2rad(torch.linspace(-90, 90, n + 1, dtype=torch.float64))) for n in (181, 46))
    x = torch.randn(181, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = conservative(fine, coarse) @ x
    torch.testing.assert_close((got * coarse.diff()).sum(), (x * fine.diff()).sum(), rtol=0, atol=1e-12)


def test_missing_values_give_their_weight_to_the_others() -> None:
    rows, cols = weights(4, 2, "area"), weights(4, 2, "area")
    x = torch.tensor(
        [[1.0, torch.nan, 2, 2], [3, torch.nan, 2, 2], [torch.nan] * 2 + [5, 7], [torch.nan] * 2 + [9, 11]]
    )
    got = resample(x, rows, cols, missing=True)
    assert got[0].tolist() == [2.0, 2.0]
    assert got[1, 0].isnan()
    assert got[1, 1] == 8.0
    assert resample(x, rows, cols)[0, 0].isnan(), "NaN spreads unless it is declared to be missing data"
    half = resample(x.bfloat16(), rows, cols, missing=True)
    assert half.dtype == torch.bfloat16


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'nearest': pass one of bilinear, bicubic, area"):
        weights(4, 2, "nearest")
    with pytest.raises(ValueError, match="both axes have at least one"):
        weights(0, 2)
    with pytest.raises(ValueError, match="resample what `transform` gives"):
        resample(torch.zeros(4, 4, dtype=torch.int16), weights(4, 2), weights(4, 2))
    with pytest.raises(ValueError, match=r"tables are for \[4, 4\], x has \[5, 4\]"):
        resample(torch.zeros(5, 4), weights(4, 2), weights(4, 2))
    with pytest.raises(ValueError, match="ascending"):
        conservative(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="are not covered by"):
        conservative(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))


def test_it_is_exported_as_it_is(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return resample(x, weights(24, 10).float(), weights(30, 12).float())

    x = torch.randn(3, 2, 24, 30)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=32)},))
    torch.onnx.export(program, (), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for samples in (1, 5):
        y = torch.randn(samples, 2, 24, 30)
        (got,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        np.testing.assert_allclose(got, Model()(y).numpy(), rtol=0, atol=1e-6)
