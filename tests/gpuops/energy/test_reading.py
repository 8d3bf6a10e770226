"""Readings: null and why, never 0 or negative; sums over ranks count each GPU once."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.energy.meter import Meter
from gpuops.energy.reading import Reading, elect, sum_over_ranks
from gpuops.errors import InputError

GOOD = Reading(1_500, "nvml-counter", None, 100.0, "gpu-board", "exclusive", 0.0, 2.0, ("GPU-a",), 10)
LOST = replace(GOOD, energy_mj=None, bound_mj=None, reason="GPU-b: the GPU is lost", lost_s=2.0, gpus=("GPU-b",))
NONE = Reading(None, "none", "no NVIDIA driver", None, "none", "unknown", 0.0, 2.0, ())


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="an NVIDIA driver is here")
def test_no_library_is_null_with_the_reason_in_python_and_json() -> None:
    with Meter([0]) as meter:
        pass
    reading = meter.reading
    assert reading.joules is reading.energy_mj is reading.watts is None
    document = json.loads(json.dumps(reading.to_json()))
    assert document["joules"] is None
    assert document["reason"] == "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)"
    assert (document["method"], document["scope"], document["tenancy"]) == ("none", "none", "unknown")
    assert (document["resolution_ms"], document["gpus"], document["lost_s"]) == (None, [], 0.0)
    assert 0 < document["seconds"] < 60


def test_a_meter_that_metered_nothing_says_what_to_do() -> None:
    with pytest.raises(InputError, match="no window has ended"):
        _ = Meter([]).reading


@pytest.mark.parametrize(("energy_mj", "reason"), [(None, None), (5, "but why"), (-1, None)])
def test_a_reading_is_known_or_says_why(energy_mj: int | None, reason: str | None) -> None:
    with pytest.raises(InputError):
        replace(GOOD, energy_mj=energy_mj, reason=reason)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=8))
def test_the_sum_over_ranks_is_exact(energies_mj: list[int]) -> None:
    rows = [("host", replace(GOOD, energy_mj=mj, gpus=(f"GPU-{i}",))) for i, mj in enumerate(energies_mj)]
    total = sum_over_ranks(rows)
    assert total.energy_mj == sum(energies_mj)
    assert total.bound_mj == 10 * len(rows)
    assert total.gpus == tuple(f"GPU-{i}" for i in range(len(rows)))
    assert (total.method, total.scope, total.tenancy, total.reason) == ("nvml-counter", "gpu-board", "exclusive", None)


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
    unknown = replace(other, tenancy="unknown", bound_mj=None)
    total = sum_over_ranks([("node0", GOOD), ("node0", unknown)])
    assert (total.tenancy, total.bound_mj) == ("unknown", None)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(InputError, match="one row a rank"):
        sum_over_ranks([])


UUIDS = st.lists(st.sampled_from(["GPU-a", "GPU-b", "GPU-c"]), max_size=4)


@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), UUIDS), max_size=6))
def test_every_gpu_is_sampled_by_one_rank_of_its_host(rows: list[tuple[str, list[str]]]) -> None:
    shares = elect(rows)
    sampled = [(host, uuid) for (host, _), share in zip(rows, shares, strict=True) for uuid in share]
    assert len(sampled) == len(set(sampled))
    assert set(sampled) == {(host, uuid) for host, uuids in rows for uuid in uuids}
