"""Rollouts on a real server: a good version takes over, a bad one changes nothing, and nobody notices either."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import ANYTHING, GOLDEN, LIES, LIES_PROMOTED, REFUSES_PROMOTION, Asking, Model, Place, reseal, sabotaged
from tiny_bundle import SIGNATURE, make_bundle

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.lineage.ledger import Ledger
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits
from gpuops_serving.config import Options, options_of, read_config
from gpuops_serving.readback import read_back
from gpuops_serving.repository import deploy, served_versions_of, versions_in
from gpuops_serving.rollout import Outcome, roll_back, rollout
from gpuops_serving.scheduling import Batching

ROOT = Path(__file__).parents[2]
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("rollouts"))
    yield made
    made.close()


@pytest.fixture
def model(place: Place, tmp_path: Path) -> Iterator[Model]:
    """A model of its own, version 1 with gain 0.5."""
    made = Model(place, f"m{next(NUMBERS)}", tmp_path / "model")
    made.deploy(made.bundle("1"))
    yield made
    made.close()


def test_a_good_version_takes_over_and_the_one_before_stays_for_who_names_it(model: Model) -> None:
    with Asking(model.place.server.grpc_url, model.name, {"1": 0.5, "2": 0.25}) as asking:
        made = model.rollout(model.bundle("2", gain=0.25))
    assert (made.promoted, made.version, made.serving, made.reasons) == (True, 2, (1, 2), ())
    assert asking.wrong == []
    assert asking.numbers() in ([1], [1, 2])  # never back
    model.serves(0.25, "2")
    assert model.client.answer(model.name, GOLDEN.inputs, "1").version == "1"
    model.clean()
    (event,) = model.ledger.events()
    assert (event.kind, event.body["version_id"]) == ("promote", "2" * 64)
    assert event.body["verdict"]["ok"]
    assert event.body["verdict"]["distances"]["y"]["max_abs"] > 1
    again = model.rollout(model.folder / "2")
    assert (again.promoted, again.version, len(model.ledger.events())) == (True, 2, 1)  # it serves already
    back = roll_back(model.repository, model.name, model.client, ledger=model.ledger)
    assert (back.serving, back.version, back.promoted) == ((1,), 2, False)
    model.serves(0.5, "1")
    assert [event.kind for event in model.ledger.events()] == ["promote", "roll-back"]
    again = model.rollout(model.bundle("3", gain=0.75))
    assert (again.promoted, again.version) == (True, 3)  # numbers are not used twice
    roll_back(model.repository, model.name, model.client, ledger=model.ledger)
    with pytest.raises(InputError, match="no version but 1"):
        roll_back(model.repository, model.name, model.client, ledger=model.ledger)
    model.serves(0.5, "1")


def test_the_same_weights_with_a_larger_batch_are_another_version(model: Model) -> None:
    signature = dataclasses.replace(SIGNATURE, max_batch=SIGNATURE.max_batch + 1)
    bundle = reseal(make_bundle(model.folder / "larger", version_id="1" * 64), signature=signature.to_json())
    made = model.rollout(bundle)
    assert (made.promoted, made.version, made.version_id) == (True, 2, "1" * 64)
    assert model.rollout(bundle).version == 2  # and now it serves already


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "m.candidate"])
def test_a_name_that_leads_out_of_the_repository_is_refused_before_anything(tmp_path: Path, name: str) -> None:
    (tmp_path / "models").mkdir()
    bundle = make_bundle(tmp_path / "bundle")
    with Client("grpc://127.0.0.1:9") as client, Ledger(tmp_path / "ledger.sqlite") as ledger:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="model name"):
            roll_back(tmp_path / "models", name, client, ledger=ledger)
        with pytest.raises(InputError, match="model name"):
            rollout(bundle, tmp_path / "models", client, ledger=ledger, name=name)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_version_that_cannot_be_loaded_changes_nothing(model: Model) -> None:
    bundle = model.bundle("2")
    (bundle / "model.onnx").write_bytes(b"no graph")
    with Asking(model.place.server.http_url, model.name, {"1": 0.5}) as asking:
        made = model.rollout(reseal(bundle))
    assert (made.promoted, made.serving, made.verdict) == (False, (1,), None)
    assert "model.onnx" in made.reasons[0]
    assert asking.wrong == []
    model.clean()
    assert versions_in(model.path) == [1]
    assert [event.kind for event in model.ledger.events()] == ["reject"]


@pytest.mark.parametrize("how", ["its own self-test finds it", "only the golden request finds it"])
def test_a_version_that_answers_wrongly_changes_nothing(model: Model, how: str) -> None:
    with Asking(model.place.server.http_url, model.name, {"1": 0.5}) as asking:
        if "self-test" in how:
            made = model.rollout(model.bundle("2", gain=0.25, golden_gain=0.3))
        else:
            made = model.rollout_sabotaged(model.bundle("2", gain=0.25), LIES)
    assert not made.promoted
    assert "golden answer" in made.reasons[0]
    assert asking.wrong == []
    model.serves(0.5, "1")
    model.clean()


@pytest.mark.slow
def test_a_version_that_the_comparison_condemns_changes_nothing_and_the_ledger_says_why(model: Model) -> None:
    made = model.rollout(model.bundle("2", gain=0.25), limits=Limits(p50=1e3, p99=1e3, distance=1.0))
    assert not made.promoted
    assert made.verdict is not None
    assert "answers differ by" in made.reasons[0]
    model.serves(0.5, "1")
    model.clean()
    (event,) = model.ledger.events("reject")
    assert event.body["verdict"]["distances"]["y"]["max_abs"] > 1.0
    assert event.body["reasons"] == list(made.reasons)


@pytest.mark.parametrize("how", ["it does not load", "it answers wrongly"])
def test_a_promotion_that_goes_wrong_gives_the_old_versions_back(model: Model, how: str) -> None:
    model.rollout(model.bundle("2", gain=0.25))
    before = (model.path / "config.pbtxt").read_text()
    with Asking(model.place.server.http_url, model.name, {"2": 0.25}) as asking:
        made = model.rollout_sabotaged(
            model.bundle("3", gain=0.75), REFUSES_PROMOTION if "load" in how else LIES_PROMOTED
        )
    assert (made.promoted, made.serving) == (False, (1, 2))
    assert ("refuses to serve" if "load" in how else "differs from its golden answers") in made.reasons[0]
    # One that answers rightly under the candidate's name and wrongly under its own can be the default for a moment.
    assert asking.wrong == [] or "wrongly" in how
    assert {state.version for state in model.client.models() if (state.name, state.state) == (model.name, "READY")} == {
        "1",
        "2",
    }
    model.serves(0.25, "2")
    assert model.client.answer(model.name, GOLDEN.inputs, "1").version == "1"
    assert (model.path / "config.pbtxt").read_text() == before
    assert versions_in(model.path) == [1, 2]
    model.clean()


@pytest.mark.slow
def test_the_first_version_of_a_model_is_rolled_out_too_or_leaves_no_model(place: Place, tmp_path: Path) -> None:
    model = Model(place, f"m{next(NUMBERS)}", tmp_path / "model")
    made = model.rollout_sabotaged(model.bundle("1"), REFUSES_PROMOTION)
    assert (made.promoted, made.serving, made.verdict) == (False, (), None)
    assert sorted(path.name for path in model.repository.iterdir()) == model.beside
    assert model.name not in {state.name for state in model.client.models() if state.state == "READY"}
    made = model.rollout(model.folder / "1")
    assert (made.promoted, made.version, made.serving) == (True, 1, (1,))
    model.serves(0.5, "1")
    model.clean()
    model.close()


@pytest.mark.slow
def test_a_new_version_is_served_as_the_one_before_was(model: Model) -> None:
    options = Options(instances=2, threads=1, batching=Batching((4,), 50, 100, 10**6), tags={"team": "weather"})
    deploy(model.bundle("2", gain=0.25), model.repository, name=model.name, options=options)
    model.client.load(model.name)
    seen = []

    def look(message: str) -> None:
        if message.startswith("comparing"):
            seen.append(options_of(read_config(model.repository / f"{model.name}.candidate" / "config.pbtxt")))

    assert model.rollout(model.bundle("3", gain=0.75), say=look).promoted
    version = model.client.server_version()
    assert [found.instances for found in seen] == [2]
    found = options_of(read_config(model.path / "config.pbtxt"), version)
    assert found == dataclasses.replace(options, server_version=version)


@pytest.mark.slow
def test_a_configuration_that_sticks_is_found(model: Model) -> None:
    config = model.client.raw_config(model.name)
    for change in (
        {"parameters": {**config["parameters"], "gpuops.version_id": {"string_value": "f" * 64}}},
        {"parameters": {**config["parameters"], "gpuops.version_id.9": {"string_value": "f" * 64}}},
        {"instance_group": [{"kind": "KIND_CPU", "count": 2}]},
        {"max_batch_size": 3, "dynamic_batching": {}},
    ):
        override = json.dumps({**config, **change})
        with Client(model.place.server.http_url, access=model.place.server.access) as client:
            client._connection.load_model(model.name, config=override, headers=dict(client._address.headers))
        name = next(iter(change))
        with pytest.raises(IntegrityError, match=f"(version ids|{name}).*override at load time sticks"):
            read_back(model.client, model.path)
    bundle = model.bundle("2", gain=0.25)
    with pytest.raises(IntegrityError, match="sticks"):  # a rollout does not start from there
        model.rollout(bundle)
    model.client.unload(model.name)
    model.client.load(model.name)
    read_back(model.client, model.path)
    model.clean()


def test_other_tensors_under_the_same_name_are_refused_before_anything_is_written(model: Model) -> None:
    for place, change in enumerate(({"shape": [3, 9, 9]}, {"dtype": "int8"}, {"scale": 0.5}, {"name": "b"})):
        bundle = model.bundle(f"{place + 2}")
        signature = json.loads(json.dumps(SIGNATURE.to_json()))
        signature["inputs"][0] |= change
        with pytest.raises(InputError, match="its clients would fail"):
            model.rollout(reseal(bundle, signature=signature))
    bundle = model.bundle("8")
    with pytest.raises(InputError, match="its clients would fail"):
        model.rollout(reseal(bundle, signature=SIGNATURE.to_json() | {"max_batch": 4}))
    model.clean()
    assert model.ledger.events() == []


@pytest.mark.slow
def test_without_the_key_nothing_is_changed(model: Model) -> None:
    bundle = model.bundle("2", gain=0.25)
    with Client(model.place.server.grpc_url) as stranger, pytest.raises(InputError, match="restricted"):
        rollout(bundle, model.repository, stranger, ledger=model.ledger, name=model.name, count=5)
    model.clean()
    model.serves(0.5, "1")


@pytest.mark.slow
def test_a_repository_that_the_server_does_not_read_is_named_and_left_as_it_is(model: Model, tmp_path: Path) -> None:
    bundle = model.bundle("2", gain=0.25)
    copy = shutil.copytree(model.repository, tmp_path / "copy")
    before = sorted(copy.rglob("*"))
    for name, kind, says in (
        (model.name, InputError, f"does not see .*{model.name}.candidate"),  # as on another host, with the same models
        ("elsewhere", InputError, "does not see .*elsewhere"),
    ):
        with pytest.raises(kind, match=says):
            rollout(bundle, copy, model.client, ledger=model.ledger, name=name, count=5)
    assert sorted(copy.rglob("*")) == before
    with pytest.raises(InputError, match="no folder here"):
        rollout(bundle, tmp_path / "nowhere", model.client, ledger=model.ledger, count=5)
    deploy(bundle, copy, name=model.name)
    with pytest.raises(IntegrityError, match="another configuration"):
        rollout(bundle, copy, model.client, ledger=model.ledger, name=model.name, count=5)
    assert model.ledger.events() == []


@pytest.mark.slow
def test_one_rollout_of_a_model_runs_at_a_time_and_those_of_others_beside_it(model: Model, tmp_path: Path) -> None:
    other = Model(model.place, f"{model.name}other", tmp_path / "other")
    other.deploy(other.bundle("1"))
    first, second, beside = model.bundle("2", gain=0.25), model.bundle("3"), other.bundle("2", gain=0.25)
    refusals: list[str] = []
    promoted: list[Outcome] = []

    def meanwhile(message: str) -> None:
        if message.startswith("comparing"):
            with Client(model.place.server.grpc_url, access=model.place.server.access) as client:
                for attempt in (
                    lambda: rollout(second, model.repository, client, ledger=model.ledger, name=model.name),
                    lambda: roll_back(model.repository, model.name, client, ledger=model.ledger),
                ):
                    with pytest.raises(InputError) as caught:
                        attempt()
                    refusals.append(str(caught.value))
                promoted.append(
                    rollout(beside, other.repository, client, ledger=other.ledger, name=other.name, limits=ANYTHING)
                )

    def roll() -> None:
        with Client(model.place.server.grpc_url, access=model.place.server.access) as own:
            rollout(first, model.repository, own, ledger=model.ledger, name=model.name, say=meanwhile, limits=ANYTHING)

    thread = threading.Thread(target=roll)
    thread.start()
    thread.join()
    assert len(refusals) == 2
    assert all("another rollout" in refusal for refusal in refusals)
    assert [made.promoted for made in promoted] == [True]
    model.serves(0.25, "2")
    other.serves(0.25, "2")
    other.close()
    model.clean()


@pytest.mark.slow
def test_a_model_that_was_deployed_to_meanwhile_is_left_as_it_then_is(model: Model) -> None:
    deployed = model.bundle("3", gain=0.75)

    def meanwhile(message: str) -> None:
        if message.startswith("comparing"):
            deploy(deployed, model.repository, name=model.name)

    with pytest.raises(InputError, match="changed during the rollout"):
        model.rollout(model.bundle("2", gain=0.25), say=meanwhile)
    assert [(v.version, v.version_id[0]) for v in served_versions_of(model.path)] == [(1, "1"), (2, "3")]
    model.clean()
    assert model.ledger.events() == []


@pytest.mark.slow
def test_a_load_that_takes_longer_than_the_client_waits_is_waited_for(model: Model) -> None:
    made = model.rollout_sabotaged(model.bundle("2", gain=0.25), sabotaged('__import__("time").sleep(6)'), 3.0)
    assert made.promoted, made.reasons
    model.serves(0.25, "2")


@pytest.mark.slow
def test_clients_of_both_protocols_are_answered_while_a_version_loads(model: Model) -> None:
    """However long it takes: it ends only after they were. Over HTTP, a load lets most HTTP clients wait."""
    model.deploy(model.bundle("2", gain=0.25))
    go = model.folder / "go"
    wait = f"while not __import__('os').path.exists({str(go)!r}): __import__('time').sleep(0.01)"
    (model.path / "2" / "model.py").write_text((model.path / "2" / "model.py").read_text() + sabotaged(wait))
    ended = threading.Event()

    def load() -> None:
        with Client(model.place.server.grpc_url, access=model.place.server.access) as own:
            own.load(model.name)
            ended.set()

    loading = threading.Thread(target=load)
    loading.start()
    try:
        for url in [model.place.server.http_url, model.place.server.grpc_url] * 16:
            with Client(url) as client:
                assert client.answer(model.name, GOLDEN.inputs).version == "2"
        assert not ended.is_set()
    finally:
        go.touch()
        loading.join()
    assert ended.is_set()
    with (
        Client(model.place.server.http_url, access=model.place.server.access) as http,
        pytest.raises(InputError, match="give a grpc:// URL"),
    ):
        model.rollout(model.folder / "1", http)


def test_a_damaged_state_is_named(model: Model) -> None:
    state = model.repository / f".rollout-{model.name}.json"
    state.write_text("{")
    with pytest.raises(IntegrityError, match=f"{state.name} is not a rollout's state"):
        model.rollout(model.bundle("2"))
    state.unlink()
    model.clean()


@pytest.mark.slow
def test_a_half_written_version_is_not_served_and_its_number_not_taken(model: Model) -> None:
    bundle = model.bundle("2", gain=0.25)
    half = model.path / "7"
    half.mkdir()
    (half / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:100])
    model.client.load(model.name)
    model.serves(0.5, "1")
    made = model.rollout(bundle)
    assert (made.promoted, made.version) == (True, 8)
    model.serves(0.25, "8")


@pytest.mark.slow
def test_a_full_disk_while_publishing_leaves_the_old_version_and_can_be_gone_on_with(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, copy = model.bundle("2", gain=0.25), shutil.copyfile
    for promoting in (False, True):

        def full(source: Any, destination: Path, promoting: bool = promoting) -> None:
            if Path(destination).name == "golden.npz" and (model.path in Path(destination).parents) == promoting:
                raise OSError(28, "No space left on device")
            copy(source, destination)

        with monkeypatch.context() as patched:
            patched.setattr(shutil, "copyfile", full)
            with pytest.raises(UnavailableError, match="No space left"):
                model.rollout(bundle)
        model.serves(0.5, "1")
    assert model.rollout(bundle).promoted
    model.clean()


def interrupt(model: Model, bundle: Path, at: str) -> None:
    """A rollout that ends in the middle of a step, as by Ctrl-C."""

    def stop(message: str) -> None:
        if message.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.rollout(bundle, say=stop)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["loading", "comparing", "promoting"])
def test_an_interrupted_rollout_is_undone_by_roll_back(model: Model, at: str) -> None:
    interrupt(model, model.bundle("2", gain=0.25), at)
    with pytest.raises(InputError, match="was interrupted: give its bundle again"):
        model.rollout(model.bundle("3"))
    made = roll_back(model.repository, model.name, model.client, ledger=model.ledger)
    assert (made.promoted, made.version, made.serving, made.reasons) == (False, 2, (1,), ("rolled back by hand",))
    model.serves(0.5, "1")
    model.clean()
    assert [event.kind for event in model.ledger.events()] == ["reject"]
    assert model.rollout(model.folder / "3").promoted


@pytest.mark.slow
def test_a_roll_back_without_a_server_takes_effect_when_it_starts(model: Model) -> None:
    model.rollout(model.bundle("2", gain=0.25))
    with Client("grpc://127.0.0.1:9", access=("a", "b")) as nobody, pytest.raises(UnavailableError):
        roll_back(model.repository, model.name, nobody, ledger=model.ledger)
    assert [version.version for version in served_versions_of(model.path)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["loading", "comparing", "promoting"])
def test_a_server_killed_during_a_rollout_leaves_it_to_be_gone_on_with(tmp_path: Path, at: str) -> None:
    place = Place(tmp_path)
    model = Model(place, "tiny", tmp_path / "model")
    bundle = model.bundle("2", gain=0.25)

    def kill(message: str) -> None:
        if message.startswith(at):
            os.killpg(place.server.pid, signal.SIGKILL)
            os.waitid(os.P_PID, place.server.pid, os.WEXITED | os.WNOWAIT)

    try:
        with pytest.raises(UnavailableError):
            model.rollout(bundle, say=kill)
        assert model.ledger.events() == []  # no verdict on the version: it was not at fault
        place.close()
        place.start()
        promoting = at == "promoting"
        model.serves(0.25 if promoting else 0.5, "2" if promoting else "1")
        made = model.rollout(bundle)
        assert (made.promoted, made.version) == (True, 2)
        model.serves(0.25, "2")
        model.clean()
        assert [event.kind for event in model.ledger.events()] == ["promote"]
    finally:
        place.close()
        model.ledger.close()


@pytest.mark.slow
def test_a_server_that_was_started_anew_during_the_comparison_is_no_verdict(tmp_path: Path) -> None:
    """As under systemd: it is back on the same ports, without the candidate."""
    place = Place(tmp_path)
    model = Model(place, "tiny", tmp_path / "model")
    bundle = model.bundle("2", gain=0.25)

    def anew(message: str) -> None:
        if message.startswith("comparing"):
            ports, access, id_ = dict(place.server._ports), place.server._access, place.server._id
            os.killpg(place.server.pid, signal.SIGKILL)
            place.server.stop()
            place.server._ports, place.server._access, place.server._id = ports, access, id_
            place.server._wanted_ports = ports
            place.server.start()

    try:
        with pytest.raises(UnavailableError, match="started anew"):
            model.rollout(bundle, say=anew)
        assert model.ledger.events() == []
        model.serves(0.5, "1")
        assert model.rollout(bundle).promoted
        model.clean()
    finally:
        place.close()
        model.ledger.close()
