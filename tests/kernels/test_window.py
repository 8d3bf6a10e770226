"""gpuops::window on the CPU: the reference, the ops and `launch`, against slicing and transform."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import integers, make_case
from torch._subclasses.fake_tensor import FakeTensorMode
from windows import Windows, cut, make_windows

from gpuops_kernels import transform
from gpuops_kernels import window as room

op, chunks_op = torch.ops.gpuops.window, torch.ops.gpuops.window_chunks
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def arguments(case: Windows, dtype: torch.dtype) -> tuple[object, ...]:
    return case.table, case.slab.coefficients, case.slab.missing, dtype, case.size, case.rule, case.slab.functions


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    chunk=st.lists(st.integers(1, 33), min_size=2, max_size=3).map(tuple),
    size=st.lists(st.integers(1, 33), min_size=3, max_size=3),
    channels=st.sampled_from([1, 2, 3, 200]),
    windows=st.integers(0, 4),
    rule=st.sampled_from(room.RULES),
    dtype=st.sampled_from(room.INPUT_DTYPES),
    out=st.sampled_from(room.OUTPUT_DTYPES),
    functions=st.sampled_from(["", "log,asinh"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bit_equal_to_slicing_and_transform(chunk, size, channels, windows, rule, dtype, out, functions, seed) -> None:
    size = tuple(size[: len(chunk)])
    if rule == "error":
        size = tuple(min(pair) for pair in zip(chunk, size, strict=True))
    case = make_windows(
        chunk, size, channels=channels, windows=windows, rule=rule, dtype=dtype, seed=seed, functions=functions
    )
    shown, outside = cut(case)
    want = transform.launch(*shown.args, out, functions)
    if rule == "pad":
        fill = case.slab.coefficients[-2].to(out).view(-1, *(1,) * len(size))
        want = torch.where(torch.from_numpy(outside.copy()), fill, want)
    for run in (op, room.launch):
        got = run(case.slab.x, *arguments(case, out))
        assert got.dtype == out
        assert torch.equal(integers(got), integers(want))
    for run in (chunks_op, room.launch_chunks):
        got = run([chunk.clone() for chunk in case.slab.x], *arguments(case, out))
        assert torch.equal(integers(got), integers(want))


def test_a_whole_chunk_is_transform_and_mirrored_twice_is_as_before() -> None:
    case = make_case((3, 2, 8, 8), torch.int16, seed=1)
    whole = torch.tensor([[k, 0, 0, 0, 0] for k in range(3)], dtype=torch.int32)
    want = transform.launch(*case.args, torch.float32)
    assert torch.equal(integers(room.launch(case.x, whole, *case.args[1:], torch.float32, (8, 8))), integers(want))
    turned = whole.clone()
    turned[:, 3], turned[:, 4] = room.FLIP_X | room.FLIP_Y, 2  # both mirrors are half a turn
    assert torch.equal(integers(room.launch(case.x, turned, *case.args[1:], torch.float32, (8, 8))), integers(want))


ROW = [0, 1, 2, 0, 0]
BAD = [
    ({"table": [[3, 0, 0, 0, 0]]}, "table row 0: chunk 3 is not one of 0 to 2"),
    ({"table": [ROW, [-1, 0, 0, 0, 0]]}, "table row 1: chunk -1"),
    ({"table": [ROW, [0, 6, 0, 0, 0]]}, r"table row 1: elements 6 to 10 of axis 0 are asked for, a chunk has 9"),
    ({"table": [[0, 0, -1, 0, 0]]}, "table row 0: elements -1 to 3 of axis 1"),
    ({"table": [[0, 0, 2**31 - 1, 0, 0]]}, "of axis 1 are asked for"),
    ({"table": [[0, 0, 0, 4, 0]]}, "table row 0: flip 4 is not one of 0 to 3"),
    ({"table": [[0, 0, 0, 0, -1]]}, "table row 0: rot -1 is not one of 0 to 3"),
    ({"table": [[0, 0, 0, 0, 1]], "size": (4, 5)}, r"a window of \(4, 5\) cannot be turned by 90 degrees"),
    ({"table": [[0, 0, 0]]}, r"table has shape \(1, 3\): windows of 2 axes need \[N, 5\]"),
    ({"size": (0, 4)}, "a plane has 1 to"),
    ({"size": (4,)}, r"slab has shape \(3, 2, 9, 10\)"),
    ({"size": (2, 4, 4)}, r"slab has shape \(3, 2, 9, 10\)"),
    ({"rule": "mirror"}, "rule is 'mirror': pass one of error, pad, wrap"),
    ({"slab": torch.zeros(3, 2, 9, 10, dtype=torch.int64)}, "x is torch.int64"),
    ({"slab": torch.zeros(3, 2, 10, 9, dtype=torch.int16).mT}, "x is not contiguous"),
    ({"slab": torch.zeros(0, 2, 9, 10, dtype=torch.int16)}, "chunk 0 is not one of 0 to -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_refused_before_anything_is_read(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(*_: object, **__: object) -> None:
        raise AssertionError("bad arguments got past the check")

    monkeypatch.setattr(room, "reference", ran)
    case = make_case((3, 2, 9, 10), torch.int16, seed=0)
    given = {"slab": case.x, "table": [ROW], "size": (4, 4), "rule": "error"} | changes
    table = torch.tensor(given["table"], dtype=torch.int32)
    rest = table, *case.args[1:], torch.float32, given["size"], given["rule"]
    for run in (room.launch, op):
        with pytest.raises(ValueError, match=message):
            run(given["slab"], *rest)


def test_bad_tables_and_chunks_are_refused() -> None:
    case = make_case((3, 2, 9, 10), torch.int16, seed=0)
    rest = *case.args[1:], torch.float32, (4, 4)
    table = torch.tensor([ROW], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"table is torch\.int64 on cpu: pass int32 on the CPU"):
        room.launch(case.x, table.long(), *rest)
    with pytest.raises(ValueError, match="no chunks"):
        room.launch_chunks([], table, *rest)
    with pytest.raises(ValueError, match=r"chunk 1 is torch\.int16"):
        room.launch_chunks([case.x[0], case.x[1, :, :8].contiguous()], table, *rest)
    with pytest.raises(ValueError, match=r"chunk 2 is torch\.int32"):
        room.launch_chunks([*case.x[:2], case.x[2].int()], table, *rest)


def test_opcheck_and_one_compiled_graph_for_any_batch() -> None:
    case = make_windows((9, 10), (4, 4), windows=3)
    slab, rest = torch.arange(3 * 2 * 90).reshape(3, 2, 9, 10).to(torch.int16), list(arguments(case, torch.bfloat16))
    plain = torch.tensor([1.0, 0.0, -1e9, 1e9, 5.0, torch.nan])[:, None].repeat(1, 2)  # opcheck finds NaN unequal
    rest[1], rest[2] = plain, torch.zeros(2, 2, dtype=torch.int32)
    torch.library.opcheck(op, (slab, *rest))
    torch.library.opcheck(chunks_op, (list(slab), *rest))
    compiled = torch.compile(lambda slab, table: op(slab, table, *rest[1:]) * 2, fullgraph=True, backend="aot_eager")
    for windows in (3, 5):
        table = make_windows((9, 10), (4, 4), windows=windows).table
        assert torch.equal(compiled(slab, table), op(slab, table, *rest[1:]) * 2)
    with pytest.raises(ValueError, match="of axis 0 are asked for"):  # in a compiled graph too
        compiled(slab, torch.tensor([[0, 8, 0, 0, 0]] * 3, dtype=torch.int32))


def test_traces_for_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        slab = torch.empty(3, 2, 9, 10, dtype=torch.int16, device="cuda")
        tables = torch.empty(6, 2, device="cuda"), torch.empty(2, 2, dtype=torch.int32, device="cuda")
        table = torch.empty(7, 5, dtype=torch.int32)
        y = op(slab, table, *tables, torch.bfloat16, (4, 5))
        assert (y.shape, y.dtype, y.device.type) == ((7, 2, 4, 5), torch.bfloat16, "cuda")
        chunks = [torch.empty(2, 9, 10, dtype=torch.int16, device="cuda") for _ in range(2)]
        y = chunks_op(chunks, table, *tables, torch.bfloat16, (4, 5))
        assert (y.shape, y.dtype, y.device.type) == ((7, 2, 4, 5), torch.bfloat16, "cuda")
