"""`gpuops energy`: null with the reason here, joules over the scripted driver; output, signals and exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.gpuops.energy.conftest import environment, library  # noqa: F401  the scripted driver

SAY = [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"]
NAP = [sys.executable, "-c", "import time; time.sleep(1.2)"]

needs_no_driver = pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="an NVIDIA driver is here")


@needs_no_driver
def test_json_is_alone_on_stdout_and_null_with_the_reason() -> None:
    done = run_cli("energy", "--json", "--carbon", "400", "--", *SAY)
    told = json.loads(done.stdout)
    assert done.returncode == told["exit_code"] == 3
    assert told["joules"] is None
    assert told["reason"] == "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)"
    assert told["gpus"] == []
    assert told["derived"]["carbon_g"] is None
    assert done.stderr == "out\nerr\n" or done.stderr == "err\nout\n"


@needs_no_driver
def test_text_goes_to_stderr_and_the_file_holds_json(tmp_path: Path) -> None:
    done = run_cli("energy", "--out", str(tmp_path / "told.json"), "--", *SAY)
    assert (done.returncode, done.stdout) == (3, "out\n")
    assert "null (no NVIDIA driver" in done.stderr
    assert "exit code 3" in done.stderr
    assert json.loads((tmp_path / "told.json").read_text())["seconds"] > 0


def test_joules_of_a_command_over_a_driver(environment: dict[str, str]) -> None:  # noqa: F811
    Path(environment["FAKE_NVML"]).write_text("gpu GPU-a H100 step_ms=20\npower 0 0 250000 80 4000\n")
    done = run_cli("energy", "--json", "--price", "0.3", "--", *NAP, **environment)
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert abs(told["joules"] - 250 * told["seconds"]) <= told["bound_joules"] + 0.01
    (gpu,) = told["gpus"]
    assert (gpu["uuid"], gpu["name"], gpu["method"], gpu["reason"]) == ("GPU-a", "H100", "nvml-counter", None)
    assert gpu["usage"]["busy_share"] == 0.8
    assert told["derived"]["cost"] == pytest.approx(told["joules"] / 3.6e6 * 0.3)
    text = run_cli("energy", "--", *NAP, **environment).stderr
    assert "GPU-a H100:" in text
    assert "W mean" in text


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["no-such-command"], 127, "no such command"),
        (["/etc/hostname"], 126, "not executable"),
        ([], 2, "which command?"),
    ],
)
def test_commands_that_cannot_run(command: list[str], code: int, message: str) -> None:
    done = run_cli("energy", "--", *command)
    assert done.returncode == code
    assert message in done.stderr


def test_a_wrong_figure_is_refused_before_the_command_runs(tmp_path: Path) -> None:
    done = run_cli("energy", "--carbon=-1", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 2
    assert "at least 0" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_signal_ends_the_command_and_is_told() -> None:
    ready = "import signal, sys; print('ready', file=sys.stderr, flush=True); signal.pause()"
    command = [sys.executable, "-m", "gpuops.cli", "energy", "--json", "--", sys.executable, "-c", ready]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert json.loads(out)["exit_code"] == 143
