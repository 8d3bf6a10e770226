"""Put a new version in the old one's place while the old one answers, or leave the old one there.

    stage     the version is published as <model>.candidate, which no client asks for, and loaded
    read back what the server says it serves is what was written (a load-time override would stick)
    probe     its golden request is answered rightly
    compare   both versions get the same requests (gpuops_serving.compare)
    promote   it is published under the model's own name beside the old one, loaded, read back and probed there
    or reject the candidate is unloaded and removed, and the model is as it was

So whoever asks for the model without a version gets the old version until the verdict, and after a promotion that goes
wrong gets it back. Every step can be done again: what a killed rollout left is finished, or undone, by giving the same
command again, and `roll_back` undoes it. One rollout of a model runs at a time. The verdict is one event in the ledger.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpuops.bundle import MANIFEST, Bundle, read_bundle
from gpuops.energy.meter import Meter
from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops.lineage.ledger import Ledger
from gpuops.spec import Arrays, Signature
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits, Target, Verdict, compare
from gpuops_serving.config import CONFIG, Options, options_of, read_config, served_version_ids
from gpuops_serving.folders import holds, named, sources
from gpuops_serving.probe import probe
from gpuops_serving.readback import prove, read_back
from gpuops_serving.repository import (
    CANDIDATE,
    ServedVersion,
    publish,
    require_name,
    served_versions_of,
    versions_in,
    withdraw,
    write_text,
)
from gpuops_serving.rollout_state import State, StateFile

LOAD_TIMEOUT_S = 600.0
"""Longest wait for a model to load: a client's own timeout is for answers, and torch alone may need as long."""
DROP_TIMEOUT_S = 10.0
"""Longest wait for the server to drop a model: Triton never drops one whose process has died."""
_LOOK_S = 0.05
_BUSY = ("LOADING", "UNLOADING")
BY_HAND = "rolled back by hand"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rollout ended."""

    model: str
    """Model name."""
    version: int
    """Number of the version that was tried."""
    version_id: str
    """Its version id."""
    promoted: bool
    """Whether it serves now."""
    reasons: tuple[str, ...]
    """Why it does not; empty if it does."""
    serving: tuple[int, ...]
    """Versions that serve now, the last one by default."""
    verdict: Verdict | None
    """The comparison; None if there was nothing to compare with, or it did not come to that."""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "verdict": None if self.verdict is None else self.verdict.to_json()}


def rollout(
    bundle: str | Path,
    repository: str | Path,
    client: Client,
    *,
    ledger: Ledger,
    name: str | None = None,
    options: Options | None = None,
    plan: Path | None = None,
    keys: Sequence[Path] | None = None,
    requests: Sequence[Arrays] | None = None,
    count: int = 400,
    limits: Limits | None = None,
    meter: Meter | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Try a bundle beside the version that serves, and promote it or leave everything as it was.

    A bundle that serves already changes nothing, unless `options` are given.

    Args:
        bundle: Bundle directory.
        repository: Model repository of the server, as this host sees it.
        client: Connection to the server over gRPC, with the key to load models.
        ledger: Told the verdict.
        name: Model name; the bundle's if None.
        options: How it is served; as the version before, if None.
        plan: TensorRT engine, for that backend.
        keys: Public keys of which one must have signed the bundle; see `deploy`.
        requests: What both versions are compared on; golden samples, one by one, if None.
        count: Requests to each version.
        limits: How much worse the new version may be.
        meter: Counts the server's GPUs; None takes this host's if the server runs here.
        say: Told what is being done.
        progress: Called with (requests done, requests in all) while they are compared.

    Raises:
        InputError: not over gRPC, no bundle there, other tensors than the version that serves, a repository that is not
            the server's, another rollout under way or interrupted, or a model that was changed meanwhile.
        UnavailableError: the server is gone. The same call goes on when it is back.
        IntegrityError: the bundle is damaged or not signed, or the version that serves does not answer rightly itself;
            nothing was changed.
    """
    if not client.grpc:
        raise InputError(
            f"{client.url}: while a model is loaded over HTTP, Triton lets most other HTTP clients wait: give a "
            "grpc:// URL, clients of both are then answered throughout"
        )
    opened = read_bundle(bundle)
    work = _Rollout(named(repository), opened.name if name is None else name, client, say)

    def put(place: str) -> None:
        publish(opened, work.repository, place, chosen, number=state.number, plan=plan, keys=keys)

    def judge(old: Target, new: Target) -> Verdict:
        say(f"comparing {old.version} and {new.version} on {count} requests each")
        asked = requests or opened.golden().rows()
        return compare(client, old, new, asked, count=count, limits=limits, meter=meter, progress=progress)

    with work.states.alone():
        client.models()  # without the key, or a server, nothing is begun
        found = work.states.read()
        if found is None:
            work.check_before(opened)
            served = work.served()
            if options is None and served and work.is_there(opened, served[-1], plan):
                say(f"version {served[-1].version} is this bundle and serves already")
                return work.outcome(State("", opened.version_id, served[-1].version, None, "promoted"))
            found = work.begin(opened)
        elif found.version_id != opened.version_id:
            raise InputError(
                f"a rollout of {found.version_id[:12]} to {work.name!r} was interrupted: give its bundle again to "
                "finish it, or roll back to undo it"
            )
        else:
            say(f"going on with the rollout of version {found.number} ({found.stage})")
        state, chosen = found, work.options() if options is None else options
        if state.stage == "trial":
            state = work.states.write(work.tried(state, put, judge))
        if state.stage == "promoting":
            state = work.states.write(work.promoted(state, put))
        if state.stage == "rejected":
            say(f"rejected: {state.reasons[0]}")
            work.restore(state)
        return work.end(state, ledger)


def roll_back(
    repository: str | Path, model: str, client: Client, *, ledger: Ledger, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Undo an interrupted rollout; if there is none, serve a model without its newest version, at once and proved.

    The repository is changed first, so that a server which is down serves the version before when it comes up.

    Returns:
        What was undone and what serves now.

    Raises:
        InputError: no such model here, no version before it, or a rollout is under way.
        UnavailableError, IntegrityError: the server is gone, or the version before answers wrongly.
    """
    work = _Rollout(named(repository), model, client, say)
    with work.states.alone():
        state = work.states.read()
        if state is not None and state.stage != "promoted":
            say(f"undoing the rollout of version {state.number} ({state.stage})")
            state = work.states.write(replace(state, stage="rejected", reasons=state.reasons or (BY_HAND,)))
            work.restore(state)
            return work.end(state, ledger)
        if state is not None:
            work.end(state, ledger)
        newest = served_versions_of(work.model)[-1]
        served = (work.model / CONFIG).read_text()
        left = withdraw(work.model, newest.version)
        say(f"serving {', '.join(map(str, left))} without {newest.version}")
        try:
            work.load_and_prove(work.model)
        except (InputError, IntegrityError):  # the server has it and cannot serve it: better the version that answers
            write_text(work.model / CONFIG, served)
            raise
        made = work.outcome(State("", newest.version_id, newest.version, None, "rejected", (BY_HAND,)))
        ledger.append("roll-back", made.to_json())
        return made


class _Rollout:
    """The steps; each one can be done again."""

    def __init__(self, repository: Path, name: str, client: Client, say: Callable[[str], None]) -> None:
        self.repository, self.name, self.client, self.say = repository, require_name(name), client, say
        self.model, self.trial = repository / name, repository / f"{name}{CANDIDATE}"
        self.states = StateFile(repository, name)

    def served(self) -> list[ServedVersion]:
        """Versions that the repository serves; none if the model is new."""
        return served_versions_of(self.model) if (self.model / CONFIG).is_file() else []

    def options(self) -> Options:
        """How the model is served, so that both versions are; as `deploy` does if it is new."""
        server = self.client.server_version()
        if not (self.model / CONFIG).is_file():
            return Options(server_version=server)
        return options_of(read_config(self.model / CONFIG), server)

    def check_before(self, bundle: Bundle) -> None:
        """Refuse a bundle that clients of the model could not ask, and a model that is not served as it should be."""
        served = self.served()
        if not served:
            return
        newest = served[-1]
        manifest = json.loads((self.model / str(newest.version) / MANIFEST).read_text())
        was, now = Signature.from_json(manifest["signature"]), bundle.signature
        if (was.inputs, was.outputs) != (now.inputs, now.outputs) or was.max_batch > now.max_batch:
            raise InputError(
                f"{self.name!r} serves {was}, the bundle has {now}: its clients would fail or misread; deploy it under "
                "another name"
            )
        self._require_seen(self.model)
        read_back(self.client, self.model)
        probe(self.client, self.name, newest.golden, newest.tolerance, version=str(newest.version))

    def is_there(self, bundle: Bundle, version: ServedVersion, plan: Path | None) -> bool:
        """Whether a version is the bundle, as `deploy` would write it; the same weights alone do not make it so."""
        if version.version_id != bundle.version_id:
            return False
        return holds(self.model / str(version.version), sources(bundle, self.options(), plan), bundle)

    def begin(self, bundle: Bundle) -> State:
        """A new rollout's state; what one whose state was removed by hand may have left is removed."""
        self.discard()
        config = (self.model / CONFIG).read_text() if self.served() else None
        number = max(versions_in(self.model), default=0) + 1
        return self.states.write(State(secrets.token_hex(8), bundle.version_id, number, config, "trial"))

    def tried(self, state: State, put: Callable[[str], None], judge: Callable[[Target, Target], Verdict]) -> State:
        """Publish, load, read back and probe the version under the candidate's name, and compare it."""
        self.say(f"publishing version {state.number} as {self.trial.name}")
        try:
            put(self.trial.name)
            self._require_seen(self.trial)
        except (InputError, IntegrityError):  # nothing was tried, so there is no verdict
            self.discard()
            self.states.remove()
            raise
        self.say(f"loading {self.trial.name}")
        try:
            self.load_and_prove(self.trial)
        except GpuopsError as error:
            return self._rejected(state, error)
        if not (served := self.served()):
            return replace(state, stage="promoting")
        verdict = judge(Target(self.name, str(served[-1].version)), Target(self.trial.name, str(state.number)))
        if verdict.old.failed or verdict.new.failed:
            try:
                read_back(self.client, self.trial)
            except (InputError, IntegrityError) as error:
                raise UnavailableError(
                    f"the server was started anew meanwhile: give the command again ({error})"
                ) from error
        stage = "promoting" if verdict.ok else "rejected"
        return replace(state, stage=stage, reasons=verdict.reasons, verdict=verdict.to_json())

    def promoted(self, state: State, put: Callable[[str], None]) -> State:
        """Publish, load, read back and probe the version under the model's own name."""
        config = (self.model / CONFIG).read_text() if (self.model / CONFIG).is_file() else None
        if config != state.config and not self._points_to(state):
            self.discard()
            self.states.remove()
            raise InputError(f"{self.model} was changed during the rollout (a deployment?): start it again")
        self.say(f"promoting version {state.number} of {self.name}")
        put(self.name)
        try:
            self.load_and_prove(self.model)
        except GpuopsError as error:
            return self._rejected(state, error)
        return replace(state, stage="promoted")

    def restore(self, state: State) -> None:
        """Make the model serve what it served before, if a promotion had begun."""
        folder = self.model / str(state.number)
        if state.config is None:
            if self.model.is_dir():
                self._unload(self.name)
                shutil.rmtree(self.model)
        elif folder.is_dir():
            if self._points_to(state):
                write_text(self.model / CONFIG, state.config)
            self.load_and_prove(self.model)
            shutil.rmtree(folder)  # last: as long as it is there, this is not done

    def end(self, state: State, ledger: Ledger) -> Outcome:
        """Remove the candidate, tell the ledger once, forget the state."""
        self.discard()
        made = self.outcome(state)
        if not any(event.body.get("rollout") == state.id for event in ledger.events()):
            ledger.append("promote" if made.promoted else "reject", {"rollout": state.id, **made.to_json()})
        self.states.remove()
        return made

    def outcome(self, state: State) -> Outcome:
        """What a state means for the caller."""
        verdict = None if state.verdict is None else Verdict.from_json(state.verdict)
        serving = tuple(version.version for version in self.served())
        promoted = state.stage == "promoted"
        return Outcome(self.name, state.number, state.version_id, promoted, state.reasons, serving, verdict)

    def discard(self) -> None:
        """Remove the candidate from the server and the repository."""
        if self.trial.is_dir():
            self._unload(self.trial.name)
            shutil.rmtree(self.trial)

    def load_and_prove(self, model: Path) -> None:
        """Load a model; it must be served as its folder says, and every version must answer rightly."""
        try:
            self.client.load(model.name)
        except UnavailableError as error:  # it may only have taken longer than the client waits
            self._settled(model.name, LOAD_TIMEOUT_S)
            try:
                read_back(self.client, model)
            except GpuopsError:
                raise error from None
        else:
            read_back(self.client, model)
        prove(self.client, model)

    def _unload(self, name: str) -> None:
        """Make the server drop a model, if it has it; returns when it has, or will not.

        Triton 2.51 can crash if one model's load fails while another one is still being unloaded.
        """
        try:
            with suppress(InputError):  # it was never loaded
                self.client.unload(name)
        except UnavailableError:  # it may only have taken longer than the client waits
            self.client.server_version()
        if not self._settled(name, DROP_TIMEOUT_S):
            self.say(f"the server does not let go of {name}, whose process may have died; it will when it is restarted")

    def _settled(self, name: str, timeout_s: float) -> bool:
        """Whether a model is no longer being loaded or unloaded, at the latest after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while any(state.name == name and state.state in _BUSY for state in self.client.models()):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
        return True

    def _rejected(self, state: State, error: GpuopsError) -> State:
        """The verdict that an error is, unless it is the server that is gone."""
        if isinstance(error, UnavailableError):
            self.client.server_version()
        return replace(state, stage="rejected", reasons=(str(error),))

    def _points_to(self, state: State) -> bool:
        """Whether the model's configuration serves the version on trial."""
        if not (self.model / CONFIG).is_file():
            return False
        return served_version_ids(read_config(self.model / CONFIG)).get(state.number) == state.version_id

    def _require_seen(self, model: Path) -> None:
        """Raise InputError unless the server reads the repository that is named."""
        if model.name not in {state.name for state in self.client.models()}:
            raise InputError(
                f"the server at {self.client.url} does not see {model}: give the repository that it reads, on its host"
            )
