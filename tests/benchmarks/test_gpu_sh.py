"""benchmarks/gpu.sh where it cannot do its work: one clear line. What it does with a GPU only a GPU machine shows."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

GPU_SH = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", GPU_SH, *arguments], capture_output=True, text=True, timeout=30)


@pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="nvidia-smi is here: gpu.sh would run the whole demo"
)
def test_without_a_gpu_it_says_so_in_one_line():
    done = run("demo")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu.sh: no GPU here: nvidia-smi is missing")


@pytest.mark.parametrize("arguments", [(), ("everything",), ("demo", "demo")])
def test_an_unknown_part_is_refused_in_one_line(arguments: tuple[str, ...]):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "benchmarks/gpu.sh demo" in done.stderr


def test_help_names_every_variable():
    done = run("--help")
    assert done.returncode == 0
    assert not done.stderr
    for name in ("PYTHON", "WHEELS", "VENV", "OUT", "demo.json"):
        assert name in done.stdout


def test_help_names_every_part_and_each_part_is_known():
    parts = re.search(r"^  (\w+(?:\|\w+)+)\) part=", GPU_SH.read_text(), re.MULTILINE)
    assert parts is not None
    described = re.findall(r"^  benchmarks/gpu\.sh (\w+)", run("--help").stdout, re.MULTILINE)
    assert sorted(described) == sorted(parts[1].split("|"))
    assert "serving" in described


def test_bash_can_read_all_of_it():
    assert subprocess.run(["bash", "-n", GPU_SH], capture_output=True).returncode == 0


def test_every_script_that_it_runs_is_there():
    named = re.findall(r"benchmarks/\w+\.py", GPU_SH.read_text())
    assert "benchmarks/gpu_serving.py" in named
    assert all((GPU_SH.parents[1] / name).is_file() for name in named)
