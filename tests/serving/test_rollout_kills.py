"""A rollout that dies at any moment is finished by the same command: one verdict, nothing left, nobody noticed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import REFUSES_PROMOTION, Asking, Model, Place

from gpuops_serving.repository import versions_in

ROOT = Path(__file__).parents[2]
Run = Callable[..., dict[str, int]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("kills"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run one rollout in a process of its own, killed at a moment."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    command = [sys.executable, str(Path(__file__).with_name("crashing.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        reads, writes = runner.stdout, runner.stdin

        def one(model: Model, bundle: Path, kill: int, **options: Any) -> dict[str, int]:
            access = model.place.server.access
            assert access is not None
            asked = {"bundle": str(bundle), "repository": str(model.repository), "name": model.name, "kill": kill}
            asked |= {"url": model.place.server.grpc_url, "access": list(access), "sabotage": "", "distance": None}
            writes.write(json.dumps({**asked, "ledger": str(model.ledger.path), **options}) + "\n")
            writes.flush()
            found: dict[str, int] = json.loads(reads.readline())
            return found

        yield one
        runner.stdin.close()


def events(model: Model) -> list[tuple[str, str]]:
    return [(event.kind, event.body["version_id"][:2]) for event in model.ledger.events()]


@pytest.mark.slow
def test_a_good_version_is_promoted_once_whenever_its_rollout_is_killed(place: Place, run: Run, tmp_path: Path) -> None:
    model = Model(place, "good", tmp_path / "model")
    model.deploy(model.bundle("00"))
    gains = {"1": 0.5}
    with Asking(place.server.grpc_url, model.name, gains) as asking:
        kill, over = 0, False
        while not over:
            kill += 1
            number = kill + 1
            gains[str(number)] = gain = 0.5 + kill / 16
            bundle = model.bundle(f"{kill:02d}", gain=gain)
            first = run(model, bundle, kill)
            over = first["code"] == 0  # it saw fewer moments
            assert over or first["code"] == -signal.SIGKILL
            place.settle()
            if not over:
                assert run(model, bundle, 0)["code"] == 0
            model.serves(gain, str(number))
            model.clean()
            assert events(model) == [("promote", f"{k:02d}") for k in range(1, kill + 1)]
            compared = model.ledger.events()[-1].body["verdict"]
            assert (compared["old"]["target"], compared["ok"]) == (f"good:{kill}", True)
    assert asking.wrong == []
    assert asking.numbers() == sorted(asking.numbers())  # nobody was ever sent back
    assert asking.numbers()[-1] == number
    assert kill > 12
    model.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by the comparison", "when it is promoted"])
def test_a_bad_version_is_rejected_once_whenever_its_rollout_is_killed(
    place: Place, run: Run, tmp_path: Path, how: str
) -> None:
    model = Model(place, f"bad{len(how)}", tmp_path / "model")
    model.deploy(model.bundle("00"))
    before = (model.path / "config.pbtxt").read_text()
    bundle = model.bundle("01", gain=0.25)
    options: dict[str, Any] = {"distance": 1.0 if "comparison" in how else None}
    options["sabotage"] = REFUSES_PROMOTION if "promoted" in how else ""
    with Asking(place.server.http_url, model.name, {"1": 0.5}) as asking:
        kill, over, verdicts = 0, False, 0
        while not over:
            kill += 1
            first = run(model, bundle, kill, **options)
            over = first["code"] == 0
            assert over or first["code"] == -signal.SIGKILL
            place.settle()
            if not (model.repository / f".rollout-{model.name}.json").exists() and len(events(model)) > verdicts:
                verdicts += 1  # it had ended, so the next one is another rollout
            if not over:
                assert run(model, bundle, 0, **options)["code"] == 0
                verdicts += 1
            assert events(model) == [("reject", "01")] * verdicts
            assert (model.path / "config.pbtxt").read_text() == before
            assert versions_in(model.path) == [1]
            model.clean()
    assert asking.wrong == []
    assert asking.numbers() == [1]
    assert kill <= verdicts <= kill + 1
    assert kill > 8
    model.close()
