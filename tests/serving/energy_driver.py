"""Plays metered servers in a process that has the scripted driver (energy_play.py)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpuops.energy.conftest import environment, library  # noqa: F401  the scripted driver

ROOT = Path(__file__).parents[2]


class Player:
    """One such process, asked play after play."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("energy_play.py"))]
        environ = environ | {
            "FAKE_NVML": str(folder / "script"),
            "FAKE_NVML_CLOCK": str(folder / "clock"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "serving")]),
        }
        self.process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self.process.stdin.write(json.dumps({"longest_s": 3.0, **asked}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        told: dict[str, Any] = json.loads(line)
        assert "error" not in told, told["error"]
        return told


@pytest.fixture(scope="module")
def play(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Player]:  # noqa: F811
    """Outcome of a play, as energy_play.py tells it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    player = Player(clean | {"LD_LIBRARY_PATH": str(library.parent)}, tmp_path_factory.mktemp("energy"))
    yield player
    player.process.stdin.close()  # type: ignore[union-attr]
    player.process.wait(timeout=60)
    for stream in (player.process.stdout, player.process.stderr):
        stream.close()  # type: ignore[union-attr]
