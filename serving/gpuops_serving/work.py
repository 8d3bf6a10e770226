"""What a server did between two looks at it, by model version: Triton's statistics and configurations, read with care.

Statistics begin anew when a version is loaded or the server starts; warm-up requests are in them; an ensemble's hold
the computing time of its steps once more; and those of streaming and in-flight batching backends do not say who
computed when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuops_serving.config import VERSION_ID

Key = tuple[str, str]
"""(model, version)."""
Statistics = Sequence[Mapping[str, Any]]
"""As `Client.statistics` gives them."""

STREAMS = "streams its answers, so its statistics do not say who computed when"
IN_FLIGHT = "batches requests in flight, so its statistics do not say who computed when"
ENSEMBLE = "an ensemble: its joules are those of the models that it calls"
IN_FLIGHT_BACKENDS = ("tensorrtllm", "vllm")
_PARTS = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True, slots=True)
class Served:
    """What a version's configuration says of where and how it computes."""

    gpus: tuple[int, ...] | None = None
    """Numbers of the GPUs that have instances of it; () is every GPU, None is the CPU only."""
    instances: int = 1
    """Instances, on all GPUs together; for () those on one."""
    warm_up: int = 0
    """Requests that the server itself sends each time it loads it; they are in the statistics."""
    version_id: str | None = None
    """Version id, where gpuops deployed it."""
    why_unknown: str | None = None
    """Why its joules cannot be known, whatever is measured; None if they can be."""

    @classmethod
    def of(cls, config: Mapping[str, Any], version: str) -> Served:
        """From a model's configuration as the server gives it."""
        groups = config.get("instance_group", [])
        gpus, everywhere, instances, copies = set[int](), False, 0, 0
        for group in groups:
            numbered, count = {int(gpu) for gpu in group.get("gpus", [])}, int(group.get("count", 1))
            copies += count * max(len(numbered), 1)
            if group.get("kind") != "KIND_CPU":
                gpus |= numbered
                everywhere |= not numbered
                instances += count * max(len(numbered), 1)
        # A sample of batch size n is sent as n requests, `count` times to each instance (0 means once).
        warm_up = copies * sum(
            int(sample.get("batch_size", 1)) * max(int(sample.get("count", 0)), 1)
            for sample in config.get("model_warmup", [])
        )
        parameters = config.get("parameters", {})
        named = parameters.get(f"{VERSION_ID}.{version}", {}).get("string_value")
        placed = () if everywhere else tuple(sorted(gpus)) or None
        return cls(placed, max(instances, 1), warm_up, named, _why_unknown(config))

    def on(self, gpus: Sequence[str]) -> tuple[str, ...]:
        """Those of the GPUs, in the server's order, that it has instances on."""
        if self.gpus is None:
            return ()
        return tuple(gpu for number, gpu in enumerate(gpus) if not self.gpus or number in self.gpus)


def _why_unknown(config: Mapping[str, Any]) -> str | None:
    if config.get("platform") == "ensemble" or "ensemble_scheduling" in config:
        return ENSEMBLE
    if config.get("model_transaction_policy", {}).get("decoupled"):
        return STREAMS
    return IN_FLIGHT if config.get("backend") in IN_FLIGHT_BACKENDS else None


@dataclass(frozen=True, slots=True)
class Done:
    """What one version did."""

    requests: int
    """Requests answered or failed, those of warm-up included."""
    cached: int
    """Those of them that the response cache answered."""
    failed: int
    """Those of them that failed."""
    executions: int
    """Batches executed."""
    busy_ns: int
    """Time in which instances computed, input and output copies included, nanoseconds."""
    anew: bool
    """Whether its counters began anew: it was loaded meanwhile, and what it did before that is not in here."""

    def __add__(self, later: Done) -> Done:
        """Both, one after the other."""
        return Done(
            self.requests + later.requests,
            self.cached + later.cached,
            self.failed + later.failed,
            self.executions + later.executions,
            self.busy_ns + later.busy_ns,
            self.anew or later.anew,
        )

    @property
    def untimed(self) -> bool:
        """Whether it answered without saying for how long it computed."""
        return self.requests - self.cached - self.failed > 0 and not self.busy_ns


@dataclass(frozen=True, slots=True)
class Work:
    """What a server did between two looks."""

    done: Mapping[Key, Done]
    """By (model, version)."""
    changed: frozenset[Key] = frozenset()
    """Versions that were loaded, loaded again or unloaded meanwhile."""

    @classmethod
    def between(cls, before: Statistics, after: Statistics) -> Work:
        """From two statistics; a version that counts anew has done what it counts now.

        It counts anew if it was not there before, or if any of its counters is lower than before.
        """
        old = {key_of(entry): entry for entry in before}
        done, changed = {}, old.keys() - {key_of(entry) for entry in after}
        for entry in after:
            key = key_of(entry)
            then = old.get(key, {})
            leaves = _leaves(entry)
            anew = key not in old or any(value > leaves.get(leaf, 0) for leaf, value in _leaves(then).items())
            if anew:
                changed |= {key}
            now, was = _counts(entry), _counts({} if anew else then)
            requests, cached, failed, executions, busy = (a - b for a, b in zip(now, was, strict=True))
            done[key] = Done(requests, cached, failed, executions, busy, anew)
        return cls(done, frozenset(changed))

    def __add__(self, later: Work) -> Work:
        """Both, one after the other."""
        keys = [*self.done, *(key for key in later.done if key not in self.done)]
        done = {key: _sum([work.done[key] for work in (self, later) if key in work.done]) for key in keys}
        return Work(done, self.changed | later.changed)


def key_of(entry: Mapping[str, Any]) -> Key:
    """(model, version) of a version's statistics."""
    return str(entry["name"]), str(entry["version"])


def _sum(parts: Sequence[Done]) -> Done:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _counts(entry: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """(requests, cached, failed, executions, nanoseconds computing) of a version's statistics."""
    stats = entry.get("inference_stats", {})

    def count(kind: str) -> int:
        return int(stats.get(kind, {}).get("count", 0))

    # Statistics by batch size count an execution once; those by request would, once for each request that it held.
    busy = sum(int(batch.get(part, {}).get("ns", 0)) for batch in entry.get("batch_stats", []) for part in _PARTS)
    executions = int(entry.get("execution_count", 0))
    return count("success") + count("fail"), count("cache_hit"), count("fail"), executions, busy


def _leaves(entry: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Every counter of a version's statistics: none of them falls but when all begin anew."""
    found: dict[tuple[str, ...], int] = {}
    for name in ("inference_count", "execution_count"):
        found[name,] = int(entry.get(name, 0))
    tables: Iterable[tuple[str, Mapping[str, Any]]] = [
        ("", entry.get("inference_stats", {})),
        *((str(batch.get("batch_size")), batch) for batch in entry.get("batch_stats", [])),
    ]
    for table, parts in tables:
        for part, counter in parts.items():
            if isinstance(counter, Mapping):
                found |= {(table, part, leaf): int(counter.get(leaf, 0)) for leaf in ("count", "ns")}
    return found
