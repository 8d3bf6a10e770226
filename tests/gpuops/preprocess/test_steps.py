"""Declared steps: folded into one table they do what each of them says, one after the other, in float64."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.errors import InputError
from gpuops.preprocess.steps import Clip, Coefficients, Fill, Normalize, Part, Preprocess, Step, Unpack

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
    return values


def run(folded: Coefficients, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """What the op does with a table, in float64, on [n, channels]."""
    a, b, low, high, fill, absent = folded.table.astype(np.float64)
    value, flag = folded.missing
    missing = np.isnan(stored) | (stored == absent) if stored.dtype.kind == "f" else stored == value
    return np.where(missing & (flag != 0), fill, np.clip(stored * a + b, low, high))


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
    want, got = oracle(declared, stored), run(declared.fold(), stored)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg="missing data in other places")
    # The table is rounded to float32 once: terms that cancel keep the error of the larger.
    scales = [step.std for step in rest if isinstance(step, Normalize)]
    a, b = (np.abs(row).max() for row in declared.fold().table[:2])
    bounds = np.abs(declared.fold().table[2:5])
    size = a * 40 + b + bounds[np.isfinite(bounds)].max(initial=0) + 1
    np.testing.assert_allclose(got, want, rtol=0, atol=size * 2.0**-20, equal_nan=True, err_msg=str(scales))


@given(later)
def test_steps_without_an_unpack(rest: list[Step]) -> None:
    declared = part(*rest)
    stored = np.tile(np.arange(5, dtype=np.uint8)[:, None], (1, CHANNELS))
    assert not declared.fold().missing[1].any(), "no stored value is missing unless one is declared"
    table = declared.fold().table
    size = (np.abs(table[:2]).max() * 5) + np.abs(table[2:][np.isfinite(table[2:])]).max(initial=0) + 1
    np.testing.assert_allclose(run(declared.fold(), stored), oracle(declared, stored), rtol=0, atol=size * 2.0**-20)


def test_missing_is_filled_before_it_is_clipped() -> None:
    folded = part(Unpack(2.0, -10.0, 255), Fill(-5.0), Clip(0.0, 100.0), Normalize((10.0,), (2.0,))).fold()
    row = run(folded, np.array([[255] * 3, [0] * 3, [20] * 3, [200] * 3], np.uint8))[:, 0]
    assert row.tolist() == [-5.0, -5.0, 10.0, 45.0], "255 is no data: as a value it would have been clipped to 100"


def test_a_fill_after_the_clip_is_not_clipped_and_the_first_fill_counts() -> None:
    stored = np.array([[255] * 3], np.uint8)
    assert run(part(Unpack(missing=255), Clip(0.0, 1.0), Fill(7.0)).fold(), stored)[0, 0] == 7
    assert run(part(Unpack(missing=255), Fill(3.0), Fill(7.0)).fold(), stored)[0, 0] == 3


def test_missing_data_without_a_fill_is_nan() -> None:
    for dtype, value in (("uint8", 255), ("float32", np.nan)):
        steps = (Unpack(missing=255 if dtype == "uint8" else None), Clip(0.0, 1.0), Normalize((0.5,), (0.5,)))
        assert np.isnan(run(part(*steps, dtype=dtype).fold(), np.full((1, 3), value, dtype))).all()


def test_a_float32_fill_value_is_missing_as_nan_is() -> None:
    folded = part(Unpack(missing=9.96921e36), Fill(4.0), dtype="float32").fold()
    row = np.array([[9.96921e36] * 3, [np.nan] * 3, [9.96922e36] * 3], np.float32)
    assert run(folded, row)[:, 0].tolist() == [4.0, 4.0, np.float32(9.96922e36)]


def test_float32_nan_is_always_missing() -> None:
    folded = part(Fill(4.0), dtype="float32").fold()
    assert folded.missing[1].all()
    assert run(folded, np.full((1, 3), np.nan, np.float32)).tolist() == [[4.0] * 3]


def test_each_channel_has_its_own_statistics() -> None:
    folded = part(Normalize((0.0, 10.0, 20.0), (1.0, 2.0, 4.0))).fold()
    assert run(folded, np.full((1, 3), 20, np.uint8)).tolist() == [[20.0, 5.0, 0.0]]
    assert folded.table.shape == (6, 3)
    assert folded.table.dtype == np.float32
    assert folded.missing.shape == (2, 3)
    assert folded.missing.dtype == np.int32


def test_a_table_is_rounded_once() -> None:
    # 0.1 / 0.3 rounded from float64; float32 arithmetic gives its neighbour.
    folded = part(Unpack(0.1, 0.7), Normalize((0.3,), (0.3,))).fold()
    assert folded.table[0, 0] == np.float32(0.1 / 0.3)
    assert folded.table[1, 0] == np.float32((0.7 - 0.3) / 0.3)


def test_tensors_join_their_parts() -> None:
    whole = Preprocess({"x": (part(Unpack(2.0), channels=2), part(Unpack(3.0, missing=9), channels=1, name="w"))})
    folded = whole.fold("x")
    assert folded is not None
    assert folded.table[0].tolist() == [2, 2, 3]
    assert folded.missing.tolist() == [[0, 0, 9], [0, 0, 1]]
    assert Preprocess({"x": (part(),)}).fold("x") is None, "raw values pass through unchanged"


# the inverse


@settings(max_examples=100, deadline=None)
@given(unpack, st.lists(st.builds(Normalize, per_channel(finite), per_channel(positive)), max_size=3))
def test_the_inverse_gives_physical_values_back(first: Unpack, rest: list[Normalize]) -> None:
    declared = part(Unpack(first.scale, first.offset), *rest)
    stored = np.tile(np.arange(0, 200, 9)[:, None], (1, CHANNELS)).astype(np.uint8)
    scale, offset = Preprocess({"y": (declared,)}).inverse("y")
    physical = stored * first.scale + first.offset
    size = np.abs(physical).max() + np.abs(offset).max() + 1
    np.testing.assert_allclose(oracle(declared, stored) * scale + offset, physical, rtol=1e-9, atol=size * 1e-9)


def test_the_inverse_of_several_parts() -> None:
    parts = (part(Normalize((1.0,), (2.0,)), channels=2), part(Normalize((5.0,), (3.0,)), channels=1, name="w"))
    scale, offset = Preprocess({"y": parts}).inverse("y")
    assert scale.tolist() == [2, 2, 3]
    assert offset.tolist() == [1, 1, 5]


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
    document["x"][0]["steps"][1] = {"step": "log", "base": 10}
    with pytest.raises(InputError, match="unknown step 'log'; this gpuops knows unpack, fill, clip, normalize"):
        Preprocess.from_json(document)
    document["x"][0]["steps"][1] = {"step": "fill", "value": 1.0, "where": "sea"}
    with pytest.raises(InputError, match="step 'fill' has where"):
        Preprocess.from_json(document)


def test_explain() -> None:
    text = WHOLE.explain({"x": (4, 120, 120), "month": (1,)}, out_bytes=2)
    assert text.splitlines() == [
        "x: 1 launch, 57,600 B read, 115,200 B written",
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
