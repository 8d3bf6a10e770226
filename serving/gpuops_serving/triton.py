"""A Triton server that someone else built and runs: probed, compared and metered without touching its models.

    triton = Triton("http://10.0.0.7:8000")
    triton.record("goldens")        once, while its answers are trusted
    triton.probe("goldens")         any time: finds models that are dead behind HTTP 200, or answer otherwise

A golden request of such a model is recorded from the live model: what it answers now is what it must answer later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, isinf
from pathlib import Path
from typing import Any, Self

from gpuops.atomic import new_directory
from gpuops.errors import GpuopsError, InputError, IntegrityError
from gpuops.spec import Arrays
from gpuops_serving.client import Client, ModelConfig
from gpuops_serving.compare import Limits, Target, Verdict, compare
from gpuops_serving.gates import security_warnings
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.recorded import (
    Recorded,
    differences,
    example_inputs,
    recorded_in,
    rounding,
    rows,
    says_something,
)
from gpuops_serving.repository import served_versions

SAMPLES = 4
"""Samples of a recorded golden request, at most."""
REPEATS = 3
"""How often it is asked while it is recorded: an answer that varies gets that much tolerance."""
SLACK = 4.0
"""Tolerance by what varied, and by one rounding at the largest answer."""
COMPARED = 8
"""Random requests that versions are compared on if none are given."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded of a server."""

    recorded: list[Recorded]
    """Golden requests."""
    skipped: dict[str, str]
    """Why there is none, by MODEL:VERSION."""

    def to_json(self) -> dict[str, Any]:
        """JSON form, without the arrays."""
        made = [{"model": r.model, "version": r.version, "tolerance": r.tolerance} for r in self.recorded]
        return {"recorded": made, "skipped": self.skipped}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one golden request found."""

    model: str
    """Model name."""
    version: str
    """Version number."""
    ok: bool
    """Whether it was answered as recorded."""
    says_ready: bool | None
    """What the server's own health endpoint says of it; None if that was not answered."""
    ms: float | None
    """Time to the answer, milliseconds; None if there was none."""
    max_abs_diff: float | None
    """Largest absolute difference from what was recorded; None if there is no such number."""
    reason: str | None
    """What is wrong."""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Health:
    """What the golden requests of a server found."""

    findings: list[Finding]
    """One a golden request, by model and version."""
    unknown: list[str]
    """MODEL:VERSION that are ready and have no golden request, so nothing is known of them."""

    @property
    def ok(self) -> bool:
        """Whether every golden request was answered as recorded."""
        return all(finding.ok for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"ok": self.ok, "findings": [finding.to_json() for finding in self.findings], "unknown": self.unknown}


class Triton:
    """A running server.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`.
        options: What else a `Client` needs to reach it: timeout_s, tls, access, headers.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.client = Client(url, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def versions(self) -> list[Target]:
        """What is ready.

        Raises:
            InputError: the server does not show its repository's index without `access`.
            UnavailableError: it cannot be reached.
        """
        ready = {(s.name, int(s.version)) for s in self.client.models() if s.state == "READY" and s.version}
        return [Target(model, str(version)) for model, version in sorted(ready)]

    def warnings(self) -> list[str]:
        """What is known to be wrong with a server of this version (gpuops_serving.gates)."""
        return security_warnings(self.client.server_version())

    def record(
        self,
        folder: str | Path,
        *,
        inputs: Mapping[str, Arrays] | None = None,
        only: Sequence[str] = (),
        overwrite: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> Recording:
        """Record a golden request of every ready version in a new folder.

        Args:
            folder: Where they go, one folder each.
            inputs: Inputs by model; seeded random ones that fit the model's configuration otherwise.
            only: Models to record; all if empty.
            overwrite: Replace a folder that is there.
            say: Told what is recorded, and what cannot be and why.

        Raises:
            InputError: nothing could be recorded, a model to record or with inputs is not there, or the folder exists.
            UnavailableError: the server cannot be reached.
        """
        inputs = inputs or {}
        versions = self.versions()
        if gone := sorted({*only, *inputs} - {target.model for target in versions}):
            raise InputError(f"{self.client.url} has no ready model {gone[0]!r}: see `versions()`")
        recorded: list[Recorded] = []
        skipped: dict[str, str] = {}
        with new_directory(Path(folder), overwrite=overwrite) as temporary:
            for target in versions:
                if only and target.model not in only:
                    continue
                try:
                    found = self._record(target, inputs.get(target.model))
                except GpuopsError as error:
                    skipped[str(target)] = str(error)
                    say(f"{target} is not recorded: {error}")
                    continue
                found.save(temporary)
                recorded.append(found)
                tolerances = ", ".join(f"{name} {value:g}" for name, value in found.tolerance.items())
                say(f"{target} recorded, tolerance {tolerances}")
            if not recorded:
                why = "; ".join(f"{target}: {reason}" for target, reason in skipped.items()) or "none is ready"
                raise InputError(f"no model of {self.client.url} could be recorded ({why}): give inputs that it takes")
        return Recording(recorded, skipped)

    def probe(self, folder: str | Path, only: Sequence[str] = ()) -> Health:
        """Ask every recorded golden request again; a server that is away is found by that, not raised.

        Args:
            folder: Where they were recorded.
            only: Models to ask; all if empty.

        Raises:
            InputError: no golden request in the folder, or none of these models.
        """
        wanted = [recorded for recorded in recorded_in(Path(folder)) if not only or recorded.model in only]
        if not wanted:
            raise InputError(f"{folder} holds no golden request of {', '.join(only)}: record them (--record)")
        return self._health([self._probe(recorded) for recorded in wanted], only)

    def probe_repository(self, repository: str | Path, only: Sequence[str] = ()) -> Health:
        """As `probe`, with the golden requests of a repository that `gpuops deploy` wrote.

        Args:
            repository: Model repository, the server's or a copy.
            only: Models to ask; all if empty.

        Raises:
            InputError, IntegrityError: as `gpuops_serving.repository.served_versions`; or none of these models in it.
        """
        wanted = [version for version in served_versions(repository) if not only or version.name in only]
        if not wanted:
            raise InputError(f"{repository} holds no {', '.join(only)}: name models that were deployed there")
        findings = []
        for version in wanted:
            golden, tolerance = version.golden, dict.fromkeys(version.golden.outputs, version.tolerance)
            asked = Recorded(version.name, str(version.version), golden.inputs, golden.outputs, tolerance)
            findings.append(self._probe(asked, version.version_id))
        return self._health(findings, only)

    def compare(
        self,
        old: str,
        new: str,
        requests: Sequence[Arrays] | None = None,
        *,
        count: int = 400,
        limits: Limits | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Verdict:
        """Compare two versions, MODEL:VERSION each, on the same requests; seeded random ones if none are given."""
        before, after = Target.parse(old), Target.parse(new)
        if requests is None:
            config = self.client.config(before.model, before.version)
            requests = [example_inputs(config, 1, seed) for seed in range(COMPARED)]
        return compare(self.client, before, after, requests, count=count, limits=limits, progress=progress)

    def meter(self) -> ServerMeter:
        """A meter of its models, if it runs on this host."""
        return ServerMeter(self.client)

    def _record(self, target: Target, inputs: Arrays | None) -> Recorded:
        model, version = target.model, target.version
        config = self.client.config(model, version)
        if config["stateful"]:
            raise InputError("it holds state between requests, which a golden request would disturb")
        asked = dict(inputs) if inputs is not None else example_inputs(config, _samples(config))

        def ask(batch: Arrays) -> dict[str, Any]:
            return self.client.answer(model, batch, version).outputs

        answers = [ask(asked) for _ in range(REPEATS)]
        if not says_something(answers[0]):
            raise InputError("its answer holds no number at all: give inputs that it takes")
        varied = [differences(answers[0], answer) for answer in answers[1:]]
        if config["max_batch_size"]:
            # Alone a sample may run through other kernels than in a batch, and the server makes its own batches.
            alone = [ask(row) for row in rows(asked)]
            parts = [{name: array[k : k + 1] for name, array in answers[0].items()} for k in range(len(alone))]
            varied += [differences(part, answer) for part, answer in zip(parts, alone, strict=True)]
        tolerance = {}
        for name, roundings in rounding(answers[0]).items():
            tolerance[name] = SLACK * max(roundings, *(found[name] for found in varied))
            if isinf(tolerance[name]):
                raise IntegrityError(
                    f"its answers to one request differ in {name!r} by shape, text or what is a number"
                )
        return Recorded(model, version, asked, answers[0], tolerance)

    def _health(self, findings: list[Finding], only: Sequence[str]) -> Health:
        try:
            ready = {str(target) for target in self.versions() if not only or target.model in only}
        except GpuopsError:  # away, or its index is not for everyone
            ready = set()
        return Health(findings, sorted(ready - {f"{f.model}:{f.version}" for f in findings}))

    def _probe(self, recorded: Recorded, version_id: str | None = None) -> Finding:
        model, version = recorded.model, recorded.version
        try:
            says_ready = self.client.ready(model, version)
        except GpuopsError:
            says_ready = None
        start = time.perf_counter()
        try:
            outputs = self.client.answer(model, recorded.inputs, version).outputs
            ms = (time.perf_counter() - start) * 1e3
            served = version_id and self.client.version_id(model, version)
        except GpuopsError as error:
            return Finding(model, version, False, says_ready, None, None, str(error))
        worst = max(differences(recorded.outputs, outputs).values(), default=0.0)
        reason = recorded.wrong(outputs)
        if served != version_id:
            reason = f"serves version id {served}, the repository holds {version_id}"
        return Finding(model, version, reason is None, says_ready, ms, worst if isfinite(worst) else None, reason)


def _samples(config: ModelConfig) -> int:
    return min(SAMPLES, config["max_batch_size"] or 1)
