"""Packing by tolerance: the error is never above it, and what cannot be held is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from series_room import independent, series

import gpuops as go
from gpuops.data.writing.packing import Pack, apply, choose
from gpuops.data.writing.quality import Rules
from gpuops.data.writing.recipe import VariableRecipe
from gpuops.errors import InputError, QualityError

numbers = st.floats(-1e6, 1e6)


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.floats(1e-4, 1e3), st.sampled_from([None, "int8", "uint16"]))
def test_the_error_stays_within_the_tolerance(values: list[float], tolerance: float, dtype: str | None) -> None:
    data = np.array([[*values, np.nan]])
    try:
        packing = choose("a", Pack(tolerance, dtype=dtype), min(values), max(values))
    except InputError:
        if max(values) - min(values) <= tolerance:
            return
        info = np.iinfo(dtype or "int32")
        assert (max(values) - min(values)) / (2 * tolerance) > 0.99 * (info.max - info.min) - 2
        return
    stored, error, broken = apply("a", data, 0, packing)
    assert not broken
    assert stored[0, -1] == packing.missing
    assert (stored[0, :-1] != packing.missing).all(), "data took the value that means no data"
    unpacked = stored[0, :-1] * packing.scale + packing.offset
    assert np.abs(unpacked - values).max() <= tolerance
    assert error == np.abs(unpacked - values).max()


def test_the_smallest_dtype_that_fits() -> None:
    for high, dtype in ((100, "uint8"), (254 * 1.99, "uint8"), (600, "int16"), (65000 * 1.99, "int16"), (2e5, "int32")):
        assert choose("a", Pack(1.0), 0.0, high).dtype == dtype
    with pytest.raises(InputError, match=r"a: 0 to 1e\+06 within 1 needs 500,252 steps, more than int8 has"):
        choose("a", Pack(1.0, dtype="int8"), 0.0, 1e6)
    with pytest.raises(InputError, match=r"raise the tolerance"):
        choose("a", Pack(1e-12), 0.0, 1e6)


def test_a_tolerance_as_large_as_the_range_is_refused() -> None:
    with pytest.raises(InputError, match="a: 2 to 5 within 3 would all be one number"):
        choose("a", Pack(3.0), 2.0, 5.0)
    assert choose("a", Pack(2.9), 2.0, 5.0).dtype == "uint8"
    assert choose("a", Pack(3.0), 5.0, 5.0).dtype == "uint8", "a constant is what it is"


@pytest.mark.parametrize("pack", [{"tolerance": 0.0}, {"tolerance": np.nan}, {"tolerance": 1, "dtype": "float16"}])
def test_packs_that_make_no_sense(pack: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Pack(**pack)  # type: ignore[arg-type]


def test_packed_floats_read_back_within_the_tolerance(tmp_path: Path) -> None:
    source = go.ingest(series(), url=tmp_path / "s", tolerance=0.01)
    report = source.group[".gpuops/quality"].attrs["variables"]
    stored = independent(tmp_path / "s")
    for name in ("temperature", "rain"):
        assert source.variable(name).array.dtype == np.int16
        np.testing.assert_array_equal(np.isnan(stored[name]), np.isnan(series()[name]))
        difference = float(np.abs(stored[name].astype("f8") - series()[name]).max())
        assert 0.009 < difference < 0.01 + 1e-4, "xarray unpacks in float32"
        measured = report[name]["pack"]["max_abs_error"]  # type: ignore[index,call-overload]
        assert measured <= 0.01
        assert measured == pytest.approx(difference, abs=1e-4)
    rows = np.asarray(source.meta("stats", "rain")[:])  # type: ignore[index]
    assert rows[..., 0].sum() == np.isfinite(series()["rain"]).sum()


def test_a_value_outside_the_declared_range_is_named(tmp_path: Path) -> None:
    data = series()
    data["temperature"][21, 3, 2] = 2000.0
    recipe = {"temperature": VariableRecipe(data["temperature"], pack=Pack(0.01, 200.0, 350.0))}
    with pytest.raises(QualityError, match=r"temperature\[21, 3, 2\] = 2000 breaks 'pack within 0.01 \(int16 holds"):
        go.ingest(recipe, url=tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_range_that_no_integer_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"temperature: .* within 1e-12 needs .* steps, more than int32 has"):
        go.ingest(series(), url=tmp_path / "s", tolerance=1e-12)
    empty = {"a": np.full((4, 3), np.nan, np.float32)}
    with pytest.raises(InputError, match="a holds no data, so no packing can be chosen"):
        go.ingest(empty, url=tmp_path / "s", tolerance=1)
    assert not list(tmp_path.iterdir())


def test_the_rules_bounds_are_the_range(tmp_path: Path) -> None:
    rules = Rules(valid_min=200.0, valid_max=350.0)
    recipe = {"temperature": VariableRecipe(series()["temperature"], pack=Pack(0.5), quality=rules)}
    array = go.ingest(recipe, url=tmp_path / "s").variable("temperature")
    assert array.array.dtype == np.uint8
    assert array.offset <= 200.0
    assert array.offset + 254 * array.scale >= 350.0
