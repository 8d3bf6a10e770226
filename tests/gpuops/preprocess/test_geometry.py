"""Crops, mirrors and turns: the same for a sample wherever it is read, one launch, and a twin for evaluation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.errors import InputError
from gpuops.preprocess.geometry import Augment, CenterCrop, RandomCrop, RandomFlip, RandomTurn, Resize, table
from gpuops.preprocess.module import Draw, PreprocessModule
from gpuops.preprocess.philox import below, draw, philox4x32
from gpuops.preprocess.steps import Asinh, Fill, Log, Normalize, Part, Preprocess, Unpack
from gpuops_kernels.resample import resample, weights

GOLDEN = [0x41049266, 0xB9AB41A7, 0x04488C5E, 0x73F6FF1A]
"""Sample 7, seed 3, epoch 1, the first step: what releases must keep, or old runs augment otherwise."""

CROP, FLIP, TURN = RandomCrop((6, 6)), RandomFlip(("x", "y")), RandomTurn()
X = (Part("rain", 2, "int16", (Unpack(0.1, 5.0, -999), Fill(0.0), Normalize((8.0, 9.0), (2.0, 3.0)))),)
WHOLE = Preprocess(
    {"x": X, "label": (Part("label", 1, "uint8"),), "month": (Part("month", 1, "int32"),)}, (CROP, FLIP, TURN)
)


def slot(samples: int = 9, spatial: tuple[int, ...] = (10, 14)) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    rain = rng.integers(-999, 600, (samples, 2, *spatial)).astype(np.int16)
    label = (np.abs(rain[:, :1]) % 251).astype(np.uint8)  # the same place of both is recognised
    month = np.arange(samples, dtype=np.int32)[:, None]
    return {name: torch.from_numpy(v) for name, v in (("x", rain), ("label", label), ("month", month))}


def cut(values: torch.Tensor, row: list[int], size: tuple[int, ...]) -> torch.Tensor:
    """One sample [channels, *spatial] by slicing."""
    _, *starts, flip, rot = row
    for axis, (start, length) in enumerate(zip(starts, size, strict=True), 1):
        values = values.narrow(axis, start, length)
    mirrored = [axis + 1 for axis in range(len(size)) if flip >> (len(size) - 1 - axis) & 1]
    return torch.rot90(values.flip(mirrored), rot, (-2, -1))


def test_philox_gives_the_published_numbers() -> None:
    """kat_vectors of the Random123 library that the paper's authors publish."""
    for counter, key, want in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        got = philox4x32(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64))
        assert got[:, 0].tolist() == want


def test_draws_are_golden_and_differ_by_id_epoch_seed_step_and_number() -> None:
    base = draw(np.array([7]), 3, 1, 0)[:, 0].tolist()
    first = philox4x32(np.array([[7], [0], [0], [0]], np.uint64), np.array([3, 1], np.uint64))
    assert base == first[:, 0].tolist() == GOLDEN
    others = [
        draw(np.array([8]), 3, 1, 0),
        draw(np.array([7 + 2**32]), 3, 1, 0),
        draw(np.array([7]), 4, 1, 0),
        draw(np.array([7]), 3 + 2**32, 1, 0),
        draw(np.array([7]), 3, 2, 0),
        draw(np.array([7]), 3, 1, 1),
        draw(np.array([7]), 3, 1, 0, 1),
    ]
    found = {tuple(v[:, 0].tolist()) for v in others} | {tuple(base)}
    assert len(found) == 8


def test_draws_are_uniform() -> None:
    words = draw(np.arange(200_000), 0, 0, 0)
    for limit in (2, 3, 7):
        counts = np.bincount(below(words[0], limit), minlength=limit)
        assert counts.sum() == 200_000
        assert abs(counts - 200_000 / limit).max() < 5 * np.sqrt(200_000 / limit)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    volume=st.booleans(),
)
def test_a_row_depends_on_its_sample_alone_and_lies_inside(ids, seed, epoch, volume) -> None:
    spatial = (5, 10, 14) if volume else (10, 14)
    steps = (RandomCrop((3, 6, 6) if volume else (6, 6)), RandomFlip(("x", "z") if volume else ("x",)), TURN)
    together = table(steps, np.array(ids), seed, epoch, spatial)
    for place, number in enumerate(ids):
        alone = table(steps, np.array([number]), seed, epoch, spatial)
        assert alone[0, 1:].tolist() == together[place, 1:].tolist()
    for axis, (whole, length) in enumerate(zip(spatial, steps[0].size, strict=True)):
        assert 0 <= together[:, 1 + axis].min() <= together[:, 1 + axis].max() <= whole - length


def test_every_place_mirror_and_turn_occurs() -> None:
    rows = table((RandomCrop((6, 6)), FLIP, TURN), np.arange(4000), 0, 0, (8, 9))
    assert {tuple(row) for row in rows[:, 1:].tolist()} == {
        (y, x, flip, rot) for y in range(3) for x in range(4) for flip in range(4) for rot in range(4)
    }
    assert not table((RandomFlip(("y",), p=0.0),), np.arange(500), 0, 0, (4, 4))[:, 3].any()
    assert (table((RandomFlip(("y",), p=1.0),), np.arange(500), 0, 0, (4, 4))[:, 3] == 2).all()


@pytest.mark.parametrize("spatial", [(10, 14), (6, 6), (3, 10, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_and_labels_are_cut_alike_bit_for_bit(spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    stored, ids = slot(spatial=spatial), np.arange(100, 109)
    ready = PreprocessModule(WHOLE, dtype).packed(stored, Draw(ids, 5, 2))
    rows = table(WHOLE.geometry, ids, 5, 2, spatial)
    size = (*spatial[:-2], 6, 6)
    plain = PreprocessModule(Preprocess(WHOLE.tensors), dtype).packed(stored)
    for place, row in enumerate(rows.tolist()):
        assert torch.equal(ready["x"][place].float(), cut(plain["x"][place], row, size).float())
        assert torch.equal(ready["label"][place], cut(stored["label"][place], row, size))
    assert ready["label"].dtype == torch.uint8
    assert ready["month"] is stored["month"]


def test_random_steps_need_a_draw() -> None:
    with pytest.raises(InputError, match="pass a Draw, or prepare with eval"):
        PreprocessModule(WHOLE).packed(slot())


def test_eval_takes_the_middle_in_training_and_in_the_served_graph() -> None:
    twin = WHOLE.eval()
    assert twin.geometry == (CenterCrop((6, 6)),)
    assert not twin.random
    assert twin.eval() == twin
    assert twin.shape((2, 10, 14)) == (2, 6, 6)
    stored = slot()
    ready = PreprocessModule(twin).packed(stored)
    plain = PreprocessModule(Preprocess(WHOLE.tensors)).packed(stored)
    assert torch.equal(ready["x"], plain["x"][:, :, 2:8, 4:10])
    assert torch.equal(ready["label"], stored["label"][:, :, 2:8, 4:10])

    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prepare = PreprocessModule(twin)

        def forward(self, rain: torch.Tensor, label: torch.Tensor, month: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ready = self.prepare({"rain": rain, "label": label, "month": month})
            return ready["x"] * 1, ready["label"], ready["month"]

    batch = torch.export.Dim("batch", min=1, max=32)
    shapes = {name: {0: batch} for name in ("rain", "label", "month")}
    program = torch.export.export(Served(), tuple(stored.values()), dynamic_shapes=shapes)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("gpuops.transform.default") == 1
    assert not any("window" in name for name in called)
    x, label, _ = program.module()(*(v[:4] for v in stored.values()))
    assert torch.equal(x, ready["x"][:4])
    assert torch.equal(label, ready["label"][:4])


def test_functions_and_windows_are_one_launch() -> None:
    parts = (
        Part("rain", 1, "int16", (Unpack(0.1, 0.0, -999), Fill(0.0), Log(0.5))),
        Part("wind", 1, "int16", (Unpack(0.1, 0.0, -999), Fill(0.0), Asinh(2.0))),
    )
    module = PreprocessModule(Preprocess({"x": parts}, (CROP,)))
    stored = {"x": slot()["x"].abs()}
    ready = module.packed(stored, Draw(np.arange(9), 0, 0))["x"]
    rows = table((CROP,), np.arange(9), 0, 0, (10, 14))
    physical = torch.where(stored["x"] == 999, stored["x"].double() * 0.1, stored["x"].double() * 0.1)
    want = torch.stack([torch.log1p(physical[:, 0] / 0.5), torch.asinh(physical[:, 1] / 2)], 1)
    want = torch.stack([cut(v, row, (6, 6)) for v, row in zip(want, rows.tolist(), strict=True)])
    torch.testing.assert_close(ready.double(), want, rtol=1e-6, atol=1e-6)
    back = module.physical("x", ready)
    cuts = torch.stack([cut(v, row, (6, 6)) for v, row in zip(physical, rows.tolist(), strict=True)])
    torch.testing.assert_close(back.double(), cuts, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "steps", [(Resize((4, 5)),), (CROP, Resize((3, 9), "area")), (FLIP, Resize((20, 7), "bicubic"))]
)
def test_resize_is_a_second_op_in_training_and_in_the_served_graph(steps) -> None:
    declared = Preprocess({"x": X, "month": WHOLE.tensors["month"]}, steps)
    stored, draw_of = slot(), Draw(np.arange(9), 0, 0)
    ready = PreprocessModule(declared).packed(stored, draw_of)["x"]
    before = PreprocessModule(Preprocess(declared.tensors, steps[:-1])).packed(stored, draw_of)["x"]
    (height, width), method = steps[-1].size, steps[-1].method
    want = resample(before, *(weights(n, m, method) for n, m in zip(before.shape[2:], (height, width), strict=True)))
    torch.testing.assert_close(ready, want, rtol=0, atol=0)
    assert ready.shape[1:] == declared.shape((2, 10, 14)) == (2, height, width)
    narrow = PreprocessModule(declared, torch.bfloat16).packed(stored, draw_of)["x"]
    assert torch.equal(narrow, ready.bfloat16()), "rounded once, at the end"

    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prepare = PreprocessModule(declared.eval())

        def forward(self, rain: torch.Tensor, month: torch.Tensor) -> torch.Tensor:
            return self.prepare({"rain": rain, "month": month})["x"]

    batch = {0: torch.export.Dim("batch", min=1, max=32)}
    program = torch.export.export(
        Served(), (stored["x"], stored["month"]), dynamic_shapes={"rain": batch, "month": batch}
    )
    eager = PreprocessModule(declared.eval()).packed(stored)["x"]
    torch.testing.assert_close(program.module()(stored["x"][:3], stored["month"][:3]), eager[:3], rtol=0, atol=1e-6)


def test_missing_targets_stay_missing_only_where_nothing_is_known() -> None:
    target = Preprocess({"y": (Part("next", 1, "float32", (Unpack(),)),)}, (Resize((1, 2), "area"),))
    values = torch.tensor([[[[1.0, torch.nan, torch.nan, torch.nan], [3.0, 5.0, torch.nan, torch.nan]]]])
    ready = PreprocessModule(target).packed({"y": values})["y"]
    assert ready[0, 0, 0, 0] == 3.0
    assert ready[0, 0, 0, 1].isnan()
    with pytest.raises(InputError, match="labels have no values in between"):
        PreprocessModule(Preprocess({"label": WHOLE.tensors["label"]}, (Resize((4, 4)),))).packed(slot())


def test_json_and_explain() -> None:
    both = Preprocess({"x": X}, (CROP, Resize((3, 3))))
    assert Preprocess.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert both.explain({"x": (2, 10, 14)}, out_bytes=2).splitlines() == [
        "x: 1 launch (window), 144 B read, 288 B written, floor 0.00 us",
        "  then resize by torch, not fused: 288 B read, 36 B written",
        "  rain [2] int16: unpack(0.1, 5, -999) -> fill(0) -> normalize((8.0, 9.0), (2.0, 3.0))",
        "geometry, in the same launches: random_crop((6, 6)) (evaluation: center_crop((6, 6)))",
        "geometry, as a second op: resize((3, 3), bilinear)",
    ]
    again = Preprocess.from_json(json.loads(json.dumps(WHOLE.to_json())))
    assert again == WHOLE
    old = Preprocess(WHOLE.tensors)
    assert Preprocess.from_json(old.to_json()) == old
    assert "tensors" not in old.to_json(), "what was written before there were crops reads as ever"
    text = WHOLE.explain({"x": (2, 10, 14), "label": (1, 10, 14), "month": (1,)}, out_bytes=2)
    assert text.splitlines() == [
        "x: 1 launch (window), 144 B read, 144 B written, floor 0.00 us",
        "  rain [2] int16: unpack(0.1, 5, -999) -> fill(0) -> normalize((8.0, 9.0), (2.0, 3.0))",
        "label: 1 gather by torch (raw values keep their dtype), 72 B",
        "  label [1] uint8: raw",
        "month: 0 launch, as stored",
        "  month [1] int32: raw",
        "geometry, in the same launches: random_crop((6, 6)) (evaluation: center_crop((6, 6)))",
        "geometry, in the same launches: random_flip(('x', 'y'), 0.5) (evaluation: nothing)",
        "geometry, in the same launches: random_turn() (evaluation: nothing)",
    ]


def test_what_cannot_be_done_is_refused() -> None:
    for steps in ((FLIP, CROP), (TURN, FLIP), (CROP, CROP), (CROP, CenterCrop((2, 2))), (Resize((2, 2)), CROP)):
        with pytest.raises(InputError, match="in that order"):
            Preprocess({"x": X}, steps)
    with pytest.raises(InputError, match="two or three sizes, each at least 1"):
        RandomCrop((0, 4))
    with pytest.raises(InputError, match="name axes of x, y, z"):
        RandomFlip(("t",))
    with pytest.raises(InputError, match="does not fit in samples of"):
        WHOLE.shape((2, 5, 14))
    with pytest.raises(InputError, match="cannot be turned by 90 degrees"):
        Preprocess({"x": X}, (TURN,)).shape((2, 5, 14))
    with pytest.raises(InputError, match="no axis z to mirror"):
        Preprocess({"x": X}, (RandomFlip(("z",)),)).shape((2, 5, 14))
    with pytest.raises(InputError, match="unknown step 'shear'; this gpuops knows center_crop"):
        Preprocess.from_json({"tensors": {}, "geometry": [{"step": "shear"}]})
    assert Augment(crop=(6, 6), flip=("x", "y"), turn=True).steps() == (CROP, FLIP, TURN)
    assert Augment().steps() == ()
    assert RandomCrop([6, np.int64(6)]) == CROP  # type: ignore[arg-type, list-item]
    assert RandomFlip("xy") == FLIP  # type: ignore[arg-type]
    with pytest.raises(InputError, match="9 samples, the draw 2 ids"):
        PreprocessModule(WHOLE).packed(slot(), Draw(np.arange(2), 0, 0))
