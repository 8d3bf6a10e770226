"""gpuops::rrc on the CPU, against grid_sample and slicing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gpuops_kernels import rrc as room

op = torch.ops.gpuops.rrc


def images(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5)),
    out=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    shares=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    mirror=st.booleans(),
)
def test_is_grid_sample_of_the_box(sizes, out, shares, mirror) -> None:
    height, width, channels = sizes
    x = images((1, *sizes))
    extent = torch.tensor([height * shares[0], width * shares[1]])
    first = (torch.tensor([height, width]) - extent) * torch.tensor(shares[2:])
    boxes = torch.cat([first, extent, torch.tensor([float(mirror)])])[None].float()
    scale, offset = torch.linspace(0.5, 2, channels), torch.linspace(-1, 1, channels)
    got = op(x, boxes, scale, offset, torch.float32, *out)
    places = []
    for axis, whole in enumerate((height, width)):
        at = boxes[0, axis] + (torch.arange(out[axis]) + 0.5) * boxes[0, 2 + axis] / out[axis]
        places.append(at.double() * 2 / whole - 1)
    grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], -1)[None]
    planes = x.movedim(-1, 1).double()
    want = torch.nn.functional.grid_sample(planes, grid, "bilinear", "border", align_corners=False)
    want = want * scale.double().view(-1, 1, 1) + offset.double().view(-1, 1, 1)
    want = want.flip(-1) if mirror else want
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02)  # a place is a float32, a step 255
    assert torch.equal(room.launch(x, boxes, scale, offset, torch.float32, *out), got)


def test_a_whole_box_of_its_own_size_is_the_image() -> None:
    x, one, zero = images((3, 7, 9, 3)), torch.ones(3), torch.zeros(3)
    boxes = torch.tensor([[0, 0, 7, 9, 0], [0, 0, 7, 9, 1], [2, 3, 4, 5, 0]]).float()
    assert torch.equal(op(x, boxes, one, zero, torch.float32, 7, 9)[0], x[0].movedim(-1, 0).float())
    assert torch.equal(op(x, boxes, one, zero, torch.float32, 7, 9)[1], x[1].movedim(-1, 0).float().flip(-1))
    assert torch.equal(op(x, boxes, one, zero, torch.bfloat16, 4, 5)[2], x[2, 2:6, 3:8].movedim(-1, 0).bfloat16())
    assert op(x[:0], boxes[:0], one, zero, torch.float32, 4, 5).shape == (0, 3, 4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": images((2, 7, 9, 3)).float()}, "pass contiguous uint8 images"),
        ({"x": images((2, 7, 3, 9)).mT}, "pass contiguous uint8 images"),
        ({"boxes": torch.zeros(2, 4)}, r"pass float32 \[2, 5\] on the CPU"),
        (
            {"boxes": torch.tensor([[0, 0, 7, 9, 0], [1, 0, 7, 9, 0]]).float()},
            r"boxes row 1: .* leaves an image of \[7, 9\]",
        ),
        ({"boxes": torch.tensor([[0, 0, 7, 9, 0], [0, 0, 0, 9, 0]]).float()}, "boxes row 1: .* is empty"),
        ({"boxes": torch.full((2, 5), torch.nan)}, "boxes row 0"),
        ({"scale": torch.ones(4)}, r"scale is torch.float32 \(4,\): pass contiguous float32 \[3\]"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"height": 0}, r"to \[0, 4\]"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    whole = torch.tensor([[0, 0, 7, 9, 0]] * 2).float()
    given = {"x": images((2, 7, 9, 3)), "boxes": whole, "scale": torch.ones(3), "offset": torch.zeros(3)}
    given |= {"dtype": torch.float32, "height": 4, "width": 4} | changes
    for run in (room.launch, op):
        with pytest.raises(ValueError, match=message):
            run(*given.values())


def test_opcheck_compile_and_a_gpu_that_is_not_there() -> None:
    whole = torch.tensor([[0, 0, 7, 9, 1]] * 2).float()
    rest = torch.ones(3), torch.zeros(3), torch.bfloat16, 4, 5
    torch.library.opcheck(op, (images((2, 7, 9, 3)), whole, *rest))
    compiled = torch.compile(lambda x, boxes: op(x, boxes, *rest) * 2, fullgraph=True, backend="aot_eager")
    for samples in (2, 3):
        x, boxes = images((samples, 7, 9, 3)), whole[:1].repeat(samples, 1)
        assert torch.equal(compiled(x, boxes), op(x, boxes, *rest) * 2)
    with FakeTensorMode():
        x = torch.empty(2, 7, 9, 3, dtype=torch.uint8, device="cuda")
        tables = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        assert op(x, torch.empty(2, 5), *tables, torch.bfloat16, 4, 5).shape == (2, 3, 4, 5)
