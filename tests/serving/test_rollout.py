"""Rollouts on a real server: a good version takes over, a bad one changes nothing, a killed one is gone on with."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import answers, deployed, golden, make_bundle

from gpuops.errors import GpuopsError, InputError, UnavailableError
from gpuops.lineage.ledger import Ledger
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits
from gpuops_serving.repository import SHIM, versions_in
from gpuops_serving.rollout import Outcome, read_back, roll_back, rollout
from gpuops_serving.server import TritonServer

ROOT = Path(__file__).parents[2]
GOLDEN = golden()
ANYTHING = Limits(p50=1e3, p99=1e3)
"""This machine may stall at any time: what a test judges is not the latency."""


class Place:
    """A repository with version 1 of tiny, its server, and somebody who asks it all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repository = folder, deployed(folder)
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.server = TritonServer(self.repository, control=True)
        self.server.start()
        self.client = Client(self.server.http_url, access=self.server.access)

    def close(self) -> None:
        self.client.close()
        self.server.stop()
        self.ledger.close()

    def bundle(self, name: str, **options: Any) -> Path:
        return make_bundle(self.folder / name, version_id=(name * 64)[:64], **options)

    def rollout(self, bundle: Path, **options: Any) -> Outcome:
        options = {"count": 20, "limits": ANYTHING, **options}
        return rollout(bundle, self.repository, self.client, ledger=self.ledger, **options)

    def serves(self, gain: float, version: str) -> None:
        """What answers who names no version."""
        with Client(self.server.grpc_url) as client:
            answer = client.answer("tiny", GOLDEN.inputs)
        assert answer.version == version
        np.testing.assert_allclose(
            answer.outputs["y"], answers(GOLDEN.inputs["a"], GOLDEN.inputs["m"], gain), atol=1e-3
        )

    def untouched(self) -> None:
        """No candidate, no state, nothing else in the repository."""
        assert sorted(p.name for p in self.repository.iterdir()) == ["tiny"]
        assert {state.name for state in self.client.models() if state.state == "READY"} == {"tiny"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


class Asking(threading.Thread):
    """Asks a model without a version, all the time, and keeps what was wrong and which versions answered."""

    def __init__(self, url: str, gains: tuple[float, ...]) -> None:
        super().__init__()
        self.url, self.gains = url, gains
        self.wrong: list[str] = []
        self.versions: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        with Client(self.url) as client:
            while not self.over.is_set():
                try:
                    answer = client.answer("tiny", GOLDEN.inputs)
                except GpuopsError as error:
                    self.wrong.append(str(error))
                    continue
                self.versions.append(answer.version)
                wants = [answers(GOLDEN.inputs["a"], GOLDEN.inputs["m"], gain) for gain in self.gains]
                if not any(np.allclose(answer.outputs["y"], want, atol=1e-3) for want in wants):
                    self.wrong.append("a wrong answer")

    def __enter__(self) -> "Asking":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def test_a_good_version_takes_over_and_the_one_before_stays_for_who_names_it(place: Place) -> None:
    with Asking(place.server.grpc_url, (0.5, 0.25)) as asking:
        made = place.rollout(place.bundle("2", gain=0.25))
    assert (made.promoted, made.version, made.serving, made.reasons) == (True, 2, (1, 2), ())
    assert asking.wrong == []
    assert asking.versions == sorted(asking.versions)  # never back
    place.serves(0.25, "2")
    assert place.client.answer("tiny", GOLDEN.inputs, "1").version == "1"
    place.untouched()
    (event,) = place.ledger.events("promote")
    assert event.body["version_id"] == "2" * 64
    assert event.body["verdict"]["ok"]
    assert event.body["verdict"]["distances"]["y"]["max_abs"] > 1
    back = roll_back(place.repository, "tiny", place.client, ledger=place.ledger)
    assert (back.serving, back.version) == ((1,), 2)
    place.serves(0.5, "1")
    again = place.rollout(place.bundle("3", gain=0.75))
    assert (again.promoted, again.version) == (True, 3)  # numbers are not used twice


def dies_when_loaded(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"no graph")


def reseal(bundle: Path) -> Path:
    from gpuops.bundle import write_manifest

    manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("sha256", "files", "schema")})
    return bundle


def test_a_version_that_cannot_be_loaded_changes_nothing(place: Place) -> None:
    bundle = place.bundle("2")
    dies_when_loaded(bundle)
    with Asking(place.server.http_url, (0.5,)) as asking:
        made = place.rollout(reseal(bundle))
    assert not made.promoted
    assert made.serving == (1,)
    assert asking.wrong == []
    assert set(asking.versions) == {"1"}
    place.untouched()
    assert [event.kind for event in place.ledger.events()] == ["reject"]


@pytest.mark.slow
def test_a_version_that_answers_wrongly_changes_nothing(place: Place) -> None:
    made = place.rollout(place.bundle("2", gain=0.25, golden_gain=0.3))
    assert not made.promoted
    assert "golden answer" in made.reasons[0] or "golden answers" in made.reasons[0]
    place.serves(0.5, "1")
    place.untouched()


@pytest.mark.slow
def test_a_version_that_fails_where_the_old_one_answers_is_rejected_by_the_comparison(place: Place) -> None:
    def limits_broken(count: int) -> Outcome:
        return place.rollout(place.bundle(str(count), gain=0.25), limits=Limits(1.0, 1e3, 1e3, distance=1.0))

    made = limits_broken(2)
    assert not made.promoted
    assert made.verdict is not None
    assert "answers differ by" in made.reasons[0]
    place.serves(0.5, "1")
    place.untouched()


@pytest.mark.slow
def test_a_crash_after_the_promotion_gives_the_old_version_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim of the version promoted refuses; that of the candidate does not."""
    broken = place.folder / "model.py"
    broken.write_text(
        SHIM.read_text().replace(
            "def initialize(self, args: dict[str, str]) -> None:",
            "def initialize(self, args: dict[str, str]) -> None:\n"
            '        if "candidate" not in args["model_repository"] and args["model_version"] == "2":\n'
            '            refuse("this very version")',
        )
    )
    monkeypatch.setattr("gpuops_serving.repository.SHIM", broken)
    with Asking(place.server.http_url, (0.5,)) as asking:
        made = place.rollout(place.bundle("2", gain=0.25))
    assert not made.promoted
    assert made.serving == (1,)
    assert asking.wrong == []
    place.serves(0.5, "1")
    place.untouched()


@pytest.mark.slow
def test_a_configuration_that_sticks_is_found(place: Place) -> None:
    config = place.client.raw_config("tiny")
    config["parameters"]["gpuops.version_id"] = {"string_value": "f" * 64}
    place.client._connection.load_model("tiny", config=json.dumps(config), headers=dict(place.client._address.headers))
    with pytest.raises(GpuopsError, match="override at load time sticks"):
        read_back(place.client, place.repository / "tiny")


@pytest.mark.slow
def test_a_half_written_version_is_not_loaded_and_the_old_one_answers(place: Place) -> None:
    bundle = place.bundle("2", gain=0.25)
    half = place.repository / "tiny" / "7"
    half.mkdir()
    (half / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:100])
    made = place.rollout(bundle)
    assert made.promoted
    assert made.version == 8
    place.serves(0.25, "8")


@pytest.mark.slow
def test_other_tensors_under_the_same_name_are_refused_before_anything_is_written(place: Place) -> None:
    bundle = place.bundle("2")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["signature"]["inputs"][0]["shape"] = [3, 9, 9]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its clients would fail"):
        place.rollout(reseal(bundle))
    place.untouched()


@pytest.mark.slow
def test_without_the_key_nothing_is_changed(place: Place) -> None:
    bundle = place.bundle("2", gain=0.25)
    with Client(place.server.http_url) as stranger, pytest.raises(InputError, match="restricted"):
        rollout(bundle, place.repository, stranger, ledger=place.ledger, count=5)
    place.untouched()
    place.serves(0.5, "1")


@pytest.mark.slow
def test_a_server_that_is_gone_leaves_the_rollout_to_be_gone_on_with(place: Place) -> None:
    bundle = place.bundle("2", gain=0.25)

    def kill(message: str) -> None:
        if message.startswith("comparing"):
            os.killpg(place.server.pid, signal.SIGKILL)
            os.waitid(os.P_PID, place.server.pid, os.WEXITED | os.WNOWAIT)

    with pytest.raises(UnavailableError):
        place.rollout(bundle, say=kill)
    assert place.ledger.events() == []
    place.client.close()
    place.server.stop()
    place.server = TritonServer(place.repository, control=True)
    place.server.start()
    place.client = Client(place.server.http_url, access=place.server.access)
    place.serves(0.5, "1")
    made = place.rollout(bundle)
    assert (made.promoted, made.version) == (True, 2)
    place.untouched()


ROLLOUT = """
import os, signal, sys
from gpuops.lineage.ledger import Ledger
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits
from gpuops_serving.rollout import rollout
url, key, secret, bundle, repository, ledger, stop = sys.argv[1:]
steps = []
def say(message):
    steps.append(message)
    if len(steps) == int(stop):
        os.kill(os.getpid(), signal.SIGKILL)
with Client(url, access=(key, secret)) as client, Ledger(ledger) as told:
    made = rollout(bundle, repository, client, ledger=told, count=10, limits=Limits(p50=1e3, p99=1e3), say=say)
print(made.promoted, len(steps))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("gain", "golden_gain"), [(0.25, 0.25), (0.25, 0.3)])
def test_a_rollout_killed_at_any_step_is_finished_by_the_same_command(
    tmp_path: Path, gain: float, golden_gain: float
) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    good = gain == golden_gain

    def run(place: Place, bundle: Path, stop: int) -> subprocess.CompletedProcess[str]:
        assert place.server.access is not None
        command = [sys.executable, "-c", ROLLOUT, place.server.http_url, *place.server.access, str(bundle)]
        command += [str(place.repository), str(place.folder / "ledger.sqlite"), str(stop)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    for stop in range(1, 6):
        folder = tmp_path / str(stop)
        folder.mkdir()
        place = Place(folder)
        try:
            bundle = place.bundle("2", gain=gain, golden_gain=golden_gain)
            with Asking(place.server.grpc_url, (0.5, gain)) as asking:
                first = run(place, bundle, stop)
                killed = first.returncode == -signal.SIGKILL
                last = run(place, bundle, 0) if killed else first
            assert last.returncode == 0, last.stderr
            assert asking.wrong == []
            assert set(asking.versions) <= ({"1", "2"} if good else {"1"})
            place.serves(gain if good else 0.5, "2" if good else "1")
            place.untouched()
            assert [event.kind for event in place.ledger.events()] == ["promote" if good else "reject"]
        finally:
            place.close()
        if not killed:
            break
    assert stop >= 3


@pytest.mark.slow
def test_two_hundred_reloads_under_load_fail_no_request(place: Place) -> None:
    config = place.repository / "tiny" / "config.pbtxt"
    text = config.read_text()
    with Asking(place.server.http_url, (0.5,)) as one, Asking(place.server.grpc_url, (0.5,)) as other:
        for place_in_turn in range(200):
            # A load of files that did not change does nothing, so each one has another comment.
            config.write_text(f"# {place_in_turn}\n{text}")
            os.utime(config, ns=(time.time_ns(), time.time_ns()))
            place.client.load("tiny")
    assert one.wrong == other.wrong == []
    assert min(len(one.versions), len(other.versions)) >= 20
    assert versions_in(place.repository / "tiny") == [1]


@pytest.mark.slow
def test_a_full_disk_while_publishing_leaves_everything_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    bundle, copy = place.bundle("2", gain=0.25), shutil.copyfile

    def full(source: Any, destination: Path) -> None:
        if Path(destination).name == "golden.npz":
            raise OSError(28, "No space left on device")
        copy(source, destination)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        place.rollout(bundle)
    monkeypatch.undo()
    place.serves(0.5, "1")
    made = place.rollout(bundle)
    assert made.promoted
    place.untouched()
