"""Declared steps: folded into one table they do what each of them says, one after the other, in float64."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.errors import InputError
from gpuops.preprocess.fold import Coefficients, fold, inverse
from gpuops.preprocess.steps import Asinh, Clip, Fill, Log, Normalize, Part, Preprocess, Step, Unpack

CHANNELS = 3
finite = st.floats(-100, 100).map(lambda v: round(v, 3))
positive = st.floats(0.01, 50).map(lambda v: round(v, 3))


def per_channel(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(values) | st.tuples(*[values] * CHANNELS)


clips = st.tuples(st.none() | finite, st.none() | finite).map(
    lambda pair: Clip(*pair) if None in pair else Clip(*sorted(pair))  # type: ignore[type-var,arg-type]
)
later = st.lists(
    st.builds(Fill, finite) | clips | st.builds(Normalize, per_channel(finite), per_channel(positive)), max_size=5
)
unpack = st.builds(Unpack, finite.filter(bool), finite, st.none() | st.integers(0, 20))


def oracle(part: Part, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The steps one after the other on [n, channels], in float64; missing is NaN until something fills it."""
    values = stored.astype(np.float64)
    for step in part.steps:
        match step:
            case Unpack():
                values = np.where(stored == step.missing, np.nan, values * step.scale + step.offset)
            case Fill():
                values = np.where(np.isnan(values), step.value, values)
            case Clip():
                values = values if step.low is None else np.where(values < step.low, step.low, values)
                values = values if step.high is None else np.where(values > step.high, step.high, values)
            case Normalize():
                values = (values - np.array(step.mean)) / np.array(step.std)
            case Log():
                values = np.log(values / step.scale + step.offset)
            case Asinh():
                values = np.arcsinh(values / step.scale)
    return values


def run(folded: Coefficients, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """What the op does with a table, in float64, on [n, channels]."""
    *rows, fill, absent = folded.table.astype(np.float64)
    value, flag = folded.missing
    missing = np.isnan(stored) | (stored == absent) if stored.dtype.kind == "f" else stored == value
    a, b, low, high = rows[:4]
    values = np.clip(stored * a + b, low, high)
    for number, name in enumerate(folded.functions.split(",") if folded.functions else []):
        kind, a, b, low, high = rows[4 + 5 * number : 9 + 5 * number]
        assert name == "each" or (kind == {"log": 1, "asinh": 2}[name]).all()
        with np.errstate(invalid="ignore", divide="ignore"):  # of channels that take another function
            values = np.select([kind == 1, kind == 2], [np.log(values), np.arcsinh(values)], values)
        values = np.clip(values * a + b, low, high)
    return np.where(missing & (flag != 0), fill, values)


def folded_part(declared: Part) -> Coefficients:
    folded = fold(Preprocess({"x": (declared,)}), "x")
    if folded is None:  # no steps: what one that changes nothing gives
        folded = fold(Preprocess({"x": (replace(declared, steps=(Unpack(),)),)}), "x")
    assert folded is not None
    return folded


def part(*steps: Step, dtype: str = "uint8", channels: int = CHANNELS, name: str = "v") -> Part:
    return Part(name, channels, dtype, steps)


# folding


@settings(max_examples=300, deadline=None)
@given(unpack, later, st.sampled_from(["uint8", "int16", "float32"]))
def test_folded_steps_are_the_steps(first: Unpack, rest: list[Step], dtype: str) -> None:
    declared = part(first, *rest, dtype=dtype)
    stored = np.tile(np.arange(40)[:, None], (1, CHANNELS)).astype(dtype)
    if dtype == "float32":
        stored[7] = np.nan
    want, got = oracle(declared, stored), run(folded_part(declared), stored)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg="missing data in other places")
    # The table is rounded to float32 once: terms that cancel keep the error of the larger.
    scales = [step.std for step in rest if isinstance(step, Normalize)]
    a, b = (np.abs(row).max() for row in folded_part(declared).table[:2])
    bounds = np.abs(folded_part(declared).table[2:5])
    size = a * 40 + b + bounds[np.isfinite(bounds)].max(initial=0) + 1
    np.testing.assert_allclose(got, want, rtol=0, atol=size * 2.0**-20, equal_nan=True, err_msg=str(scales))


curves = st.builds(Log, positive, st.floats(1, 50)) | st.builds(Asinh, positive)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.lists(st.builds(Clip, st.just(0.0), st.just(1e4)) | curves, max_size=4), min_size=1, max_size=3),
    fill=positive,
    scale=st.floats(-2, 2).filter(lambda v: abs(v) > 0.01),
)
def test_any_list_of_functions_folds_into_one_table(parts: list[list[Step]], fill: float, scale: float) -> None:
    """Parts of a tensor may differ in functions and in how many: it is one launch all the same."""
    start = (Unpack(scale, 90.0, 39), Fill(fill), Clip(0.0, 1e4))
    tail = (Normalize((1.0,), (2.0,)),)
    declared = [part(*start, *steps, *tail, channels=2, name=f"v{i}") for i, steps in enumerate(parts)]
    whole = Preprocess({"x": tuple(declared)})
    folded = fold(whole, "x")
    assert folded is not None
    stored = np.tile(np.arange(40, dtype=np.uint8)[:, None], (1, 2 * len(parts)))
    want = np.concatenate([oracle(p, stored[:, :2]) for p in declared], axis=1)
    np.testing.assert_allclose(run(folded, stored), want, rtol=2e-4, atol=2e-4)
    names = [[s.step for s in steps if not isinstance(s, Clip)] for steps in parts]
    assert len(folded.functions.split(",")) == max(map(len, names)) or not folded.functions
    assert ("each" in folded.functions) == any(a != b for a in names for b in names)
    if max(map(len, names)) > 1:
        return  # the way back multiplies what float32 left out
    values = run(folded, stored)
    with np.errstate(over="ignore"):
        for stage in inverse(whole, "x"):
            values = values * stage.scale + stage.offset
            undo = np.array(stage.undo)
            values = np.select([undo == "log", undo == "asinh"], [np.exp(values), np.sinh(values)], values)
    physical = np.where(stored == 39, fill, np.clip(stored * scale + 90.0, 0.0, 1e4))
    np.testing.assert_allclose(values, physical, rtol=2e-2, atol=2e-2)


def test_what_no_kernel_can_compute_is_refused() -> None:
    with pytest.raises(InputError, match="both finite, scale not 0"):
        Unpack(float("nan"), 0.0)
    with pytest.raises(InputError, match="both finite, scale not 0"):
        Unpack(0.0, 0.0)
    with pytest.raises(InputError, match="give a finite value"):
        Fill(float("inf"))
    with pytest.raises(InputError, match="clip to"):
        Clip(float("nan"), 1.0)
    with pytest.raises(InputError, match="both finite, scale positive"):
        Log(-1.0)
    with pytest.raises(InputError, match="give a positive number"):
        Asinh(0.0)
    with pytest.raises(InputError, match="its fill value has no logarithm"):
        folded_part(part(Fill(-5.0), Log()))
    for value in (1.5, float("nan")):
        with pytest.raises(InputError, match="is uint8 and cannot hold"):
            part(Unpack(missing=value))
    assert not folded_part(part(Unpack(missing=2**40), dtype="int32")).missing[1].any(), "no int32 is that"
    with pytest.raises(InputError, match=r"step 'fill' cannot be read from .*missing 1 required"):
        Preprocess.from_json({"x": [{"name": "v", "channels": 1, "dtype": "uint8", "steps": [{"step": "fill"}]}]})
    with pytest.raises(InputError, match="unknown step None"):
        Preprocess.from_json({"x": [{"name": "v", "channels": 1, "dtype": "uint8", "steps": [{}]}]})
    with pytest.raises(InputError, match="no shape of month"):
        WHOLE.explain({"x": (4, 120, 120)})
    with pytest.raises(InputError, match="beyond float32"):
        folded_part(part(Normalize((0.0,), (1e-45,))))


@given(later)
def test_steps_without_an_unpack(rest: list[Step]) -> None:
    declared = part(*rest)
    stored = np.tile(np.arange(5, dtype=np.uint8)[:, None], (1, CHANNELS))
    assert not folded_part(declared).missing[1].any(), "no stored value is missing unless one is declared"
    table = folded_part(declared).table
    size = (np.abs(table[:2]).max() * 5) + np.abs(table[2:][np.isfinite(table[2:])]).max(initial=0) + 1
    np.testing.assert_allclose(
        run(folded_part(declared), stored), oracle(declared, stored), rtol=0, atol=size * 2.0**-20
    )


def test_missing_is_filled_before_it_is_clipped() -> None:
    folded = folded_part(part(Unpack(2.0, -10.0, 255), Fill(-5.0), Clip(0.0, 100.0), Normalize((10.0,), (2.0,))))
    row = run(folded, np.array([[255] * 3, [0] * 3, [20] * 3, [200] * 3], np.uint8))[:, 0]
    assert row.tolist() == [-5.0, -5.0, 10.0, 45.0], "255 is no data: as a value it would have been clipped to 100"


def test_a_fill_after_the_clip_is_not_clipped_and_the_first_fill_counts() -> None:
    stored = np.array([[255] * 3], np.uint8)
    assert run(folded_part(part(Unpack(missing=255), Clip(0.0, 1.0), Fill(7.0))), stored)[0, 0] == 7
    assert run(folded_part(part(Unpack(missing=255), Fill(3.0), Fill(7.0))), stored)[0, 0] == 3


def test_missing_data_without_a_fill_is_nan() -> None:
    for dtype, value in (("uint8", 255), ("float32", np.nan)):
        steps = (Unpack(missing=255 if dtype == "uint8" else None), Clip(0.0, 1.0), Normalize((0.5,), (0.5,)))
        assert np.isnan(run(folded_part(part(*steps, dtype=dtype)), np.full((1, 3), value, dtype))).all()


def test_a_float32_fill_value_is_missing_as_nan_is() -> None:
    folded = folded_part(part(Unpack(missing=9.96921e36), Fill(4.0), dtype="float32"))
    row = np.array([[9.96921e36] * 3, [np.nan] * 3, [9.96922e36] * 3], np.float32)
    assert run(folded, row)[:, 0].tolist() == [4.0, 4.0, np.float32(9.96922e36)]


def test_float32_nan_is_always_missing() -> None:
    folded = folded_part(part(Fill(4.0), dtype="float32"))
    assert folded.missing[1].all()
    assert run(folded, np.full((1, 3), np.nan, np.float32)).tolist() == [[4.0] * 3]


def test_each_channel_has_its_own_statistics() -> None:
    folded = folded_part(part(Normalize((0.0, 10.0, 20.0), (1.0, 2.0, 4.0))))
    assert run(folded, np.full((1, 3), 20, np.uint8)).tolist() == [[20.0, 5.0, 0.0]]
    assert folded.table.shape == (6, 3)
    assert folded.table.dtype == np.float32
    assert folded.missing.shape == (2, 3)
    assert folded.missing.dtype == np.int32


def test_a_table_is_rounded_once() -> None:
    # 0.1 / 0.3 rounded from float64; float32 arithmetic gives its neighbour.
    folded = folded_part(part(Unpack(0.1, 0.7), Normalize((0.3,), (0.3,))))
    assert folded.table[0, 0] == np.float32(0.1 / 0.3)
    assert folded.table[1, 0] == np.float32((0.7 - 0.3) / 0.3)


def test_tensors_join_their_parts() -> None:
    whole = Preprocess({"x": (part(Unpack(2.0), channels=2), part(Unpack(3.0, missing=9), channels=1, name="w"))})
    folded = fold(whole, "x")
    assert folded is not None
    assert folded.table[0].tolist() == [2, 2, 3]
    assert folded.missing.tolist() == [[0, 0, 9], [0, 0, 1]]
    assert fold(Preprocess({"x": (part(),)}), "x") is None, "raw values pass through unchanged"


# the inverse


@settings(max_examples=100, deadline=None)
@given(unpack, st.lists(st.builds(Normalize, per_channel(finite), per_channel(positive)), max_size=3))
def test_the_inverse_gives_physical_values_back(first: Unpack, rest: list[Normalize]) -> None:
    declared = part(Unpack(first.scale, first.offset), *rest)
    stored = np.tile(np.arange(0, 200, 9)[:, None], (1, CHANNELS)).astype(np.uint8)
    (stage,) = inverse(Preprocess({"y": (declared,)}), "y")
    scale, offset = stage.scale, stage.offset
    physical = stored * first.scale + first.offset
    size = np.abs(physical).max() + np.abs(offset).max() + 1
    np.testing.assert_allclose(oracle(declared, stored) * scale + offset, physical, rtol=1e-9, atol=size * 1e-9)


def test_the_inverse_of_several_parts() -> None:
    parts = (part(Normalize((1.0,), (2.0,)), channels=2), part(Normalize((5.0,), (3.0,)), channels=1, name="w"))
    (stage,) = inverse(Preprocess({"y": parts}), "y")
    assert stage.scale.tolist() == [2, 2, 3]
    assert stage.offset.tolist() == [1, 1, 5]


# JSON and words

WHOLE = Preprocess(
    {
        "x": (
            part(Unpack(0.05, 0.0, 255), Fill(0.0), Clip(None, 9.5), Normalize((1.0, 2.0, 3.0), (1.0,))),
            Part("w", 1, "uint8", (Unpack(28.0, -450.0),)),
        ),
        "month": (Part("month", 1, "int32"),),
    }
)


def test_json_round_trip() -> None:
    again = Preprocess.from_json(json.loads(json.dumps(WHOLE.to_json())))
    assert again == WHOLE
    assert again.to_json() == WHOLE.to_json()


@settings(max_examples=50, deadline=None)
@given(unpack, later)
def test_json_round_trip_of_any_steps(first: Unpack, rest: list[Step]) -> None:
    whole = Preprocess({"x": (part(first, *rest),)})
    assert Preprocess.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_steps_and_keys_of_a_later_version_are_refused() -> None:
    document = WHOLE.to_json()
    document["x"][0]["steps"][1] = {"step": "log10", "base": 10}
    with pytest.raises(
        InputError, match="unknown step 'log10'; this gpuops knows unpack, fill, clip, log, asinh, normalize"
    ):
        Preprocess.from_json(document)
    document["x"][0]["steps"][1] = {"step": "fill", "value": 1.0, "where": "sea"}
    with pytest.raises(InputError, match="step 'fill' has where"):
        Preprocess.from_json(document)


def test_explain() -> None:
    text = WHOLE.explain({"x": (4, 120, 120), "month": (1,)}, out_bytes=2)
    assert text.splitlines() == [
        "x: 1 launch (transform), 57,600 B read, 115,200 B written, floor 0.06 us",
        "  v [3] uint8: unpack(0.05, 0, 255) -> fill(0) -> clip(None, 9.5) -> normalize((1.0, 2.0, 3.0), (1.0,))",
        "  w [1] uint8: unpack(28, -450, None)",
        "month: 0 launch, as stored",
        "  month [1] int32: raw",
    ]


# refusals


@pytest.mark.parametrize("std", [(0.0,), (-1.0,), (float("nan"),), (1.0, 0.0)])
def test_a_spread_that_cannot_be_divided_by(std: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="cannot be normalised"):
        Normalize((0.0,), std)
    with pytest.raises(InputError, match="finite means"):
        Normalize((float("inf"),), (1.0,))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="smaller bound first"):
        Clip(2.0, 1.0)
    with pytest.raises(InputError, match="'v': unpack takes stored values, so it can only be the first step"):
        part(Clip(0.0, 1.0), Unpack(2.0))
    with pytest.raises(InputError, match="'v' has 3 channels, its normalize step 2 means"):
        part(Normalize((1.0, 2.0), (1.0,)))


def test_tensors_that_no_single_launch_could_make() -> None:
    with pytest.raises(InputError, match=r"'x' mixes stored dtypes .*'v': 'uint8', 'w': 'int16'"):
        Preprocess({"x": (part(Unpack()), Part("w", 1, "int16", (Unpack(),)))})
    with pytest.raises(InputError, match="'x' mixes raw and preprocessed"):
        Preprocess({"x": (part(Unpack()), Part("w", 1, "uint8"))})
    with pytest.raises(InputError, match="different names"):
        Preprocess({"x": (part(),), "y": (part(),)})
