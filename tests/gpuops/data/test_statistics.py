"""Statistics against NumPy, in one piece and merged in any grouping; by channel in the order of the channels."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.data.runs import Runs
from gpuops.data.sample import Field, SampleSpec, Window, bind
from gpuops.data.source import Source, open
from gpuops.data.statistics import SURVEYED, channels_of, describe, mean_std, merge, summary
from gpuops.errors import InputError


def numpy_row(physical: npt.NDArray[np.float64]) -> list[float]:
    """Statistics of the values that are not NaN."""
    values = physical[~np.isnan(physical)]
    if not values.size:
        return [0, 0, 0, np.nan, np.nan]
    return [values.size, values.mean(), ((values - values.mean()) ** 2).sum(), values.min(), values.max()]


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def physical(stored: npt.NDArray[Any], scale: float, offset: float, missing: int | None) -> npt.NDArray[np.float64]:
    values = stored.astype(np.float64) * scale + offset
    return values if missing is None else np.where(stored == missing, np.nan, values)


# describe


@pytest.mark.parametrize("scale", [0.05, -3.0])
@pytest.mark.parametrize("shape", [(4,), (4, 9), (4, 5, 6), (4, 3, 5, 6), (4, 3, 2, 5, 6)])
def test_describe_is_numpy_by_record_and_channel(shape: tuple[int, ...], scale: float) -> None:
    stored = np.random.default_rng(0).integers(0, 8, shape).astype(np.uint8)
    rows = describe(stored, scale, 10.0, 3)
    channels = shape[1] if len(shape) > 3 else 1
    assert rows.shape == (4, channels, 5)
    assert channels == channels_of(shape[1:])
    values = physical(stored, scale, 10.0, 3).reshape(4, channels, -1)
    for record in range(4):
        for channel in range(channels):
            close(rows[record, channel], numpy_row(values[record, channel]))
    assert np.all((rows[..., 3] <= rows[..., 4]) | (rows[..., 0] == 0)), "a negative scale must not swap the bounds"


def test_floats_leave_nan_out() -> None:
    stored = np.random.default_rng(0).normal(5, 2, (3, 6, 7)).astype(np.float32)
    stored[stored > 6] = np.nan
    stored[2] = np.nan
    rows = describe(stored, 2.0, 1.0, None)
    for record in range(3):
        close(rows[record, 0], numpy_row(physical(stored[record], 2.0, 1.0, None)))
    assert rows[2, 0, :3].tolist() == [0, 0, 0]
    assert np.isnan(rows[2, 0, 3:]).all()


def test_a_small_spread_on_a_large_offset_is_not_lost() -> None:
    stored = np.array([[10**9, 10**9 + 1, 10**9 + 2]], np.int32)
    close(describe(stored, 1.0, 0.0, None)[0, 0, 2], 2.0)


# merge

blocks = st.lists(st.lists(st.integers(-50, 50), max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(blocks, st.sampled_from([1.0, -0.25]))
def test_merged_parts_are_the_whole(parts: list[list[int]], scale: float) -> None:
    rows = np.stack([describe(np.array([[*part, 99]], np.int16), scale, 3.0, 99)[0, 0] for part in parts])
    whole = np.array([[v for part in parts for v in part] + [99]], np.int16)
    close(merge(rows), describe(whole, scale, 3.0, 99)[0, 0])
    for cut in range(1, len(rows)):
        close(merge(np.stack([merge(rows[:cut]), merge(rows[cut:])])), merge(rows))
    close(merge(rows[::-1]), merge(rows))


def test_rows_without_data_do_not_count() -> None:
    empty = describe(np.full((2, 3), 9, np.uint8), 1.0, 0.0, 9)[:, 0]
    full = describe(np.array([[1, 2, 3]], np.uint8), 1.0, 0.0, 9)[:, 0]
    close(merge(np.concatenate([empty, full])), full[0])
    nothing = merge(empty)
    assert nothing[0] == 0
    assert np.isnan(nothing[3:]).all()


def test_infinities_are_left_to_the_quality_rules() -> None:
    rows = describe(np.array([[1.0, np.inf]], np.float32), 1.0, 0.0, None)
    assert rows[0, 0, 0] == 2


# mean_std of a field


def source_of(path: Path, **arrays: tuple[npt.NDArray[Any], str]) -> Source:
    root = zarr.open_group(path, mode="w")
    for name, (values, dims) in arrays.items():
        root.create_array(name, data=values, dimension_names=dims.split())
    return open(path)


def field_statistics(source: Source, field: Field, window: Window | None, records: Any) -> tuple[Any, Any]:
    (cut,) = bind(SampleSpec({"x": [field]}, {}, window), source).inputs["x"]
    return mean_std(source, cut, runs(records))


def runs(records: Any) -> Runs:
    return Runs.of(np.asarray(records), np.asarray(records) + 1)


def test_one_pair_a_channel_in_channel_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    volume = generator.normal(np.arange(6).reshape(1, 3, 2, 1, 1) // 2 * 100.0, 1, (8, 3, 2, 4, 5)).astype(np.float32)
    image = volume[:, :, 0]
    source = source_of(tmp_path / "z", volume=(volume, "t a b y x"), image=(image, "t c y x"))
    records = [0, 2, 5]
    mean, std = field_statistics(source, Field("image"), None, records)
    close(mean, image[records].mean((0, 2, 3), dtype=np.float64))
    close(std, image[records].std((0, 2, 3), dtype=np.float64))
    mean, _ = field_statistics(source, Field("image", at=(0, 1)), Window("t", 2), records)
    close(mean, np.tile(image[records].mean((0, 2, 3), dtype=np.float64), 2))
    mean, _ = field_statistics(source, Field("volume"), None, records)
    # Statistics are kept by the first axis of a record: a channel is (a, b), so each of them is repeated for every b.
    close(mean, np.repeat(volume[records].mean((0, 2, 3, 4), dtype=np.float64), 2))


def test_a_window_inside_records_has_one_pair_for_all_its_steps(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (8, 12, 4, 5)).astype(np.uint8)
    source = source_of(tmp_path / "z", a=(values, "tile month y x"))
    mean, std = field_statistics(source, Field("a", at=(0, 1, 2)), Window("month", 3, cyclic=True), range(8))
    close(mean, [values.mean()])
    close(std, [values.std()])


def test_recorded_statistics_of_chosen_records_alone(store: Source, atlas: Any) -> None:
    records = [1, 7, 20]
    mean, std = field_statistics(store, Field("altitude"), None, records)
    heights = physical(atlas.heights[records], 28.0, -450.0, 255)
    close(mean, [np.nanmean(heights)])
    close(std, [np.nanstd(heights)])


def test_recorded_statistics_are_merged_block_by_block(
    store: Source, atlas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuops.data.statistics.BLOCK_ROWS", 5)
    test_recorded_statistics_of_chosen_records_alone(store, atlas)
    (cut,) = bind(SampleSpec({"x": [Field("altitude")]}, {}), store).inputs["x"]
    _, seen = summary(store, cut, runs([1, 7, 20]), 1)
    assert seen == 3


def test_a_foreign_store_is_surveyed_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(100, dtype=np.int16)[:, None, None] * np.ones((1, 2, 2), np.int16)
    source = source_of(tmp_path / "z", a=(values, "t y x"))
    assert SURVEYED >= 100
    close(field_statistics(source, Field("a"), None, range(100))[0], [49.5])
    monkeypatch.setattr("gpuops.data.statistics.SURVEYED", 3)
    close(field_statistics(source, Field("a"), None, range(100))[0], [(0 + 49 + 99) / 3])


def test_a_variable_without_data_in_the_split_is_refused(tmp_path: Path) -> None:
    values = np.full((4, 2, 2), np.nan, np.float32)
    values[3] = 1
    source = source_of(tmp_path / "z", a=(values, "t y x"))
    with pytest.raises(InputError, match="'a' holds no data in the training split"):
        field_statistics(source, Field("a"), None, [0, 1])
