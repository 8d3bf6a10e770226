"""A driver that plays a script, for the real nvidia-ml-py: fake_nvml.c, loaded only in processes of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PLAY = Path(__file__).with_name("play.py")

Play = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libnvidia-ml.so.1, built from our own source; never where there is a driver."""
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("a real NVIDIA driver is here; a second libnvidia-ml.so.1 must not be loaded")
    built = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    warnings = ["-O1", "-Wall", "-Wextra", "-Werror"]
    flags = ["-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(
        ["cc", *warnings, *flags, str(Path(__file__).with_name("fake_nvml.c")), "-o", str(built)], check=True
    )
    return built


@pytest.fixture
def environment(library: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a process that finds the scripted library, its script (`script`) and its clock."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    return clean | {
        "LD_LIBRARY_PATH": str(library.parent),
        "FAKE_NVML": str(tmp_path / "script"),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def play(environment: dict[str, str], tmp_path: Path) -> Play:
    """Readings of windows under a script, on a clock that the test moves (play.py)."""

    def run(
        script: str,
        *windows: tuple[float, float],
        devices: list[int | str] | None = None,
        jitter: float = 0.0,
        **more: str,
    ) -> list[dict[str, Any]]:
        environ = environment | {"FAKE_NVML_CLOCK": str(tmp_path / "clock"), **more}
        asked = json.dumps({"script": script, "windows": windows, "devices": devices, "jitter": jitter})
        command = [sys.executable, "-W", "error", str(PLAY)]
        done = subprocess.run(command, env=environ, input=asked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        answer: list[dict[str, Any]] = json.loads(done.stdout)
        return answer

    return run
