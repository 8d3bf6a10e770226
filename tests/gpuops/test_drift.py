"""Sketches merge to the sketch of the whole; distances keep their laws and agree with direct computation."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuops.drift import Sketch, js, ks, psi
from gpuops.errors import InputError

numbers = st.floats(-20, 20, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, -5.0, 9.0, 1.5])
floats = hnp.arrays(np.float32, st.integers(0, 60), elements=numbers)
bytes_ = hnp.arrays(np.uint8, st.integers(1, 60))


def of(values: object) -> Sketch:
    return Sketch.of(values, -5.0, 9.0, missing=1.5)  # type: ignore[arg-type]


def exact(values: object, missing: int | None = None) -> Sketch:
    return Sketch.of(values, -0.5, 255.5, missing)  # type: ignore[arg-type]


@given(floats, floats, floats)
def test_merging_parts_is_sketching_the_whole(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    whole = of(np.concatenate([x, y, z]))
    assert of(x).merge(of(y)).merge(of(z)) == whole == of(x).merge(of(y).merge(of(z)))
    assert of(z).merge(of(x)) == of(x).merge(of(z))
    assert whole.total + whole.missing == x.size + y.size + z.size


@given(floats)
def test_bins_agree_with_numpy(x: np.ndarray) -> None:
    sketch = of(x)
    data = x[~np.isnan(x) & (x != 1.5)].astype(np.float64)
    inside = data[(data >= -5) & (data <= 9)]
    # The float64 edges of numpy and our multiplication may round a value on an edge to either side.
    slack = np.abs((inside + 5) / 14 * 256 - np.round((inside + 5) / 14 * 256)) < 1e-9
    want = np.histogram(inside, bins=256, range=(-5, 9))[0]
    assert np.abs(sketch.counts - want).sum() <= 2 * slack.sum()
    assert (sketch.below, sketch.above) == (np.sum(data < -5), np.sum(data > 9))
    assert sketch.missing == x.size - data.size


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=9)), st.integers(0, 255))
def test_uint8_is_exact(x: np.ndarray, missing: int) -> None:
    sketch = exact(x, missing)
    want = np.bincount(x.ravel(), minlength=256)
    assert sketch.missing == want[missing]
    want[missing] = 0
    np.testing.assert_array_equal(sketch.counts, want)
    assert sketch.below == sketch.above == 0


def test_edges_infinities_and_both_kinds_of_missing() -> None:
    sketch = Sketch.of([-0.1, 0.0, 1.0, 1.1, np.inf, -np.inf, np.nan, 0.5, -9.0], 0.0, 1.0, missing=-9.0)
    assert (sketch.below, sketch.above, sketch.missing) == (2, 2, 2)
    assert {i: int(n) for i, n in enumerate(sketch.counts) if n} == {0: 1, 128: 1, 255: 1}


def test_every_upper_edge_falls_in_the_last_bin() -> None:
    rng = np.random.default_rng(0)
    for lo, width in rng.normal(size=(2000, 2)) * [1e3, 1.0]:
        hi = lo + abs(width)
        assert Sketch.of([hi, np.nextafter(hi, -np.inf)], lo, hi).counts[-1] >= 1


def test_missing_is_compared_in_the_dtype_of_the_values() -> None:
    assert Sketch.of(np.array([0.1, 0.2], np.float32), 0, 1, missing=0.1).missing == 1
    assert exact(np.array([255, 0], np.uint8), missing=-1).missing == 0


def test_an_array_larger_than_a_block() -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 1 << 18), np.uint8)[:, ::2]
    np.testing.assert_array_equal(exact(x).counts, np.bincount(x.ravel(), minlength=256))


@given(bytes_, bytes_)
def test_laws_of_the_distances(x: np.ndarray, y: np.ndarray) -> None:
    a, b = exact(x), exact(y)
    for distance in (psi, js, ks):
        assert distance(a, a) == 0
        assert distance(a, b) == distance(b, a) >= 0
    assert js(a, b) <= 1
    assert ks(a, b) <= 1
    different = not np.allclose(a.counts / a.total, b.counts / b.total, atol=0)
    assert (js(a, b) > 0) == (ks(a, b) > 0) == different


@given(bytes_, bytes_)
def test_ks_is_the_statistic_of_the_values(x: np.ndarray, y: np.ndarray) -> None:
    at = np.concatenate([x, y])
    shares = [np.searchsorted(np.sort(v), at, side="right") / v.size for v in (x, y)]
    assert ks(exact(x), exact(y)) == pytest.approx(np.max(np.abs(shares[0] - shares[1])), abs=1e-12)


@given(bytes_, bytes_, bytes_)
def test_js_is_a_metric(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    a, b, c = exact(x), exact(y), exact(z)
    assert js(a, c) <= js(a, b) + js(b, c) + 1e-12


def test_distances_by_hand() -> None:
    halves, one = exact([0, 0, 255, 255]), exact([0, 0, 0, 0])
    assert ks(halves, one) == 0.5
    # KL to the middle (3/4, 1/4), in bits: of (1/2, 1/2) and of (1, 0).
    divergence = (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25) + np.log2(1 / 0.75)) / 2
    assert js(halves, one) == pytest.approx(np.sqrt(divergence))
    assert js(exact([0]), exact([255])) == 1
    n = 4 + 258 / 2  # half a count in each of 256 bins and the two outsides
    want = (2 / n) * np.log(4.5 / 2.5) + (2 / n) * np.log(2.5 / 0.5)
    assert psi(halves, one) == pytest.approx(want)


def test_values_outside_the_edges_count_as_drift() -> None:
    inside, outside = Sketch.of([0.5] * 100, 0, 1), Sketch.of([2.0] * 100, 0, 1)
    assert js(inside, outside) == ks(inside, outside) == 1
    assert psi(inside, outside) > 1
    assert js(outside, Sketch.of([-2.0] * 100, 0, 1)) == 1


def test_psi_without_drift_is_as_small_as_documented() -> None:
    rng = np.random.default_rng(1)
    n, m = 50_000, 80_000
    found = [psi(*(exact(rng.integers(0, 256, k)) for k in (n, m))) for _ in range(20)]
    assert np.mean(found) == pytest.approx(257 * (1 / n + 1 / m), rel=0.1)


@given(floats)
def test_json_round_trip(x: np.ndarray) -> None:
    assert Sketch.from_json(json.loads(json.dumps(of(x).to_json()))) == of(x)


def test_what_does_not_compare_is_refused() -> None:
    with pytest.raises(InputError, match="edges"):
        of([1]).merge(exact([1]))
    for distance in (psi, js, ks):
        with pytest.raises(InputError, match="edges"):
            distance(of([1]), exact([1]))
        with pytest.raises(InputError, match="no values"):
            distance(exact([1]), exact([3], missing=3))


@pytest.mark.parametrize(("lo", "hi"), [(1, 1), (2, 1), (np.nan, 1), (0, np.inf), (-1e308, 1e308), (0, 5e-324)])
def test_edges_that_bound_nothing_are_refused(lo: float, hi: float) -> None:
    with pytest.raises(InputError, match="edges"):
        Sketch.of([1.0], lo, hi)


@pytest.mark.parametrize("values", [["text"], [1j], [None]])
def test_values_without_order_are_refused(values: list[object]) -> None:
    with pytest.raises(InputError, match="no order"):
        exact(values)


def test_counts_are_checked_and_cannot_be_changed() -> None:
    counts = np.zeros(256, np.int64)
    sketch = Sketch(0, 1, counts)
    counts[0] = 9
    assert sketch.total == 0
    with pytest.raises(ValueError, match="read-only"):
        sketch.counts[0] = 1
    with pytest.raises(InputError, match="256"):
        Sketch(0, 1, np.zeros(255, np.int64))
    with pytest.raises(InputError, match="negative"):
        Sketch(0, 1, np.full(256, -1))
