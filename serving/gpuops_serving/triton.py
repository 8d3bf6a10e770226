"""A Triton server that someone else built and runs: probed, compared and metered without touching its models.

    triton = Triton("http://10.0.0.7:8000")
    triton.record("goldens")        once, while its answers are trusted
    triton.probe("goldens")         any time: finds models that are dead behind HTTP 200, or answer otherwise

A golden request of such a model is recorded from the live model: what it answers now is what it must answer later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gpuops.atomic import new_directory
from gpuops.bundle import Golden
from gpuops.errors import GpuopsError, InputError, IntegrityError
from gpuops.spec import Arrays
from gpuops_serving.client import Client, ModelConfig
from gpuops_serving.compare import Limits, Target, Verdict, compare
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.probe import probe

SAMPLES = 4
"""Samples of a recorded golden request, at most."""
REPEATS = 3
"""How often it is asked while it is recorded: an answer that varies gets that much tolerance."""
SLACK = 4.0
"""Tolerance by what varied; and float32 roundings allowed at the largest answer."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A golden request recorded from a live model."""

    model: str
    """Model name."""
    version: str
    """Version number."""
    golden: Golden
    """Inputs and answers."""
    tolerance: float
    """Largest absolute difference that passes."""

    def save(self, folder: Path) -> None:
        """Write golden.npz and recorded.json."""
        self.golden.save(folder / "golden.npz")
        about = {"model": self.model, "version": self.version, "tolerance": self.tolerance}
        (folder / "recorded.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Recorded:
        """Inverse of `save`; InputError if it is not there."""
        try:
            about = json.loads((folder / "recorded.json").read_text())
            return cls(about["model"], about["version"], Golden.load(folder / "golden.npz"), about["tolerance"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} holds no golden request ({error}): record it again") from error


@dataclass(frozen=True, slots=True)
class Finding:
    """What one golden request found."""

    model: str
    """Model name."""
    version: str
    """Version number."""
    ok: bool
    """Whether it was answered as recorded."""
    ms: float | None
    """Time to the answer, milliseconds; None if there was none."""
    max_abs_diff: float | None
    """Largest absolute difference from what was recorded; None if there was no answer."""
    reason: str | None
    """What is wrong."""

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


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

    def versions(self) -> list[tuple[str, str]]:
        """(model, version) of all that are ready."""
        return sorted((s.name, s.version) for s in self.client.models() if s.state == "READY" and s.version)

    def record(
        self,
        folder: str | Path,
        *,
        inputs: Mapping[str, Arrays] | None = None,
        only: Sequence[str] = (),
        overwrite: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> list[Recorded]:
        """Record a golden request of every ready version in a new folder.

        Args:
            folder: Where they go, one folder each.
            inputs: Inputs by model; seeded random ones that fit the model's configuration otherwise.
            only: Models to record; all if empty.
            overwrite: Replace a folder that is there.
            say: Told what is recorded, and what cannot be and why.

        Raises:
            InputError: nothing could be recorded, or the folder exists.
        """
        made = []
        with new_directory(Path(folder), overwrite=overwrite) as temporary:
            for model, version in self.versions():
                if only and model not in only:
                    continue
                try:
                    found = self._record(model, version, (inputs or {}).get(model))
                except GpuopsError as error:
                    say(f"{model}:{version} is not recorded: {error}")
                    continue
                place = temporary / f"{_folder(model)}-{version}"
                place.mkdir()
                found.save(place)
                made.append(found)
                say(f"{model}:{version} recorded, tolerance {found.tolerance:g}")
            if not made:
                raise InputError(f"no model of {self.client.url} could be recorded: give inputs that it takes")
        return made

    def probe(self, folder: str | Path, only: Sequence[str] = ()) -> list[Finding]:
        """Ask every recorded golden request again.

        Raises:
            InputError: no golden request in the folder.
        """
        places = sorted(Path(folder).glob("*/recorded.json"))
        if not places:
            raise InputError(f"{folder} holds no golden request: record them while the answers are trusted (--record)")
        found = [self._probe(Recorded.load(place.parent)) for place in places]
        return [finding for finding in found if not only or finding.model in only]

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
            every = example_inputs(self.client.config(before.model, before.version), 8)
            requests = Golden(dict(every), {}).rows()
        return compare(self.client, before, after, requests, count=count, limits=limits, progress=progress)

    def meter(self) -> ServerMeter:
        """A meter of its models, if it runs on this host."""
        return ServerMeter(self.client)

    def _record(self, model: str, version: str, inputs: Arrays | None) -> Recorded:
        config = self.client.config(model, version)
        asked = dict(inputs) if inputs is not None else example_inputs(config, _samples(config))
        answers = [self.client.answer(model, asked, version).outputs for _ in range(REPEATS)]
        golden = Golden(asked, answers[0])
        varied = max(golden.max_abs_diff(answer) for answer in answers)
        if not np.isfinite(varied):
            raise IntegrityError("its answers to one request differ in shape or in what is a number")
        numbers = [a[np.isfinite(a)] for a in answers[0].values() if a.dtype.kind == "f"]
        largest = max((float(np.abs(a).max(initial=0.0)) for a in numbers), default=0.0)
        return Recorded(model, version, golden, SLACK * max(varied, largest * float(np.finfo(np.float32).eps)))

    def _probe(self, recorded: Recorded) -> Finding:
        model, version = recorded.model, recorded.version
        try:
            found = probe(self.client, model, recorded.golden, recorded.tolerance, version=version)
        except GpuopsError as error:
            return Finding(model, version, False, None, None, str(error))
        return Finding(model, version, True, found.ms, found.max_abs_diff, None)


def example_inputs(config: ModelConfig, count: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random inputs that fit a model's configuration, the same for the same seed.

    Integers are 0 to 9, so that they may be indices; floats are standard normal; a free dimension is 1.

    Args:
        config: The model's configuration.
        count: Samples, for a model with a batch axis.
        seed: Of the random numbers.

    Raises:
        InputError: an input is text, which nothing can be made up for.
    """
    draw = np.random.default_rng(seed)
    made: dict[str, npt.NDArray[Any]] = {}
    for tensor in config["inputs"]:
        shape = [max(d, 1) for d in tensor["shape"]]
        shape = [count, *shape] if config["max_batch_size"] else shape
        try:
            dtype = np.dtype(tensor["dtype"])
        except TypeError:
            raise InputError(
                f"input {tensor['name']!r} is {tensor['dtype']}: give inputs for {config['name']!r}"
            ) from None
        values = (
            draw.standard_normal(shape)
            if dtype.kind == "f"
            else draw.integers(0, 10 if dtype.kind != "b" else 2, shape)
        )
        made[tensor["name"]] = values.astype(dtype)
    return made


def _samples(config: ModelConfig) -> int:
    return min(SAMPLES, config["max_batch_size"] or 1)


def _folder(model: str) -> str:
    """A model's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", model)
