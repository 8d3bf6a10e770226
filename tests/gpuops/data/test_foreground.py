"""Foreground by patch: what is drawn contains foreground in its own patch, told from a plain look at the mask."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.data.foreground import foreground
from gpuops.data.patches import Patch
from gpuops.data.sample import Field, SampleSpec, Window, bind
from gpuops.data.source import Source, Variable, open
from gpuops.errors import InputError


def write(folder: Path, **arrays: tuple[npt.NDArray[Any], tuple[str, ...]]) -> Source:
    root = zarr.open_group(folder, mode="w")
    for name, (values, dims) in arrays.items():
        root.create_array(name, data=values, chunks=(1, *values.shape[1:]), dimension_names=dims)
    return open(folder)


@st.composite
def masks(draw: st.DrawFn) -> tuple[npt.NDArray[np.uint8], dict[str, int], dict[str, int], list[str]]:
    """A sparse mask [records, z, y, x], patch sizes and strides, and the order in which dimensions are declared."""
    shape = draw(st.tuples(st.integers(1, 4), *(st.integers(1, 9),) * 3))
    mask = np.zeros(shape, np.uint8)
    for _ in range(draw(st.integers(0, 4))):
        mask[tuple(draw(st.integers(0, n - 1)) for n in shape)] = draw(st.integers(1, 3))
    dims = draw(st.permutations(["z", "y", "x"]))
    sizes = {dim: draw(st.integers(1, shape[1 + "zyx".index(dim)])) for dim in dims}
    strides = {dim: draw(st.integers(1, size)) for dim, size in sizes.items()}
    return mask, sizes, strides, dims


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(0, 2))
def test_a_patch_with_foreground_is_found(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[npt.NDArray[np.uint8], dict[str, int], dict[str, int], list[str]],
    above: int,
) -> None:
    mask, sizes, strides, dims = drawn
    source = write(tmp_path_factory.mktemp("mask"), mask=(mask, ("record", "z", "y", "x")))
    patch = Patch({dim: sizes[dim] for dim in dims}, stride=strides)
    bound = bind(SampleSpec({"mask": [Field("mask")]}, {}, patch=patch), source)
    ids = np.arange(bound.records * bound.patches)[::-1].copy()
    found = foreground(source, bound, "mask", above, 0)(ids)
    assert bound.grid is not None
    for sample, seen in zip(ids.tolist(), found.tolist(), strict=True):
        record, number = divmod(sample, bound.patches)
        first = dict(zip(dims, bound.grid.origins(np.array([number]))[0].tolist(), strict=True))
        part = mask[(record, *(slice(first[dim], first[dim] + sizes[dim]) for dim in "zyx"))]
        assert seen == bool((part > above).any())


def test_physical_values_decide_and_missing_data_is_none(tmp_path: Path) -> None:
    rain = np.array([[[0, 9], [99, 5]]], np.int16)
    write(tmp_path, rain=(rain, ("record", "y", "x")))
    zarr.open_group(tmp_path, mode="a")["rain"].attrs.update(scale_factor=0.1, add_offset=1.0, _FillValue=99)
    source = open(tmp_path)
    bound = bind(SampleSpec({"rain": [Field("rain")]}, {}, patch=Patch({"y": 1, "x": 1})), source)
    assert foreground(source, bound, "rain", 1.4, 0)(np.arange(4)).tolist() == [False, True, False, True]


def test_windows_look_at_their_step_and_masks_without_the_dimensions_at_the_record(tmp_path: Path) -> None:
    mask = np.zeros((4, 2, 4), np.uint8)
    mask[2, 1, 3] = 1
    flags = np.array([0, 1, 0, 0], np.uint8)
    source = write(tmp_path, mask=(mask, ("time", "y", "x")), flags=(flags, ("time",)))
    spec = SampleSpec({"mask": [Field("mask", at=(0, 1))]}, {}, Window("time", 2), Patch({"y": 2, "x": 2}))
    bound = bind(spec, source)
    ids = bound.samples(np.arange(4))
    assert np.flatnonzero(foreground(source, bound, "mask", 0, 1)(ids)).tolist() == [3]  # window 1, right patch
    assert np.flatnonzero(foreground(source, bound, "flags", 0, 0)(ids)).tolist() == [2, 3]


def test_recorded_statistics_save_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((5, 4, 4), np.uint8)
    mask[3, 0, 0] = 1
    source = write(tmp_path, mask=(mask, ("record", "y", "x")))
    rows = np.zeros((5, 1, 5))
    rows[3, 0, 4] = 1
    recorded = zarr.create_array({}, data=rows)
    monkeypatch.setattr(Source, "meta", lambda *_: recorded)
    read: list[int] = []
    plain = Variable.read

    def counted(self: Variable, first: int = 0, stop: int | None = None) -> Any:
        read.append(first)
        return plain(self, first, stop)

    monkeypatch.setattr(Variable, "read", counted)
    bound = bind(SampleSpec({"mask": [Field("mask")]}, {}, patch=Patch({"y": 2, "x": 2})), source)
    assert np.flatnonzero(foreground(source, bound, "mask", 0, 0)(np.arange(20))).tolist() == [12]
    assert read == [3]


def test_masks_on_another_grid_are_refused(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        image=(np.zeros((2, 4, 4), np.uint8), ("record", "y", "x")),
        coarse=(np.zeros((2, 2, 2), np.uint8), ("record", "y", "x")),
        other=(np.zeros((3, 4, 4), np.uint8), ("more", "y", "x")),
    )
    bound = bind(SampleSpec({"image": [Field("image")]}, {}, patch=Patch({"y": 2, "x": 2})), source)
    with pytest.raises(InputError, match="2 points along 'y', patches have 4"):
        foreground(source, bound, "coarse", 0, 0)
    with pytest.raises(InputError, match="3 records, samples have 2"):
        foreground(source, bound, "other", 0, 0)
