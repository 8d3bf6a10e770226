"""The meter over the real nvidia-ml-py and a scripted libnvidia-ml.so.1 (fake_nvml.c), each case in its own process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if os.path.exists("/dev/nvidiactl"):
    pytest.skip("a real NVIDIA driver is here; a second libnvidia-ml.so.1 must not be loaded", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
NOT_SUPPORTED, NO_PERMISSION, NOT_LOADED, GPU_IS_LOST, UNKNOWN = 3, 4, 9, 15, 999

CHILD = """
import ctypes, json, os, sys
from pathlib import Path
ctypes.CDLL(sys.argv[1])  # its SONAME then answers pynvml's own CDLL("libnvidia-ml.so.1")
from gpuops.energy import meter as module
from gpuops.energy.meter import Meter
from gpuops.errors import InputError

steps, devices, seconds = json.loads(sys.argv[2])
clock = iter([0.0, seconds])
module.time.perf_counter = lambda: next(clock)
script = Path(os.environ["FAKE_NVML"])
show = lambda step: script.write_text(step.replace("SELF", str(os.getpid())))
show(steps[0])
try:
    with Meter(devices) as meter:
        show(steps[-1])
    print(json.dumps(meter.reading.to_json()))
except InputError as error:
    print(json.dumps({"error": str(error)}))
"""

Window = Callable[..., dict[str, Any]]


def gpu(name: str, energy_mj: int, *, rc: int = 0, model: str = "H100", mig: str | int = 0, pids: str = "SELF") -> str:
    return f"gpu GPU-{name} {model} {mig} {energy_mj} {rc} {pids}\n"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    warnings = ["-O1", "-Wall", "-Wextra", "-Werror"]
    flags = ["-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(
        ["cc", *warnings, *flags, str(Path(__file__).with_name("fake_nvml.c")), "-o", str(built)], check=True
    )
    return built


@pytest.fixture
def window(library: Path, tmp_path: Path) -> Window:
    """Meter one window, in which the boards change from the first state to the last."""

    def run(
        *states: str, devices: list[int | str] | None = None, seconds: float = 2.0, **environ: str
    ) -> dict[str, Any]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        environment |= {"FAKE_NVML": str(tmp_path / "boards"), "PYTHONPATH": str(ROOT), **environ}
        command = [sys.executable, "-W", "error", "-c", CHILD, str(library), json.dumps([states, devices, seconds])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def test_difference_of_counters_is_exact(window: Window) -> None:
    # Beyond float64's integers: 2**53 mJ and a few.
    big = 2**53 + 1
    reading = window(gpu("a", big) + gpu("b", 5), gpu("a", big + 1_000_000_001) + gpu("b", 7))
    assert reading == {
        "joules": 1_000_000.003,
        "method": "nvml-counter",
        "reason": None,
        "resolution_ms": 100.0,
        "scope": "gpu-board",
        "tenancy": "exclusive",
        "lost_s": 0.0,
        "seconds": 2.0,
        "gpus": ["GPU-a", "GPU-b"],
    }


def test_a_counter_that_went_backwards_is_a_reset_not_a_negative(window: Window) -> None:
    reading = window(gpu("a", 900_000) + gpu("b", 1), gpu("a", 300) + gpu("b", 2_000_000))
    assert reading["joules"] is None
    assert "counter reset" in reading["reason"]
    assert "GPU-a" in reading["reason"]
    assert reading["lost_s"] == reading["seconds"] == 2.0


@pytest.mark.parametrize(
    ("rc", "words"),
    [
        (NOT_SUPPORTED, "no energy counter"),
        (NO_PERMISSION, "may not read"),
        (GPU_IS_LOST, "the GPU is lost"),
        (UNKNOWN, "Unknown Error"),
    ],
)
@pytest.mark.parametrize("from_start", [True, False])
def test_a_gpu_that_does_not_answer_makes_the_reading_null(
    window: Window, rc: int, words: str, from_start: bool
) -> None:
    before = gpu("a", 100) + gpu("b", 100, rc=rc if from_start else 0)
    reading = window(before, gpu("a", 900) + gpu("b", 900, rc=rc))
    assert reading["joules"] is None
    assert "GPU-b" in reading["reason"]
    assert words in reading["reason"]
    assert reading["lost_s"] == 2.0


@pytest.mark.parametrize(("seconds", "words"), [(0.03, "window of 30.0 ms is shorter"), (3.0, "did not advance")])
def test_no_difference_is_null_not_zero(window: Window, seconds: float, words: str) -> None:
    same = gpu("a", 12_345)
    reading = window(same, same, seconds=seconds)
    assert reading["joules"] is None
    assert words in reading["reason"]


BEFORE = gpu("aa", 0) + gpu("ab", 0) + gpu("c0ff", 0)
AFTER = gpu("aa", 1_000) + gpu("ab", 10_000) + gpu("c0ff", 100_000)


@pytest.mark.parametrize(
    ("visible", "devices", "joules"),
    [
        (None, None, 111.0),
        ("1", None, 10.0),
        ("2,0", None, 101.0),
        ("2,0", [0], 100.0),  # torch's device 0 is the first visible one
        ("GPU-ab", None, 10.0),
        ("GPU-c0ff,1", None, 110.0),
        ("GPU-c0", None, 100.0),
        ("GPU-c0ff", ["GPU-c0ff"], 100.0),
        (None, ["GPU-aa", 2], 101.0),
        (None, [1, "GPU-ab"], 10.0),  # one board, named twice
        ("1,-1,2", None, 10.0),  # CUDA stops at the first entry that names nothing
        ("0,GPU-a,2", None, 1.0),  # the start of two UUIDs
        ("0,7,2", None, 1.0),
    ],
)
def test_visible_devices(window: Window, visible: str | None, devices: Any, joules: float) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert window(BEFORE, AFTER, devices=devices, **environ)["joules"] == joules


@pytest.mark.parametrize("visible", ["", "-1", "GPU-zz", "NoDevFiles"])
def test_no_visible_device_is_null(window: Window, visible: str) -> None:
    reading = window(BEFORE, AFTER, CUDA_VISIBLE_DEVICES=visible)
    assert (reading["joules"], reading["method"], reading["lost_s"]) == (None, "none", 0.0)
    assert f"CUDA_VISIBLE_DEVICES is {visible!r}" in reading["reason"]


def test_a_device_that_is_not_visible_is_an_error_naming_those_that_are(window: Window) -> None:
    assert "0 (GPU-ab)" in window(BEFORE, AFTER, devices=[1], CUDA_VISIBLE_DEVICES="1")["error"]


def test_counting_no_device_is_null(window: Window) -> None:
    assert window(BEFORE, AFTER, devices=[])["reason"] == "no GPU is asked for"


def test_mig_is_null(window: Window) -> None:
    on = window(gpu("a", 0, mig=1), gpu("a", 900, mig=1))
    named = window(BEFORE, AFTER, CUDA_VISIBLE_DEVICES="MIG-1234")
    assert on["joules"] is named["joules"] is None
    assert "MIG is on" in on["reason"]
    assert "MIG is on" in named["reason"]


def test_a_board_without_mig_counts(window: Window) -> None:
    assert window(gpu("a", 0, mig="-"), gpu("a", 900, mig="-"))["joules"] == 0.9


def test_indices_of_unlike_gpus_need_bus_order(window: Window) -> None:
    before, after = (gpu("slow", 0, model="T4") + gpu("fast", mj, model="H100") for mj in (0, 900))
    assert "PCI_BUS_ID" in window(before, after, devices=[1])["reason"]
    assert "PCI_BUS_ID" in window(before, after, CUDA_VISIBLE_DEVICES="1")["reason"]
    assert window(before, after, devices=[1], CUDA_DEVICE_ORDER="PCI_BUS_ID")["joules"] == 0.9
    assert window(before, after, CUDA_VISIBLE_DEVICES="GPU-fast")["joules"] == 0.9


@pytest.mark.parametrize(
    ("first", "last", "tenancy"),
    [
        ("SELF", "SELF", "exclusive"),
        ("SELF,77", "SELF", "shared"),
        ("SELF", "SELF,77", "shared"),
        ("-", "SELF", "unknown"),  # a container lists nothing
        ("77", "77", "unknown"),  # or the host's process ids
        ("?", "SELF", "unknown"),
    ],
)
def test_tenancy(window: Window, first: str, last: str, tenancy: str) -> None:
    assert window(gpu("a", 0, pids=first), gpu("a", 900, pids=last))["tenancy"] == tenancy


def test_driver_that_is_not_loaded_or_sees_no_gpu(window: Window) -> None:
    assert "not loaded" in window(f"init {NOT_LOADED}\n")["reason"]
    assert window("")["reason"] == "the NVIDIA driver sees no GPU"
