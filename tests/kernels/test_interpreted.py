"""Runs the interpret_*.py files in processes of their own, with Triton's interpreter switched on before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kernel", ["transform", "window", "stats"])
def test_kernels_in_the_interpreter(kernel: str) -> None:
    tests = HERE / f"interpret_{kernel}.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(tests)],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout or " xfailed" in run.stdout
    assert "skipped" not in run.stdout
