"""Windows, statistics and histograms on a real GPU; what a machine without one can prove is in the other files."""

import numpy as np
import pytest
import torch
from oracle import expected, integers, is_missing_in, make_case, worst
from windows import Windows, cut, make_windows

from gpuops_kernels import histogram, rrc, transform, transform_stats, window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device: benchmarks/gpu.sh runs this on one"
    ),
]


def run(case: Windows, out: torch.dtype, *, separate: bool = False) -> torch.Tensor:
    x, tables = case.slab.x.cuda(), (case.slab.coefficients.cuda(), case.slab.missing.cuda())
    rest = case.table, *tables, out, case.size, case.rule, case.slab.functions
    if separate:
        y = window.launch_chunks([chunk.clone() for chunk in x], *rest)
        again = torch.ops.gpuops.window_chunks([chunk.clone() for chunk in x], *rest)
    else:
        y, again = window.launch(x, *rest), torch.ops.gpuops.window(x, *rest)
    assert torch.equal(integers(y), integers(again))
    return y


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("rule", window.RULES)
@pytest.mark.parametrize("dtype", window.INPUT_DTYPES, ids=str)
def test_windows_are_slices(dtype: torch.dtype, rule: str, separate: bool) -> None:
    for chunk, size, turned in (
        ((20, 30), (9, 13), True),
        ((70, 64), (32, 32), True),
        ((40, 64), (16, 48), False),
        ((5, 12, 17), (3, 8, 8), True),
        ((300, 520), (224, 224), True),
    ):
        case = make_windows(chunk, size, rule=rule, turned=turned, dtype=dtype, seed=sum(chunk), functions="asinh")
        shown, outside = cut(case)
        want, allowed, anything = expected(shown, exact_fma=True)
        if rule == "pad":
            fill = case.slab.coefficients[-2].numpy().reshape(-1, *(1,) * len(size)).astype(np.float64)
            want, allowed = np.where(outside, fill, want), np.where(outside, 0.0, allowed)
        for out in window.OUTPUT_DTYPES:
            y = run(case, out, separate=separate)
            assert worst(y.cpu(), want, allowed, anything) <= 1
        if rule == "wrap":  # the same kernels read the same numbers: bit for bit what transform gives
            plain = transform.launch(
                shown.x.cuda(), case.slab.coefficients.cuda(), case.slab.missing.cuda(), torch.bfloat16, "asinh"
            )
            assert torch.equal(integers(run(case, torch.bfloat16, separate=separate)), integers(plain))


def test_aligned_windows_and_chunks_that_are_freed_at_once() -> None:
    case = make_windows((64, 128), (32, 64), chunks=4, windows=16, turned=False, seed=2)
    case.table[:, 2] = case.table[:, 2] // 8 * 8
    want = run(case, torch.float32)
    for _ in range(20):
        chunks = [chunk.cuda() for chunk in case.slab.x]
        tables = case.slab.coefficients.cuda(), case.slab.missing.cuda()
        y = window.launch_chunks(chunks, case.table, *tables, torch.float32, case.size)
        del chunks
        torch.full((4, 2, 64, 128), -1, dtype=torch.int16, device="cuda")  # takes the memory that was given back
        assert torch.equal(integers(y), integers(want))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (7, 2, 31), (3, 5, 41, 101), (4, 3, 256, 256), (2, 200, 7)], ids=str)
def test_statistics_and_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(shape, dtype, seed=sum(shape))
    table = case.coefficients.clone()
    table[0], table[1] = (1e-3 if dtype != torch.float32 else 1e-38), 300.0
    table[2], table[3] = -torch.inf, torch.inf
    edges = torch.tensor([[290.0], [310.0]]).repeat(1, shape[1])
    on_gpu = [t.cuda() for t in (case.x, table, case.missing)]
    y, statistics, counts = transform_stats.launch(*on_gpu, torch.float32, edges.cuda())
    assert torch.equal(integers(y), integers(transform.launch(*on_gpu, torch.float32)))
    missing = is_missing_in(case)
    for channel, row in enumerate(statistics.tolist()):
        values, gone = y[:, channel].double().cpu().numpy().ravel(), missing[:, channel].ravel()
        kept = values[~gone & ~np.isnan(values)]
        assert row[0] == len(kept)
        assert row[5:] == [(np.isnan(values) & ~gone).sum(), gone.sum()]
        assert counts[channel].sum() == len(kept)
        finite = kept[np.isfinite(kept)]
        if len(finite) == len(kept) and len(kept):
            assert row[3:5] == [kept.min(), kept.max()]
            assert abs(row[1] - kept.mean()) <= 1e-5 * kept.std() + 2.0**-22 * abs(kept.mean())
            assert abs(row[2] - len(kept) * kept.var()) <= 1e-4 * len(kept) * kept.var() + 1e-6
    again = torch.ops.gpuops.transform_stats(*on_gpu, torch.float32, edges.cuda())
    assert torch.equal(again[1].nan_to_num(7), statistics.nan_to_num(7))
    assert torch.equal(again[2], counts)


@pytest.mark.parametrize("dtype", histogram.INPUT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (40, 2, 7), (4, 3, 256, 256), (1, 2, 41, 101)], ids=str)
def test_histograms_and_quantiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(shape, dtype, seed=sum(shape))
    # Powers of two, so that fma and two roundings agree.
    scale = torch.tensor([[0.25], [32.0], [torch.nan]]).repeat(1, shape[1])
    counts = histogram.launch(case.x.cuda(), scale.cuda(), case.missing.cuda())
    assert torch.equal(counts.cpu(), histogram.reference(case.x, scale, case.missing))
    assert torch.equal(counts, torch.ops.gpuops.histogram(case.x.cuda(), scale.cuda(), case.missing.cuda()))
    if dtype in (torch.uint8, torch.int16) and len(shape) > 2:
        got = histogram.quantile(case.x.cuda(), [0.1, 0.5], case.missing.cuda())
        assert torch.equal(got.cpu(), histogram.quantile(case.x, [0.1, 0.5], case.missing))


@pytest.mark.parametrize("out", rrc.OUTPUT_DTYPES, ids=str)
def test_random_resized_crops(out: torch.dtype) -> None:
    x = torch.randint(0, 256, (9, 70, 81, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    extent = rng.uniform(0.1, 1, (9, 2)) * (70, 81)
    first = rng.uniform(0, 1, (9, 2)) * ((70, 81) - extent)
    boxes = torch.from_numpy(np.concatenate([first, extent, rng.integers(0, 2, (9, 1))], 1).astype(np.float32))
    scale, offset = torch.linspace(0.5, 2, 3), torch.linspace(-1, 1, 3)
    y = rrc.launch(x.cuda(), boxes, scale.cuda(), offset.cuda(), out, 33, 130)
    want = rrc.reference(x, boxes, scale, offset, torch.float32, 33, 130)
    torch.testing.assert_close(y.cpu().float(), want, rtol=2.0**-8 if out != torch.float32 else 0, atol=0.02)
    assert torch.equal(y, torch.ops.gpuops.rrc(x.cuda(), boxes, scale.cuda(), offset.cuda(), out, 33, 130))


def test_nothing_waits_for_the_gpu() -> None:
    case = make_windows((64, 128), (32, 64), chunks=4, windows=16, seed=2)
    on_gpu = [t.cuda() for t in case.slab.args]
    calls = [
        lambda: window.launch(on_gpu[0], case.table.pin_memory(), *on_gpu[1:], torch.bfloat16, case.size),
        lambda: transform_stats.launch(*on_gpu, torch.bfloat16),
    ]
    for call in calls:
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
