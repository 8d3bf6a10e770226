"""Put a new version in the old one's place while the old one answers, or leave the old one there.

    stage     the version is published as <model>.candidate, which no client asks for, and loaded
    read back what the server says it serves is what was written (a load-time override would stick)
    probe     its golden request is answered rightly
    compare   both versions get the same requests (gpuops_serving.compare)
    promote   it is published under the model's own name beside the old one, loaded, read back and probed there
    or reject the candidate is unloaded and removed, and the model's name was never touched

So whoever asks for the model without a version gets the old version until the verdict, and after a promotion that goes
wrong gets it back. Every step can be done again: what a killed rollout left is finished, or undone, by giving the same
command again. The verdict is one event in the ledger.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpuops.bundle import Bundle, read_bundle
from gpuops.energy.meter import Meter
from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops.lineage.ledger import Ledger
from gpuops.spec import Arrays
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits, Target, Verdict, compare
from gpuops_serving.config import CONFIG, VERSION_ID, Options, read_config
from gpuops_serving.probe import probe
from gpuops_serving.repository import (
    CANDIDATE,
    ServedVersion,
    publish,
    served_versions_of,
    versions_in,
    withdraw,
    write_text,
)


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


@dataclass(frozen=True, slots=True)
class _State:
    """What a rollout that was killed leaves for the next one, in REPOSITORY/.rollout-<model>.json."""

    id: str
    version_id: str
    number: int
    stage: str
    """"trial": the model's name is untouched; "promoting": it may not be."""


def rollout(
    bundle: str | Path,
    repository: str | Path,
    client: Client,
    *,
    ledger: Ledger,
    name: str | None = None,
    options: Options | None = None,
    requests: Sequence[Arrays] | None = None,
    count: int = 400,
    limits: Limits | None = None,
    meter: Meter | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Try a bundle beside the version that serves, and promote it or leave everything as it was.

    Args:
        bundle: Bundle directory.
        repository: Model repository of the server, as this host sees it.
        client: Connection to the server, with the key to load models.
        ledger: Told the verdict.
        name: Model name; the bundle's if None.
        options: How it is served.
        requests: What both versions are compared on; golden samples, one by one, if None.
        count: Requests to each version.
        limits: How much worse the new version may be.
        meter: Counts the server's GPUs; None looks for them here.
        say: Told what is being done.
        progress: Called with (requests done, requests in all) while they are compared.

    Raises:
        InputError: no bundle there, other tensors than the version that serves, or another rollout was interrupted.
        UnavailableError: the server is gone. The same call goes on when it is back.
        IntegrityError: the version that serves does not answer rightly itself; nothing was changed.
    """
    opened = read_bundle(bundle)
    work = _Rollout(opened, Path(repository), client, name or opened.name, options or Options(), say)
    client.models()  # without the key, or a server, nothing is begun
    work.refuse_other_tensors()
    before = work.serving()
    state = work.begin()
    verdict: Verdict | None = None
    try:
        if state.stage == "trial":
            work.stage(state.number)
            if before:
                say(f"comparing {before[-1].version} and {state.number} on {count} requests each")
                verdict = compare(
                    client,
                    Target(work.name, str(before[-1].version)),
                    Target(work.candidate, str(state.number)),
                    requests or opened.golden().rows(),
                    count=count,
                    limits=limits,
                    meter=meter,
                    progress=progress,
                )
                if not verdict.ok:
                    work.require_server()
                    raise IntegrityError("; ".join(verdict.reasons))
        work.promote(replace(state, stage="promoting"))
        reasons: tuple[str, ...] = ()
    except GpuopsError as error:
        if isinstance(error, UnavailableError):
            work.require_server()
        reasons = verdict.reasons if verdict is not None and not verdict.ok else (str(error),)
        say(f"rejected: {reasons[0]}")
        work.restore(state.number)
    return work.end(state, reasons, verdict, ledger)


def roll_back(
    repository: str | Path, model: str, client: Client, *, ledger: Ledger, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Serve a model without its newest version, at once; the version before answers, proved by its golden request.

    Raises:
        InputError: no version before it.
        UnavailableError, IntegrityError: the server is gone, or the version before answers wrongly.
    """
    folder = Path(repository) / model
    newest = served_versions_of(folder)[-1]
    serving = withdraw(folder, newest.version)
    say(f"serving {', '.join(map(str, serving))} without {newest.version}")
    client.load(model)
    read_back(client, folder)
    for served in served_versions_of(folder):
        probe(client, model, served.golden, served.tolerance, version=str(served.version))
    made = Outcome(model, newest.version, newest.version_id, False, ("rolled back by hand",), tuple(serving), None)
    ledger.append("roll-back", made.to_json())
    return made


def read_back(client: Client, model: Path, name: str | None = None) -> None:
    """Compare what a server says of a model with the configuration in the repository.

    Raises:
        IntegrityError: it serves something else, as after a load with an overriding configuration, which sticks.
    """
    name = name or model.name
    config = read_config(model / CONFIG)
    wanted = {key: value.string_value for key, value in config.parameters.items() if key.startswith(VERSION_ID)}
    found = {k: v for k, v in client.config(name)["parameters"].items() if k.startswith(VERSION_ID)}
    if found != wanted:
        raise IntegrityError(
            f"{client.url} serves {name!r} by another configuration than {model / CONFIG} (an override at load time "
            "sticks): unload the model and load it again"
        )
    ready = {state.version for state in client.models() if state.name == name and state.state == "READY"}
    if missing := {str(v) for v in config.version_policy.specific.versions} - ready:
        raise IntegrityError(f"{client.url}: versions {', '.join(sorted(missing))} of {name!r} are not ready")


class _Rollout:
    """The steps; each one can be done again."""

    def __init__(
        self,
        bundle: Bundle,
        repository: Path,
        client: Client,
        name: str,
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self.bundle, self.repository, self.client, self.options, self.say = bundle, repository, client, options, say
        self.name, self.candidate = name, f"{name}{CANDIDATE}"
        self.model, self.trial = repository / name, repository / f"{name}{CANDIDATE}"
        self.file = repository / f".rollout-{name}.json"

    def serving(self) -> list[ServedVersion]:
        """Versions that serve before the rollout, proved; empty if there is none."""
        if not (self.model / CONFIG).is_file():
            return []
        if (state := self._read_state()) is not None and state.stage == "promoting":
            return [v for v in served_versions_of(self.model) if v.version != state.number]
        served = served_versions_of(self.model)
        newest = served[-1]
        probe(self.client, self.name, newest.golden, newest.tolerance, version=str(newest.version))
        return served

    def refuse_other_tensors(self) -> None:
        """One name stands for one wire format: clients of the old version must be able to ask the new one."""
        if not (self.model / CONFIG).is_file():
            return
        served = read_config(self.model / CONFIG)
        signature = self.bundle.signature
        for side, specs in (("input", signature.inputs), ("output", signature.outputs)):
            has = [(t.name, tuple(t.dims)) for t in getattr(served, side)]
            wants = [(spec.name, spec.shape) for spec in specs]
            if has != wants:
                raise InputError(
                    f"{self.name!r} serves {side} {has}, the bundle has {wants}: its clients would fail; deploy it "
                    "under another name"
                )

    def begin(self) -> _State:
        """The state of an interrupted rollout of this bundle, or a new one."""
        if (state := self._read_state()) is not None:
            if state.version_id != self.bundle.version_id:
                raise InputError(
                    f"a rollout of {state.version_id[:12]} to {self.name!r} was interrupted: give its bundle again to "
                    f"finish it, or remove {self.file}"
                )
            self.say(f"going on with the rollout of version {state.number} ({state.stage})")
            return state
        number = max(versions_in(self.model), default=0) + 1
        state = _State(secrets.token_hex(8), self.bundle.version_id, number, "trial")
        self._write_state(state)
        return state

    def stage(self, number: int) -> None:
        """Publish, load, read back and probe the version under the candidate's name."""
        self.say(f"publishing version {number} as {self.candidate}")
        publish(self.bundle, self.repository, self.candidate, self.options, number=number)
        self.say(f"loading {self.candidate}")
        self._load_and_prove(self.trial, self.candidate)

    def promote(self, state: _State) -> None:
        """Publish, load, read back and probe the version under the model's own name."""
        self._write_state(state)
        self.say(f"promoting version {state.number} of {self.name}")
        publish(self.bundle, self.repository, self.name, self.options, number=state.number)
        self._load_and_prove(self.model, self.name)

    def restore(self, number: int) -> None:
        """Make the model serve what it served before, if a promotion had begun."""
        state = self._read_state()
        if state is None or state.stage != "promoting" or number not in versions_in(self.model):
            return
        if (self.model / CONFIG).is_file() and len(versions_in(self.model)) > 1:
            withdraw(self.model, number)
            self._load_and_prove(self.model, self.name)
        else:  # the first version of all
            self.client.unload(self.name)
            shutil.rmtree(self.model, ignore_errors=True)

    def end(self, state: _State, reasons: tuple[str, ...], verdict: Verdict | None, ledger: Ledger) -> Outcome:
        """Remove the candidate, tell the ledger once, forget the state."""
        if self.trial.is_dir():
            with suppress(InputError):  # it was never loaded
                self.client.unload(self.candidate)
            shutil.rmtree(self.trial, ignore_errors=True)
        served = tuple(v.version for v in served_versions_of(self.model)) if (self.model / CONFIG).is_file() else ()
        made = Outcome(self.name, state.number, state.version_id, not reasons, reasons, served, verdict)
        kind = "promote" if made.promoted else "reject"
        if not any(event.body.get("rollout") == state.id for event in ledger.events(kind)):
            ledger.append(kind, {"rollout": state.id, **made.to_json()})
        self.file.unlink(missing_ok=True)
        return made

    def require_server(self) -> None:
        """Raise UnavailableError if the server itself is gone, rather than one of its models."""
        self.client.server_version()

    def _load_and_prove(self, model: Path, name: str) -> None:
        self.client.load(name)
        read_back(self.client, model, name)
        for served in served_versions_of(model):
            probe(self.client, name, served.golden, served.tolerance, version=str(served.version))

    def _read_state(self) -> _State | None:
        try:
            return _State(**json.loads(self.file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise IntegrityError(f"{self.file} is not a rollout's state ({error}): remove it") from error

    def _write_state(self, state: _State) -> None:
        self.repository.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(asdict(state)) + "\n")
