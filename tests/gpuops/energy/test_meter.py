"""Readings: null and why, never 0 or negative; sums over ranks count each GPU once."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.energy import meter as meter_module
from gpuops.energy.meter import Meter, Reading, sum_over_ranks
from gpuops.energy.sensor import Count, NoSensor, open_sensor
from gpuops.errors import InputError

GOOD = Reading(1_500, "nvml-counter", None, 100.0, "gpu-board", "exclusive", 0.0, 2.0, ("GPU-a",))
LOST = replace(GOOD, energy_mj=None, reason="GPU-b: the GPU is lost", lost_s=2.0, gpus=("GPU-b",))
NONE = Reading(None, "none", "no NVIDIA driver", None, "none", "unknown", 0.0, 2.0, ())

needs_no_driver = pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="an NVIDIA driver is here")


@needs_no_driver
def test_no_library_is_null_with_the_reason_in_python_and_json() -> None:
    with Meter() as meter:
        pass
    reading = meter.reading
    assert reading.joules is None
    assert reading.energy_mj is None
    document = json.loads(json.dumps(reading.to_json()))
    assert document["joules"] is None
    assert document["reason"] == "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)"
    assert (document["method"], document["scope"], document["tenancy"]) == ("none", "none", "unknown")
    assert (document["resolution_ms"], document["gpus"], document["lost_s"]) == (None, [], 0.0)
    assert 0 < document["seconds"] < 60


@needs_no_driver
def test_no_library_devices_are_not_an_error() -> None:
    assert open_sensor([0]).read() == {}


class Scripted:
    """A sensor that answers one state after the other."""

    method, scope, resolution_ms, reason = "nvml-counter", "gpu-board", 100.0, None

    def __init__(self, *energies_mj: int) -> None:
        self._next: Iterator[int] = iter(energies_mj)

    def read(self) -> dict[str, Count]:
        return {"GPU-a": Count(next(self._next))}

    def tenancy(self) -> str:
        return "exclusive"


def scripted(monkeypatch: pytest.MonkeyPatch, sensor: Any) -> Meter:
    monkeypatch.setattr(meter_module, "open_sensor", lambda devices: sensor)
    return Meter()


def test_windows_follow_each_other_and_each_has_its_own_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = scripted(monkeypatch, Scripted(100, 350, 350, 351))
    meter.begin()
    assert meter.end().energy_mj == 250
    meter.begin()
    assert meter.end().energy_mj == 1
    assert meter.reading.joules == 0.001


def test_a_window_left_open_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = scripted(monkeypatch, Scripted(100, 300, 350))
    meter.begin()
    meter.begin()
    assert meter.end().energy_mj == 50


def test_a_window_is_metered_even_if_its_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = scripted(monkeypatch, Scripted(100, 350))

    def work() -> None:
        with meter:
            raise KeyError("work")

    with pytest.raises(KeyError):
        work()
    assert meter.reading.energy_mj == 250


def test_misuse_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = scripted(monkeypatch, NoSensor("nothing here"))
    with pytest.raises(InputError, match="begin"):
        meter.end()
    with pytest.raises(InputError, match="no window has ended"):
        _ = meter.reading
    meter.begin()
    meter.end()
    with pytest.raises(InputError, match="begin"):
        meter.end()


@pytest.mark.parametrize(("energy_mj", "reason"), [(None, None), (5, "but why"), (-1, None)])
def test_a_reading_is_known_or_says_why(energy_mj: int | None, reason: str | None) -> None:
    with pytest.raises(InputError):
        replace(GOOD, energy_mj=energy_mj, reason=reason)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=8))
def test_the_sum_over_ranks_is_exact(energies_mj: list[int]) -> None:
    rows = [("host", replace(GOOD, energy_mj=mj, gpus=(f"GPU-{i}",))) for i, mj in enumerate(energies_mj)]
    total = sum_over_ranks(rows)
    assert total.energy_mj == sum(energies_mj)
    assert total.gpus == tuple(f"GPU-{i}" for i in range(len(rows)))
    assert (total.method, total.scope, total.tenancy, total.reason) == (
        "nvml-counter",
        "gpu-board",
        "exclusive",
        None,
    )


@pytest.mark.parametrize("other", [LOST, NONE])
@pytest.mark.parametrize("turn", [1, -1])
def test_one_null_rank_makes_the_sum_null_and_keeps_its_reason(other: Reading, turn: int) -> None:
    total = sum_over_ranks([("one", GOOD), ("two", other)][::turn])
    assert total.joules is None
    assert total.reason == f"two: {other.reason}"
    assert total.lost_s == other.lost_s


def test_counting_a_gpu_twice_is_refused() -> None:
    every = replace(GOOD, gpus=("GPU-a", "GPU-b"))
    with pytest.raises(InputError, match="GPU-a on node0 is counted by two ranks"):
        sum_over_ranks([("node0", every), ("node0", every)])
    assert sum_over_ranks([("node0", GOOD), ("node1", GOOD)]).energy_mj == 3_000


def test_the_sum_takes_the_longest_window_and_the_coarsest_counter() -> None:
    other = replace(GOOD, gpus=("GPU-b",), resolution_ms=20.0, seconds=3.0, tenancy="shared")
    total = sum_over_ranks([("node0", GOOD), ("node0", other)])
    assert (total.seconds, total.resolution_ms, total.tenancy) == (3.0, 100.0, "shared")
    unknown = replace(other, tenancy="unknown")
    assert sum_over_ranks([("node0", GOOD), ("node0", unknown)]).tenancy == "unknown"


def test_no_rows_is_an_error() -> None:
    with pytest.raises(InputError, match="one row a rank"):
        sum_over_ranks([])
