"""transform_stats and histogram, run element by element in Triton's interpreter; see interpret_transform.py."""

import numpy as np
import pytest
import torch
import triton
from guard import poisoned_output
from oracle import Case, integers, is_missing_in, make_case, roundings

from gpuops_kernels import histogram as counting
from gpuops_kernels import transform, transform_stats

pytestmark = pytest.mark.xfail(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason="the interpreter of Triton 3.6 cannot loop over a range of arguments with NumPy 2.4",
    strict=True,
)


def interpret(case: Case, dtype: torch.dtype, edges: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    channels = case.x.shape[1]
    statistics = torch.full((channels, 7), -1.0, dtype=torch.float64)
    with poisoned_output(case.x.shape, dtype) as y, np.errstate(all="ignore"):
        kernel, grid, arguments = transform_stats.plan(case.x, y, *case.args[1:], edges, case.functions)
        kernel[grid](*arguments[:-1], True)
        found, counts = arguments[5:7]
        parts = found.shape[1]
        transform_stats.merge_kernel[(channels,)](found, statistics, parts, 1 << (parts - 1).bit_length())
    return y, statistics, counts


@pytest.mark.parametrize("edges", [None, (295.5, 307.25)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (7, 2, 31), (2, 3, 32, 64), (3, 2, 41, 101), (2, 1, 4099)], ids=str)
def test_statistics_are_those_of_the_result(shape, dtype, edges) -> None:
    case = tame(make_case(shape, dtype, seed=sum(shape)))
    limits = None if edges is None else torch.tensor(edges)[:, None].repeat(1, shape[1])
    y, statistics, counts = interpret(case, torch.float32, limits)
    assert roundings(y, case, exact_fma=False) <= 1
    assert_statistics(statistics, y, is_missing_in(case))
    if edges is not None:
        assert torch.equal(counts, counts_of(y, is_missing_in(case), *edges))
    narrow, again, _ = interpret(case, torch.bfloat16, limits)
    assert torch.equal(again.nan_to_num(-7), statistics.nan_to_num(-7))
    assert narrow.dtype == torch.bfloat16


def counts_of(y: torch.Tensor, missing: np.ndarray, low: float, high: float) -> torch.Tensor:
    rows = []
    for channel in range(y.shape[1]):
        values = y[:, channel].numpy()[~missing[:, channel]]
        values = values[~np.isnan(values)]
        inside = values[(values >= low) & (values <= high)]
        place = np.minimum(((inside - np.float32(low)) * (np.float32(256) / np.float32(high - low))).astype(int), 255)
        rows.append([(values < low).sum(), *np.bincount(place, minlength=256), (values > high).sum()])
    return torch.tensor(np.array(rows))


def tame(case: Case) -> Case:
    """Finite numbers around 300 +- 10: what statistics are for. NaN and missing values stay."""
    x = case.x
    if x.dtype == torch.float32:
        rng = np.random.default_rng(3)
        x = torch.where(x.isfinite() & (x.abs() < 1e6) | x.isinf(), torch.from_numpy(rng.normal(size=x.shape)), x)
        x = torch.where(x.abs() > 1e6, 1.5, x).float()
    table = case.coefficients.clone()
    span = 10 / max(1.0, float(x.nan_to_num(0).abs().max()))
    table[0], table[1], table[2], table[3] = span, 300.0, -torch.inf, torch.inf
    return Case(x, table, case.missing)


def assert_statistics(statistics: torch.Tensor, y: torch.Tensor, missing: np.ndarray) -> None:
    for channel, row in enumerate(statistics.tolist()):
        values, gone = y[:, channel].double().numpy().ravel(), missing[:, channel].ravel()
        kept = values[~gone & ~np.isnan(values)]
        count, mean, m2, low, high, nan, absent = row
        assert (count, nan, absent) == (len(kept), int((np.isnan(values) & ~gone).sum()), int(gone.sum()))
        if not len(kept):
            assert np.isnan([mean, low, high]).all()
            assert m2 == 0
            continue
        assert (low, high) == (kept.min(), kept.max())
        spread = kept.std() + 1e-30
        assert abs(mean - kept.mean()) <= 1e-5 * spread + 2.0**-23 * abs(kept.mean())
        assert abs(m2 - len(kept) * kept.var()) <= 1e-4 * len(kept) * spread**2 + 1e-9


def test_a_channel_whose_first_tile_is_missing() -> None:
    x = torch.cat([torch.full((2, 4096), -1), torch.arange(8192).view(2, 4096)], 1).to(torch.int16).view(1, 2, 8192)
    plain = torch.tensor([1.0, 0.0, -torch.inf, torch.inf, 0.0, torch.nan])[:, None].repeat(1, 2)
    case = Case(x, plain, torch.tensor([[-1, -1], [1, 1]], dtype=torch.int32))
    y, statistics, _ = interpret(case, torch.float32, None)
    assert_statistics(statistics, y, is_missing_in(case))


@pytest.mark.parametrize("dtype", counting.INPUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (40, 2, 7), (2, 3, 32, 64), (1, 2, 41, 101)], ids=str)
def test_histogram_counts_every_number_once(shape, dtype) -> None:
    case = make_case(shape, dtype, seed=sum(shape))
    scale = torch.stack([torch.full((shape[1],), 0.37), torch.full((shape[1],), 40.5), case.coefficients[-1]])
    counts = torch.zeros((shape[1], counting.CELLS), dtype=torch.int64)
    kernel, grid, arguments = counting.plan(case.x, scale, case.missing, counts)
    with np.errstate(all="ignore"):
        kernel[grid](*arguments)
    assert torch.equal(counts, counting.reference(case.x, scale, case.missing))
    assert counts.sum() == case.x.numel()


def test_the_upper_edge_is_in_the_last_bin() -> None:
    x = torch.tensor([[[-1, 0, 255, 256, 257]]], dtype=torch.int16)
    scale, missing = torch.tensor([[1.0], [0.0], [torch.nan]]), torch.zeros((2, 1), dtype=torch.int32)
    counts = torch.zeros((1, counting.CELLS), dtype=torch.int64)
    kernel, grid, arguments = counting.plan(x, scale, missing, counts)
    kernel[grid](*arguments)
    assert counts[0].nonzero()[:, 0].tolist() == [0, 1, 256, 257]
    assert counts[0, [0, 1, 256, 257]].tolist() == [1, 1, 2, 1]
    assert torch.equal(counts, counting.reference(x, scale, missing))


def test_the_result_is_that_of_transform() -> None:
    case = make_case((3, 5, 700), torch.int16, seed=9, functions="asinh")
    y, _, _ = interpret(case, torch.bfloat16, None)
    with poisoned_output(case.x.shape, torch.bfloat16) as other, np.errstate(all="ignore"):
        kernel, grid, arguments = transform.plan(case.x, other, *case.args[1:], case.functions)
        kernel[grid](*arguments[:-1], True)
    assert torch.equal(integers(y), integers(other))
