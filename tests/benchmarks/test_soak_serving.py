"""The soak compares every answer, and whatever it finds wrong ends it with 1."""

import json
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuops.bundle import Golden
from gpuops.errors import UnavailableError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GOLDEN = Golden({"x": np.arange(64.0).reshape(64, 1)}, {"y": 2 * np.arange(64, dtype=np.float32).reshape(64, 1)})


@pytest.fixture(scope="module")
def room() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import soak_serving

        return soak_serving
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def soak(room: Any) -> Any:
    made = room.Soak(server=None, golden=GOLDEN, sizes=queue.SimpleQueue(), done=lambda size: None)
    made.memory_mb = [(50.0, 80.0)] * 40
    return made


def right(inputs: Any) -> Any:
    return {"y": 2 * inputs["x"].astype(np.float32)}


def refuses(inputs: Any) -> Any:
    raise UnavailableError("no answer")


def test_an_answer_to_other_samples_or_none_is_a_fault(room: Any, soak: Any) -> None:
    draw = np.random.default_rng(0)
    soak.ask(right, 9, draw, "http")
    assert room.judge(soak, 100, 1.0, [], "2.51.0")[1] == []
    soak.ask(lambda inputs: {"y": right(inputs)["y"][::-1]}, 9, draw, "http")
    soak.ask(lambda inputs: {"y": right(inputs)["y"][:0]}, 9, draw, "http")
    soak.ask(refuses, 9, draw, "http")
    faults = room.judge(soak, 100, 1.0, [], "2.51.0")[1]
    assert [fault.partition(",")[0] for fault in faults] == ["wrong answers: 2", "failed requests: 1"]


def test_memory_that_grows_and_what_is_left_behind_are_faults(room: Any, soak: Any) -> None:
    assert "left behind: 1" in room.judge(soak, 100, 1.0, ["a region"], "2.51.0")[1][0]
    soak.memory_mb = [(50.0 + look, 80.0) for look in range(40)]
    assert room.judge(soak, 100, 1.0, [], "2.51.0")[1] == ["memory of the server grew from 64.5 to 84.5 MB"]
    soak.memory_mb = [(50.0 + min(look, 10), 80.0 + look) for look in range(40)]  # what settles does not grow
    assert [fault[:19] for fault in room.judge(soak, 100, 1.0, [], "2.51.0")[1]] == ["memory of the stubs"]


def test_a_client_that_ends_early_is_a_fault(room: Any, soak: Any) -> None:
    soak.sizes.put(1)
    soak.client("http", "http://127.0.0.1:9", 0)
    assert room.judge(soak, 100, 1.0, [], "2.51.0")[1]


@pytest.mark.parametrize("samples", [1, 33, 20_000])
def test_the_batches_add_up(room: Any, samples: int) -> None:
    sizes = room._sizes(samples)
    found = [sizes.get_nowait() for _ in range(sizes.qsize())]
    assert sum(found) == samples
    assert max(found) <= room.LARGEST
    if samples == 20_000:
        assert min(found) == 1
        assert max(found) > room.MAX_BATCH  # some are split


@pytest.mark.slow
def test_a_short_soak_of_the_real_server_finds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, BENCHMARKS / "soak_serving.py", "--samples", "3000", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["metric"]: row["value"] for row in json.loads(out.read_text())["rows"]}
    assert rows["samples"] == 3000
    assert rows["wrong answers"] == rows["failed requests"] == rows["left behind"] == 0
