"""gpuops::transform_stats and gpuops::histogram on the CPU, against NumPy and against each other."""

from unittest import mock

import cubin
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import integers, is_missing_in, make_case
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode

from gpuops.drift import Sketch
from gpuops_kernels import histogram as counting
from gpuops_kernels import transform
from gpuops_kernels import transform_stats as room

op, histogram = torch.ops.gpuops.transform_stats, torch.ops.gpuops.histogram
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
SHAPES = st.sampled_from([(0, 3, 4), (1, 1), (2, 3), (5, 2, 7), (3, 4, 8, 9), (2, 200, 3), (1, 2, 3, 4, 5)])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(room.INPUT_DTYPES),
    out=st.sampled_from(room.OUTPUT_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_result_is_that_of_transform_and_the_statistics_are_numpy_s(shape, dtype, out, seed) -> None:
    case = make_case(shape, dtype, seed)
    y, statistics, counts = op(*case.args, out)
    assert torch.equal(integers(y), integers(transform.launch(*case.args, out)))
    assert counts.shape == (shape[1], 0)
    wide, missing = transform.launch(*case.args, torch.float32).double().numpy(), is_missing_in(case)
    for channel, row in enumerate(statistics.tolist()):
        values, gone = wide[:, channel].ravel(), missing[:, channel].ravel()
        kept = values[~gone & ~np.isnan(values)]
        assert row[0] == len(kept)
        assert row[5:] == [(np.isnan(values) & ~gone).sum(), gone.sum()]
        if not len(kept):
            assert np.isnan([row[1], row[3], row[4]]).all()
            assert row[2] == 0
            continue
        assert row[3:5] == [kept.min(), kept.max()]
        if np.isfinite(kept).all():
            scale = np.abs(kept).max()
            np.testing.assert_allclose(row[1], kept.mean(), rtol=1e-12, atol=1e-12 * scale)
            np.testing.assert_allclose(row[2], len(kept) * kept.var(), rtol=1e-9, atol=1e-12 * scale**2)
    for got, want in zip(room.launch(*case.args, out), (y, statistics, counts), strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 5), min_size=2, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_statistics_of_parts_merge_to_those_of_the_whole(sizes: list[int], seed: int) -> None:
    case = make_case((sum(sizes), 3, 5), torch.int16, seed)
    edges = torch.tensor([[-1.0] * 3, [1.0] * 3])
    _, whole, counts = op(*case.args, torch.float32, edges)
    parts = [op(x, *case.args[1:], torch.float32, edges) for x in case.x.split(sizes)]
    merged = parts[0][1]
    for _, statistics, _ in parts[1:]:
        merged = room.merge(merged, statistics)
    torch.testing.assert_close(merged, whole, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert torch.equal(sum(part[2] for part in parts), counts)


def test_counts_are_a_drift_sketch() -> None:
    case = make_case((4, 1, 900), torch.float32, seed=8)
    edges = torch.tensor([[-2.0], [6.0]])  # a power of two apart: float32 bins as float64 does
    y, statistics, counts = op(*case.args, torch.float32, edges)
    want = Sketch.of(np.where(is_missing_in(case), np.nan, y.numpy()), -2.0, 6.0)
    below, *bins, above = counts[0].tolist()
    assert Sketch(-2.0, 6.0, np.array(bins), below, above, int(statistics[0, 5:].sum())) == want


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=SHAPES, dtype=st.sampled_from(counting.INPUT_DTYPES), seed=st.integers(0, 2**32 - 1))
def test_histogram_counts_every_number_once(shape, dtype, seed) -> None:
    case = make_case(shape, dtype, seed)
    a, b = np.float32(0.5), np.float32(100.0)
    scale = torch.tensor([[a] * shape[1], [b] * shape[1], case.coefficients[-1].tolist()])
    counts = histogram(case.x, scale, case.missing)
    missing, x = is_missing_in(case), case.x.numpy()
    with np.errstate(over="ignore"):
        v = x.astype(np.float32) * a + b
    for channel, row in enumerate(counts.tolist()):
        gone = missing[:, channel].ravel() | np.isnan(v[:, channel].ravel())
        kept = v[:, channel].ravel()[~gone]
        inside = kept[(kept >= 0) & (kept <= 256)].astype(int)
        assert row[0] == (kept < 0).sum()
        assert row[1:257] == np.bincount(np.minimum(inside, 255), minlength=256).tolist()
        assert row[257:] == [(kept > 256).sum(), gone.sum()]
    assert torch.equal(counting.launch(case.x, scale, case.missing), counts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.uint16]),
    q=st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_quantiles_are_exact(dtype: torch.dtype, q: list[float], seed: int) -> None:
    case = make_case((3, 2, 41), dtype, seed)
    missing = is_missing_in(case)
    kept = [case.x[:, c].numpy().ravel()[~missing[:, c].ravel()].astype(np.int64) for c in range(2)]
    if not all(map(len, kept)):
        with pytest.raises(ValueError, match="has no number that is not missing"):
            counting.quantile(case.x, q, case.missing)
        return
    got = counting.quantile(case.x, q, case.missing)
    want = [[np.sort(v)[max(int(np.ceil(share * len(v))), 1) - 1] for v in kept] for share in q]
    assert got.tolist() == want
    # Over two ranks: each counts its own, and both add up.
    halves = [case.x[:1].contiguous(), case.x[1:].contiguous()]
    launched, theirs = counting.launch, []

    def on_first_rank(x: torch.Tensor, scale: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        theirs.append(launched(halves[1], scale, missing))
        return launched(halves[0], scale, missing)

    with mock.patch.object(counting, "launch", on_first_rank):
        again = counting.quantile(case.x, q, case.missing, lambda counts: counts + theirs[-1])
    assert torch.equal(again, got)


def test_more_than_two_to_the_24_values_are_counted() -> None:
    x = torch.zeros((1, 1, 2**24 + 3), dtype=torch.uint8)
    scale = torch.tensor([[1.0], [0.0], [torch.nan]])
    counts = histogram(x, scale, torch.zeros(2, 1, dtype=torch.int32))
    assert counts[0, 1] == 2**24 + 3


def test_bad_arguments_are_refused() -> None:
    case = make_case((2, 3, 4), torch.int16, seed=0)
    scale = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="0 to 3 spatial axes"):
        room.launch(torch.zeros(3, dtype=torch.int16), *case.args[1:], torch.float32)
    with pytest.raises(ValueError, match=r"edges is torch.float64 \(2, 3\): pass contiguous float32 \[2, 3\]"):
        op(*case.args, torch.float32, torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"edges is torch.float32 \(2, 1\)"):
        op(*case.args, torch.float32, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"scale has shape \(2, 3\): x has 3 channels, so pass \[3, 3\]"):
        histogram(case.x, scale[:2].contiguous(), case.missing)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        histogram(case.x.double(), scale, case.missing)
    with pytest.raises(ValueError, match=r"x is torch\.int32: exact quantiles need 8- or 16-bit integers"):
        counting.quantile(case.x.int(), [0.5], case.missing)
    with pytest.raises(ValueError, match="give shares from 0 to 1"):
        counting.quantile(case.x, [1.5], case.missing)


def test_opcheck_compile_and_a_gpu_that_is_not_there() -> None:
    x = torch.arange(2 * 3 * 8).reshape(2, 3, 8).to(torch.int16)
    table = torch.tensor([0.5, 1.0, -9.0, 9.0, 2.0, torch.nan])[:, None].repeat(1, 3)
    missing = torch.tensor([[3] * 3, [1] * 3], dtype=torch.int32)
    edges = torch.tensor([[-1.0] * 3, [4.0] * 3])
    torch.library.opcheck(op, (x, table, missing, torch.bfloat16, edges))
    torch.library.opcheck(histogram, (x, table[:3].contiguous(), missing))
    compiled = torch.compile(lambda x: op(x, table, missing, torch.float32, edges), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), op(x, table, missing, torch.float32, edges), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    with FakeTensorMode():
        on_gpu = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (x, table, missing, edges)]
        y, statistics, counts = op(*on_gpu[:3], torch.bfloat16, on_gpu[3])
        assert (y.device.type, statistics.shape, counts.shape) == ("cuda", (3, 7), (3, 258))
        assert histogram(on_gpu[0], torch.empty(3, 3, device="cuda"), on_gpu[2]).shape == (3, 259)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_for_cuda_traces_the_kernels(dynamic: bool) -> None:
    """On tensors without memory: the graph that a GPU would run has our kernels in it."""
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=record))
    def compiled(
        x: torch.Tensor, table: torch.Tensor, missing: torch.Tensor, edges: torch.Tensor, scale: torch.Tensor
    ) -> object:
        return op(x, table, missing, torch.bfloat16, edges), histogram(x, scale, missing)

    with cubin.driver_for(90), FakeTensorMode():
        x = torch.empty(6, 3, 128, 33, dtype=torch.int16, device="cuda")
        tables = torch.empty(6, 3, device="cuda"), torch.empty(2, 3, dtype=torch.int32, device="cuda")
        rest = torch.empty(2, 3, device="cuda"), torch.empty(3, 3, device="cuda")
        (y, statistics, counts), bins = compiled(x, *tables, *rest)
    assert (y.shape, y.dtype) == (x.shape, torch.bfloat16)
    assert (statistics.shape, counts.shape, bins.shape) == ((3, 7), (3, 258), (3, 259))
    (graph,) = graphs
    calls = graph.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)
    assert len(calls) == 3
    written = [name for call in calls for name in call.kwargs["tensors_to_clone"]]
    assert sorted(written) == ["counts_ptr", "counts_ptr", "parts_ptr", "statistics_ptr", "y_ptr"], (
        "x must not be copied"
    )
