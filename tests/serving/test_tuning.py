"""Instances, threads and batch sizes are what a measured curve says, and the curve is measured on the real graph."""

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import SIGNATURE, make_bundle

from gpuops.bundle import read_bundle
from gpuops.errors import InputError, UnavailableError
from gpuops_serving import tuning as room
from gpuops_serving.config import Options
from gpuops_serving.scheduling import Batching
from gpuops_serving.tuning import NEAR, Tuning, choose, tune

RATE = st.floats(1.0, 1e6)
CURVE = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32]), RATE, min_size=1)
CURVES = st.dictionaries(st.sampled_from(["1x8", "2x4", "4x2", "8x1"]), CURVE, min_size=1)


@given(CURVES)
def test_the_choice_is_near_the_best_and_no_smaller_one_is(rates: dict[str, dict[int, float]]) -> None:
    made = choose(rates)
    best = max(rate for row in rates.values() for rate in row.values())
    row = rates[f"{made.instances}x{made.threads}"]
    assert max(row.values()) >= NEAR * best
    assert row[made.best_batch] >= NEAR * max(row.values())
    for name, other in rates.items():
        if int(name.split("x")[0]) < made.instances:
            assert max(other.values()) < NEAR * best
    for size, rate in row.items():
        if size > made.best_batch:
            assert rate < NEAR * max(row.values())


@pytest.mark.parametrize(
    ("backend", "best_batch", "micro_batch", "limit"),
    [("python", 4, 4, ()), ("python", 8, 0, ()), ("onnxruntime", 4, 0, (4,)), ("onnxruntime", 8, 0, ())],
)
def test_batches_that_get_slower_are_divided_by_the_shim_and_limited_where_there_is_none(
    backend: str, best_batch: int, micro_batch: int, limit: tuple[int, ...]
) -> None:
    batching = Batching((2,), 300, 7, 9, priorities=2, default_priority=1)
    options = Options(backend, batching=batching, tags={"a": "b"}, micro_batch=1 if backend == "python" else 0)
    made = Tuning(2, 3, best_batch, {}).apply(options, 8)
    assert (made.instances, made.threads, made.micro_batch, made.tags) == (2, 3, micro_batch, {"a": "b"})
    assert made.batching == replace(batching, preferred=limit)


def test_a_bundle_is_measured_at_every_batch_size_and_division_of_the_cores(tmp_path: Path) -> None:
    said: list[str] = []
    bundle = read_bundle(make_bundle(tmp_path / "bundle"))
    made = tune(bundle, cores=2, say=said.append)
    assert {name: sorted(row) for name, row in made.rates.items()} == {"1x2": [1, 2, 4, 5], "2x1": [1, 2, 4, 5]}
    assert all(rate > 0 for row in made.rates.values() for rate in row.values())
    assert made == choose(made.rates)
    divisions = ("1 instances of 2 threads", "2 instances of 1 threads")
    assert said == [f"measuring {division} at batches 1, 2, 4, 5" for division in divisions]
    assert json.loads(json.dumps(made.to_json()))["rates"]["1x2"].keys() == {"1", "2", "4", "5"}


def test_every_division_of_many_cores_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_rate", lambda runners, batch, size: float(len(runners)))
    made = tune(read_bundle(make_bundle(tmp_path / "bundle")), cores=6)
    assert list(made.rates) == ["1x6", "2x3", "4x1", "6x1"]
    assert (made.instances, made.threads, made.best_batch) == (6, 1, SIGNATURE.max_batch)


def test_the_runners_run_at_the_same_time_and_are_counted_together() -> None:
    together = threading.Barrier(3, timeout=30)
    counts = [0, 0, 0]

    def runner(place: int) -> Callable[[object], None]:
        def run(inputs: object) -> None:
            if counts[place] == 1:  # the first run that is counted
                together.wait()
            counts[place] += 1
            pause.wait(0.01)

        return run

    pause = threading.Event()
    rate = room._rate([runner(place) for place in range(3)], {}, 2)
    counted = sum(counts) - 3  # each one's first allocates
    assert 0 < rate <= counted * 2 / room._CELL_S
    assert rate <= 3 * 2 / 0.01  # none is faster than its pause


def test_a_graph_that_fails_is_told_rather_than_waited_for() -> None:
    def fails(inputs: object) -> None:
        raise ArithmeticError("no such value")

    with pytest.raises(ArithmeticError, match="no such value"):
        room._rate([lambda inputs: None, fails, lambda inputs: None], {}, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(gpu=True), "on a GPU cannot be measured here"),
        (Options("python-pt2"), "by backend python-pt2 cannot be measured"),
        (Options("tensorrt"), "by backend tensorrt cannot be measured"),
    ],
)
def test_what_onnxruntime_would_not_run_is_not_measured_with_it(tmp_path: Path, options: Options, says: str) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "bundle"))
    with pytest.raises(InputError, match=says):
        tune(bundle, options=options)
    with pytest.raises(InputError, match=says):
        Tuning(1, 1, 1, {}).apply(options, SIGNATURE.max_batch)


def test_int8_is_measured_by_its_own_file(tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "bundle"))
    with pytest.raises(InputError, match="--formats int8"):
        tune(bundle, options=Options("python-int8"), cores=1)


def test_without_onnxruntime_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "bundle"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"gpuops\[onnx\]"):
        tune(bundle, cores=1)
