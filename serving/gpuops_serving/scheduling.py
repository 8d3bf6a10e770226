"""In what order and company requests reach a model, as typed values: each one writes its part of a ModelConfig.

    Batching    waiting requests are joined; queues, time limits, priorities
    Sequences   requests of one sequence go to one instance, in order
    RateLimit   instances share named resources, across models
    Step        one model of an ensemble

What Triton would refuse when it loads the model is refused here, when the value is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import model_config_pb2

from gpuops.errors import InputError

MOST = 2**31 - 1
"""Largest count of a configuration's fields: batch sizes are int32."""
_LONGEST_US = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Queue:
    """What happens to requests of one priority that wait."""

    size: int = 0
    """Requests that may wait; more are rejected at once. 0 is no limit."""
    timeout_us: int = 0
    """Longest wait, in microseconds; 0 is no limit."""
    late: bool = False
    """Answer what waited longer after everything else, rather than reject it."""
    client_timeout: bool = False
    """A request may bring a shorter limit of its own."""

    def __post_init__(self) -> None:
        if not (0 <= self.size <= MOST and 0 <= self.timeout_us <= _LONGEST_US):
            raise InputError(
                f"a queue of {self.size} requests for {self.timeout_us} us: 0 (no limit) or more, at most {MOST} "
                f"requests and {_LONGEST_US} us"
            )


@dataclass(frozen=True, slots=True)
class Batching:
    """How Triton joins waiting requests to one batch."""

    preferred: tuple[int, ...] = ()
    """Batch sizes beyond which waiting longer brings nothing; empty joins what waits, up to the largest batch."""
    delay_us: int = 0
    """Longest wait for more requests, in microseconds; it is added to the latency of a single request."""
    queue_size: int = 0
    """Requests that may wait; more are rejected at once. 0 is no limit."""
    timeout_us: int = 0
    """A request that waited longer is rejected, in microseconds; 0 is never."""
    late: bool = False
    """Answer what waited longer after everything else, rather than reject it."""
    client_timeout: bool = False
    """A request may bring a shorter limit of its own."""
    preserve_order: bool = False
    """Answer in the order of arrival, also where instances overtake each other."""
    priorities: int = 0
    """Levels of priority, 1 the most urgent; 0 is none."""
    default_priority: int = 0
    """Level of a request that names none; with `priorities`, one of them."""
    queues: Mapping[int, Queue] = field(default_factory=dict)
    """Queue by level, where it differs from the other fields here."""

    def __post_init__(self) -> None:
        Queue(self.queue_size, self.timeout_us)
        if not 0 <= self.delay_us <= _LONGEST_US or any(not 1 <= size <= MOST for size in self.preferred):
            raise InputError(
                f"batches of {self.preferred} after {self.delay_us} us: sizes from 1 to {MOST}, microseconds from 0 to "
                f"{_LONGEST_US}"
            )
        levels = range(1, self.priorities + 1)
        fits = self.default_priority in levels if self.priorities else not self.default_priority
        if not 0 <= self.priorities <= MOST or not fits:
            raise InputError(
                f"default priority {self.default_priority} of {self.priorities}: name one of 1 (most urgent) to "
                f"{self.priorities}, or 0 with no priorities"
            )
        if wrong := sorted(level for level in self.queues if level not in levels):
            raise InputError(f"a queue for priority {wrong[0]}: there are {self.priorities} priorities, 1 the first")
        late = [self.late and self.timeout_us, *(queue.late and queue.timeout_us for queue in self.queues.values())]
        if self.preserve_order and (self.priorities > 1 or any(late)):
            raise InputError("preserve_order excludes priorities and late answers: choose one of them")

    def write(self, config: Any) -> None:
        """Write this as the configuration's `dynamic_batching`."""
        _require_fit(self.preferred, config.max_batch_size)
        dynamic = config.dynamic_batching
        dynamic.SetInParent()
        dynamic.preferred_batch_size.extend(self.preferred)
        dynamic.max_queue_delay_microseconds = self.delay_us
        dynamic.preserve_ordering = self.preserve_order
        dynamic.priority_levels = self.priorities
        dynamic.default_priority_level = self.default_priority
        default = Queue(self.queue_size, self.timeout_us, self.late, self.client_timeout)
        if default != Queue():
            _write_queue(dynamic.default_queue_policy, default)
        for level, queue in self.queues.items():
            _write_queue(dynamic.priority_queue_policy[level], queue)

    @classmethod
    def read(cls, config: Any) -> Batching:
        """Inverse of `write`."""
        dynamic = config.dynamic_batching
        default = _read_queue(dynamic.default_queue_policy)
        return cls(
            tuple(dynamic.preferred_batch_size),
            dynamic.max_queue_delay_microseconds,
            default.size,
            default.timeout_us,
            default.late,
            default.client_timeout,
            dynamic.preserve_ordering,
            dynamic.priority_levels,
            dynamic.default_priority_level,
            {level: _read_queue(policy) for level, policy in dynamic.priority_queue_policy.items()},
        )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Requests of one sequence go to one instance in their order, with what they are told of it as extra tensors.

    For models that keep a state between requests, so not for a bundle. A client names the sequence, its first and its
    last request.
    """

    idle_us: int = 1_000_000
    """A sequence that sends nothing for longer ends, and its next request is refused; microseconds."""
    candidates: int = 0
    """Sequences of which requests are joined to batches, oldest first; 0 gives each sequence a place of its own."""
    preferred: tuple[int, ...] = ()
    """With `candidates`: batch sizes beyond which waiting longer brings nothing."""
    delay_us: int = 0
    """Longest wait for more requests, in microseconds."""
    start: str = "START"
    """Input that is 1 in a sequence's first request; empty is not sent."""
    end: str = ""
    """Input that is 1 in a sequence's last request; empty is not sent."""
    ready: str = ""
    """Input that is 1 where a place of the batch holds a request; empty is not sent."""
    id: str = "CORRID"
    """Input that is the sequence's number, uint64; empty is not sent."""

    def __post_init__(self) -> None:
        names = [name for name in (self.start, self.end, self.ready, self.id) if name]
        if len(set(names)) != len(names):
            raise InputError(f"control inputs {names}: name each one differently")
        times = 1 <= self.idle_us <= _LONGEST_US and 0 <= self.delay_us <= _LONGEST_US
        if not times or not 0 <= self.candidates <= MOST or any(not 1 <= size <= MOST for size in self.preferred):
            raise InputError(
                f"{self}: sizes and microseconds from 0, idle_us and preferred sizes from 1; sizes to {MOST}, "
                f"microseconds to {_LONGEST_US}"
            )
        if self.preferred and not self.candidates:
            raise InputError("preferred batches of sequences need `candidates`, the sequences that may be joined")

    def write(self, config: Any) -> None:
        """Write this as the configuration's `sequence_batching`."""
        _require_fit(self.preferred, config.max_batch_size)
        sequence = config.sequence_batching
        sequence.max_sequence_idle_microseconds = self.idle_us
        if self.candidates:
            sequence.oldest.max_candidate_sequences = self.candidates
            sequence.oldest.preferred_batch_size.extend(self.preferred)
            sequence.oldest.max_queue_delay_microseconds = self.delay_us
        else:
            sequence.direct.max_queue_delay_microseconds = self.delay_us
            sequence.direct.SetInParent()
        kinds = model_config_pb2.ModelSequenceBatching.Control
        for name, kind in (
            (self.start, kinds.CONTROL_SEQUENCE_START),
            (self.end, kinds.CONTROL_SEQUENCE_END),
            (self.ready, kinds.CONTROL_SEQUENCE_READY),
        ):
            if name:
                sequence.control_input.add(name=name).control.add(kind=kind, int32_false_true=[0, 1])
        if self.id:
            control = sequence.control_input.add(name=self.id).control.add(kind=kinds.CONTROL_SEQUENCE_CORRID)
            control.data_type = model_config_pb2.TYPE_UINT64

    @classmethod
    def read(cls, config: Any) -> Sequences:
        """Inverse of `write`."""
        sequence = config.sequence_batching
        names = {control.kind: entry.name for entry in sequence.control_input for control in entry.control}
        kinds = model_config_pb2.ModelSequenceBatching.Control
        strategy = sequence.oldest if sequence.HasField("oldest") else sequence.direct
        return cls(
            sequence.max_sequence_idle_microseconds,
            sequence.oldest.max_candidate_sequences,
            tuple(sequence.oldest.preferred_batch_size),
            strategy.max_queue_delay_microseconds,
            names.get(kinds.CONTROL_SEQUENCE_START, ""),
            names.get(kinds.CONTROL_SEQUENCE_END, ""),
            names.get(kinds.CONTROL_SEQUENCE_READY, ""),
            names.get(kinds.CONTROL_SEQUENCE_CORRID, ""),
        )


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that instances must hold while they run."""

    name: str
    """Its name, the same in every model that uses it."""
    count: int = 1
    """How many an instance holds. A server has as many as its neediest instance, or what --rate-limit-resource says."""
    everywhere: bool = False
    """Counted once for the server, rather than once for each device."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What instances need before they may run; a server heeds it with `--rate-limit=execution_count`.

    An instance that waits for a resource holds up those that come after it, of models that need nothing too (2.51).
    """

    resources: tuple[Resource, ...] = ()
    """What each instance holds while it runs."""
    priority: int = 1
    """An instance of priority 2 runs half as often as one of priority 1."""

    def __post_init__(self) -> None:
        if any(not 1 <= number <= MOST for number in (self.priority, *(each.count for each in self.resources))):
            raise InputError(f"{self}: counts and priorities are 1 or more, at most {MOST}")
        if len({resource.name for resource in self.resources}) != len(self.resources):
            raise InputError(f"{self}: name each resource once")

    def write(self, group: Any) -> None:
        """Write this as the `rate_limiter` of a group of instances."""
        group.rate_limiter.priority = self.priority
        for resource in self.resources:
            group.rate_limiter.resources.add(
                name=resource.name, count=resource.count, **{"global": resource.everywhere}
            )

    @classmethod
    def read(cls, group: Any) -> RateLimit:
        """Inverse of `write`."""
        limiter = group.rate_limiter
        found = tuple(Resource(r.name, r.count, getattr(r, "global")) for r in limiter.resources)
        return cls(found, limiter.priority)


@dataclass(frozen=True, slots=True)
class Step:
    """One model of an ensemble and how its tensors are called there."""

    model: str
    """Model name."""
    inputs: Mapping[str, str]
    """Name in the ensemble by the model's input."""
    outputs: Mapping[str, str]
    """Name in the ensemble by the model's output; what is not named is dropped."""
    version: int = 0
    """Version number; 0 is the newest that the repository serves when the ensemble is made."""

    def write(self, ensemble: Any) -> None:
        """Add this to the configuration's `ensemble_scheduling`."""
        step = ensemble.step.add(model_name=self.model, model_version=self.version)
        step.input_map.update(self.inputs)
        step.output_map.update(self.outputs)


def _require_fit(preferred: tuple[int, ...], largest: int) -> None:
    if too_large := [size for size in preferred if size > largest]:
        raise InputError(f"preferred batch {too_large[0]} is larger than the largest batch, {largest}: name less")


def _write_queue(policy: Any, queue: Queue) -> None:
    policy.max_queue_size = queue.size
    policy.default_timeout_microseconds = queue.timeout_us
    policy.allow_timeout_override = queue.client_timeout
    policy.timeout_action = policy.DELAY if queue.late else policy.REJECT
    policy.SetInParent()


def _read_queue(policy: Any) -> Queue:
    return Queue(
        policy.max_queue_size,
        policy.default_timeout_microseconds,
        policy.timeout_action == policy.DELAY,
        policy.allow_timeout_override,
    )
