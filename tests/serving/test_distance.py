"""How far answers lie apart: the same whether seen at once or pair by pair."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpuops_serving.distance import Distance, Distances

VALUES = st.one_of(st.floats(-1e4, 1e4, width=32), st.just(np.float32("nan")), st.just(np.float32("inf")))


def found(*pairs: tuple[object, object]) -> Distance:
    distances = Distances()
    for old, new in pairs:
        distances.see({"y": np.asarray(old)}, {"y": np.asarray(new)})
    return distances.found()["y"]


@settings(deadline=None)
@given(arrays(np.float32, (6, 3), elements=VALUES), arrays(np.float32, (6, 3), elements=VALUES), st.integers(1, 6))
def test_pairs_add_up_to_what_all_of_them_are_at_once(
    old: npt.NDArray[np.float32], new: npt.NDArray[np.float32], parts: int
) -> None:
    pairs = zip(np.array_split(old, parts), np.array_split(new, parts), strict=True)
    seen = found(*pairs)
    both = np.isfinite(old) & np.isfinite(new)
    difference = new[both].astype(np.float64) - old[both]
    assert seen.max_abs == pytest.approx(np.abs(difference).max(initial=0.0))
    assert seen.rmse == pytest.approx(np.sqrt(np.mean(difference**2)) if both.any() else 0.0)
    assert seen.lost == int((np.isfinite(old) & ~np.isfinite(new)).sum())
    spread = old[np.isfinite(old)].astype(np.float64).std() if np.isfinite(old).any() else 0.0
    if spread > 1e-3:
        assert seen.of_spread == pytest.approx(seen.rmse / spread, rel=1e-6)


def test_the_spread_of_answers_far_from_zero_does_not_cancel() -> None:
    old = 280.0 + np.linspace(-1e-4, 1e-4, 1001)
    assert found((old, old + 1e-4)).of_spread == pytest.approx(1e-4 / old.std(), rel=1e-3)


def test_equal_answers_are_no_distance_apart_and_constant_ones_have_no_spread() -> None:
    same = np.full((2, 3), 7.0, np.float32)
    assert found((same, same)) == Distance(0.0, 0.0, None, 0)
    nothing = np.full(3, np.nan, np.float32)
    assert found((nothing, nothing)) == Distance(0.0, 0.0, None, 0)


def test_answers_of_another_kind_are_named_and_never_close() -> None:
    old = np.zeros((1, 3), np.float32)
    assert found((old, np.zeros((1, 4), np.float32))).other == "float32 [1, 4] for float32 [1, 3]"
    assert found((old, old.astype(np.float64))).other == "float64 [1, 3] for float32 [1, 3]"
    distances = Distances()
    distances.see({"y": old}, {"z": old})
    assert distances.found()["y"].other == "missing"
    assert "z" not in distances.found()


def test_what_is_not_finite_can_be_written_as_json() -> None:
    text = np.array([b"a"], object)
    for old, new in ((text, np.array([b"b"], object)), (np.array([-1e308]), np.array([1e308]))):
        seen = found((old, new))
        assert (seen.max_abs, seen.rmse) == (None, None)
        json.dumps([seen.max_abs, seen.rmse, seen.of_spread], allow_nan=False)
    assert found((text, text)).max_abs == 0.0
    assert found((np.array([True, False]), np.array([True, True]))).max_abs == 1.0
