"""The meter over the real nvidia-ml-py and a scripted libnvidia-ml.so.1 (fake_nvml.c), whose truth is known."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from tests.gpuops.energy.conftest import Play

NOT_SUPPORTED, NO_PERMISSION, NOT_LOADED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 3, 4, 9, 13, 15, 999
COUNTER, INSTANT, MEAN = (
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetPowerUsage",
)


def gpu(name: str = "a", milliwatt: int = 100_000, *, model: str = "H100", index: int = 0, **options: Any) -> str:
    words = " ".join(f"{key}={value}" for key, value in ({"pids": "SELF"} | options).items())
    return f"gpu GPU-{name} {model} {words}\npower {index} 0 {milliwatt} 50 1000\n"


def test_a_window_is_what_the_counter_rose_by(play: Play) -> None:
    # Beyond float64's integers: 2**53 mJ and a few.
    (reading,) = play(gpu("a", energy_mj=2**53 + 1) + gpu("b", 7_000, index=1), (2.0, 12.0))
    assert reading["joules"] == 1070.0
    assert {key: reading[key] for key in ("method", "reason", "scope", "tenancy", "lost_s", "seconds", "gpus")} == {
        "method": "nvml-counter",
        "reason": None,
        "scope": "gpu-board",
        "tenancy": "exclusive",
        "lost_s": 0.0,
        "seconds": 10.0,
        "gpus": ["GPU-a", "GPU-b"],
    }
    assert reading["by_gpu"]["GPU-b"]["joules"] == 70.0


def test_usage_is_what_the_board_said(play: Play) -> None:
    (reading,) = play(gpu("a", 300_000), (2.0, 6.0))
    assert reading["usage"]["GPU-a"] == {
        "mean_power_w": pytest.approx(300, rel=1e-3),
        "peak_power_w": 300.0,
        "busy_share": 0.5,
        "peak_memory_mb": pytest.approx(1048.576),
        "peak_temperature_c": 45,
        "mean_sm_mhz": 1980,
    }


@pytest.mark.parametrize("step_ms", [10, 20, 100])
def test_the_step_of_the_counter_is_found(play: Play, step_ms: int) -> None:
    (reading,) = play(gpu(step_ms=step_ms), (2.0, 4.0))
    assert reading["resolution_ms"] == pytest.approx(step_ms, rel=0.1)


def work(seed: int, seconds: float) -> tuple[str, list[tuple[float, float]]]:
    """A power that jumps, and its (time, milliwatt): 70 W idle, up to 600 W, pieces of 5 ms to 1 s."""
    draw = random.Random(seed)
    time, points = 0.0, []
    while time < seconds:
        points.append((round(time, 6), float(draw.choice([70_000, draw.randint(150_000, 600_000)]))))
        time += draw.choice([0.005, 0.03, 0.11, 0.4, 1.0]) * draw.uniform(0.5, 1.5)
    return "".join(f"power 0 {t} {mw}\n" for t, mw in points), points


def truth_mj(points: list[tuple[float, float]], begin: float, end: float) -> float:
    ends = [*points[1:], (float("inf"), 0.0)]
    return sum(mw * max(min(until, end) - max(t, begin), 0) for (t, mw), (until, _) in zip(points, ends, strict=True))


@pytest.mark.parametrize("step_ms", [10, 20, 100])
@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_error_bounds_hold_for_any_load(play: Play, step_ms: int, jitter: float) -> None:
    """1 % from 50 counter steps on, 2.5 % from 20 on; below, within the bound that the reading states."""
    draw = random.Random(step_ms)
    script, points = work(step_ms, 60.0)
    windows = []
    for steps in [
        *draw.choices(range(1, 20), k=25),
        *draw.choices(range(20, 50), k=25),
        *draw.choices(range(50, 200), k=25),
    ]:
        begin = round(draw.uniform(2, 55 - steps * step_ms / 1000), 6)
        windows.append((begin, round(begin + steps * step_ms / 1000, 6)))
    readings = play(f"gpu GPU-a H100 step_ms={step_ms}\n{script}", *windows, jitter=jitter)
    told = 0
    for (begin, end), reading in zip(windows, readings, strict=True):
        steps = round((end - begin) * 1000 / step_ms)
        truth = truth_mj(points, begin, end)
        if reading["joules"] is None:
            assert steps < 20
            assert "too short" in reading["reason"]
            continue
        told += 1
        error = abs(reading["joules"] * 1000 - truth)
        assert error <= reading["bound_joules"] * 1000 + 2, "the stated bound holds"
        if steps >= 20:
            assert error <= (0.01 if steps >= 50 else 0.025) * truth, f"{steps} steps"
    assert told >= 60


def test_windows_that_follow_each_other_add_up(play: Play) -> None:
    draw = random.Random(1)
    script, _ = work(1, 30.0)
    edges = sorted(round(draw.uniform(2, 28), 6) for _ in range(20))
    parts = [pair for pair in pairwise(edges) if pair[1] - pair[0] > 0.5]
    whole = [(edges[0], edges[-1]), *parts]
    gaps = [pair for pair in pairwise(edges) if pair not in parts]
    readings = play(f"gpu GPU-a H100 step_ms=20\n{script}", *whole, *gaps)
    if all(reading["joules"] is not None for reading in readings):
        assert round(1000 * sum(r["joules"] for r in readings[1:])) == round(1000 * readings[0]["joules"])
    else:
        known = [r["joules"] for r in readings[1:] if r["joules"] is not None]
        assert sum(known) < readings[0]["joules"]


def test_a_window_below_the_counters_step_is_null_and_says_so(play: Play) -> None:
    (reading,) = play(gpu(), (2.01, 2.04))
    assert reading["joules"] is None
    assert "30.0 ms is too short for a counter that steps every 100 ms" in reading["reason"]


def test_a_counter_that_stands_still_does_not_count(play: Play) -> None:
    (reading,) = play("gpu GPU-a H100\npower 0 0 0\n", (2.0, 5.0))
    assert reading["joules"] is None
    assert "did not advance" in reading["reason"]


def test_a_reset_loses_its_moment_and_no_more(play: Play) -> None:
    (long, short) = play(gpu("a", energy_mj=900_000) + "reset 0 10.03\n", (2.0, 32.0), (9.5, 10.5))
    assert long["joules"] == pytest.approx(3000, rel=0.01)
    assert 0 < long["lost_s"] < 0.3
    assert short["joules"] is None
    assert "the counter began anew" in short["reason"]


def test_a_gpu_that_is_lost_in_the_window_is_null_and_says_what_was_counted(play: Play) -> None:
    script = gpu("a") + gpu("b", index=1) + f"fail {COUNTER} {GPU_IS_LOST} 7 99 1\n"
    (reading, before) = play(script, (2.0, 12.0), (2.0, 6.5))
    assert reading["joules"] is None
    assert "GPU-b: 5.0" in reading["reason"]
    assert "fell off the bus" in reading["reason"]
    assert "J were counted in the rest" in reading["reason"]
    assert reading["lost_s"] == pytest.approx(5.05, abs=0.06)
    assert before["joules"] == pytest.approx(900, rel=0.01), "what was before is known"


def test_a_read_that_fails_for_a_moment_costs_nothing(play: Play) -> None:
    (reading,) = play(gpu() + f"fail {COUNTER} {UNKNOWN} 5 6\n", (2.0, 12.0))
    assert (reading["joules"], reading["lost_s"]) == (1000.0, 0.0)


@pytest.mark.parametrize(
    ("rc", "words"), [(NO_PERMISSION, "may not read"), (GPU_IS_LOST, "the GPU is lost"), (UNKNOWN, "Unknown Error")]
)
def test_a_gpu_that_never_answers_makes_the_reading_null(play: Play, rc: int, words: str) -> None:
    (reading,) = play(gpu("a") + gpu("b", index=1, rc=rc), (2.0, 4.0))
    assert reading["joules"] is None
    assert "GPU-b" in reading["reason"]
    assert words in reading["reason"]
    assert reading["lost_s"] == 2.0
    assert reading["by_gpu"]["GPU-a"]["joules"] == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize("rc", [NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_without_a_counter_power_is_integrated_and_marked_so(play: Play, rc: int) -> None:
    script = gpu("a", rc=rc) + "power 0 6 300000\n"
    (reading,) = play(script, (2.0, 10.0))
    assert reading["method"] == "nvml-power-integrated"
    assert reading["joules"] == pytest.approx(400 + 1200, rel=0.01)
    assert reading["bound_joules"] is None
    (mixed,) = play(gpu("a", rc=rc) + gpu("b", index=1), (2.0, 10.0))
    assert mixed["method"] == "nvml-power-integrated+nvml-counter"


def test_mean_power_is_the_last_resort_and_coarse(play: Play) -> None:
    (reading,) = play(gpu("a", rc=NOT_SUPPORTED, instant=0), (2.0, 10.0))
    assert (reading["method"], reading["resolution_ms"]) == ("nvml-mean-power-integrated", 1000.0)
    assert reading["joules"] == pytest.approx(800, rel=0.01)


def test_power_that_was_not_read_is_lost(play: Play) -> None:
    script = gpu("a", rc=NOT_SUPPORTED) + f"fail {INSTANT} {UNKNOWN} 5 9\n"
    (reading,) = play(script, (2.0, 12.0))
    assert reading["joules"] is None
    assert reading["lost_s"] == pytest.approx(4, abs=0.2)


def test_without_counter_and_power_there_is_no_answer(play: Play) -> None:
    script = gpu("a", rc=NOT_SUPPORTED, instant=0) + f"fail {MEAN} {NOT_SUPPORTED} 0 99\n"
    (reading,) = play(script, (2.0, 4.0))
    assert reading["joules"] is None
    assert "no energy counter" in reading["reason"]


THREE = gpu("aa", 1_000) + gpu("ab", 10_000, index=1) + gpu("c0ff", 100_000, index=2)


@pytest.mark.parametrize(
    ("visible", "devices", "watts"),
    [
        (None, None, 111),
        ("1", None, 10),
        ("2,0", None, 101),
        ("2,0", [0], 100),  # torch's device 0 is the first visible one
        ("GPU-ab", None, 10),
        ("GPU-c0ff,1", None, 110),
        ("GPU-c0", None, 100),
        ("GPU-c0ff", ["GPU-c0ff"], 100),
        (None, ["GPU-aa", 2], 101),
        (None, [1, "GPU-ab"], 10),  # one board, named twice
        ("1,-1,2", None, 10),  # CUDA stops at the first entry that names nothing
        ("0,GPU-a,2", None, 1),  # the start of two UUIDs
        ("0,7,2", None, 1),
    ],
)
def test_visible_devices(play: Play, visible: str | None, devices: Any, watts: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    (reading,) = play(THREE, (2.0, 12.0), devices=devices, **environ)
    assert reading["joules"] == 10 * watts


@pytest.mark.parametrize("visible", ["", "-1", "GPU-zz", "NoDevFiles"])
def test_no_visible_device_is_null(play: Play, visible: str) -> None:
    (reading,) = play(THREE, (2.0, 12.0), CUDA_VISIBLE_DEVICES=visible)
    assert (reading["joules"], reading["method"], reading["lost_s"]) == (None, "none", 0.0)
    assert f"CUDA_VISIBLE_DEVICES is {visible!r}" in reading["reason"]


def test_a_device_that_is_not_visible_is_an_error_naming_those_that_are(play: Play) -> None:
    assert "0 (GPU-ab)" in play(THREE, (2.0, 12.0), devices=[1], CUDA_VISIBLE_DEVICES="1")[0]["error"]


def test_counting_no_device_is_null(play: Play) -> None:
    assert play(THREE, (2.0, 12.0), devices=[])[0]["reason"] == "no GPU is asked for"


def test_mig_is_null(play: Play) -> None:
    (on,) = play(gpu(mig=1), (2.0, 4.0))
    (named,) = play(THREE, (2.0, 4.0), CUDA_VISIBLE_DEVICES="MIG-1234")
    assert on["joules"] is named["joules"] is None
    assert "MIG is on" in on["reason"]
    assert "MIG is on" in named["reason"]


def test_a_board_without_mig_counts(play: Play) -> None:
    assert play(gpu(mig="-"), (2.0, 12.0))[0]["joules"] == 1000


def test_indices_of_unlike_gpus_need_bus_order(play: Play) -> None:
    script = gpu("slow", model="T4") + gpu("fast", index=1)
    window = (2.0, 12.0)
    assert "PCI_BUS_ID" in play(script, window, devices=[1])[0]["reason"]
    assert "PCI_BUS_ID" in play(script, window, CUDA_VISIBLE_DEVICES="1")[0]["reason"]
    assert play(script, window, devices=[1], CUDA_DEVICE_ORDER="PCI_BUS_ID")[0]["joules"] == 1000
    assert play(script, window, CUDA_VISIBLE_DEVICES="GPU-fast")[0]["joules"] == 1000


@pytest.mark.parametrize(
    ("pids", "tenancy"),
    [
        ("SELF", "exclusive"),
        ("SELF,77", "shared"),
        ("-", "unknown"),  # a container lists nothing
        ("77", "unknown"),  # or the host's process ids
        ("?", "unknown"),
    ],
)
def test_tenancy(play: Play, pids: str, tenancy: str) -> None:
    assert play(gpu(pids=pids), (2.0, 4.0))[0]["tenancy"] == tenancy


def test_driver_that_is_not_loaded_or_sees_no_gpu(play: Play) -> None:
    assert "not loaded" in play(f"init {NOT_LOADED}\n", (2.0, 4.0))[0]["reason"]
    assert play("", (2.0, 4.0))[0]["reason"] == "the NVIDIA driver sees no GPU"


LIVE = """
import json, threading, time
from gpuops.energy.meter import Meter
with Meter() as meter:
    time.sleep(2)
assert not [t for t in threading.enumerate() if t.name == "gpuops-energy"], "the reading thread ended"
print(json.dumps(meter.reading.to_json()))
"""


def test_the_thread_reads_on_the_real_clock(environment: dict[str, str]) -> None:
    with open(environment["FAKE_NVML"], "w") as script:
        script.write("gpu GPU-a H100 step_ms=20\npower 0 0 250000\n")
    done = subprocess.run([sys.executable, "-c", LIVE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reading = json.loads(done.stdout)
    assert abs(reading["joules"] - 250 * reading["seconds"]) <= reading["bound_joules"] + 0.01
