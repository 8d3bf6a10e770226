"""What reading cost, and which stage limits it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

STALLED = 0.05
"""Share of stalled time above which the reader, and not its consumer, is called the limit."""


@dataclass(slots=True)
class Counters:
    """What reading cost so far; counts do not depend on the machine."""

    samples: int = 0
    """Samples put into slots."""
    batches: int = 0
    """Slots filled."""
    requests: int = 0
    """Byte ranges asked of the store, shard indexes included."""
    retries: int = 0
    """Requests made again because the store failed."""
    bytes_read: int = 0
    """Bytes those requests returned."""
    bytes_useful: int = 0
    """Encoded bytes of the chunks that samples needed and that were not at hand decoded."""
    decodes: int = 0
    """Inner chunks decoded."""
    distinct_chunks: int = 0
    """Different inner chunks decoded, epoch by epoch."""
    filled_chunks: int = 0
    """Chunks that the store leaves out, delivered as the array's declared fill value."""
    plan_s: float = 0.0
    """Seconds in which batches were planned and shard indexes read."""
    read_s: float = 0.0
    """Seconds in which chunks were read, added up over threads."""
    decode_s: float = 0.0
    """Seconds in which chunks were decoded, added up over threads."""
    gather_s: float = 0.0
    """Seconds in which samples were cut out of decoded chunks, added up over threads."""
    stall_s: float = 0.0
    """Seconds in which the consumer waited for a batch that was not ready."""
    wall_s: float = 0.0
    """Seconds from the first batch asked for to the last delivered, added up over epochs."""
    held_bytes: int = 0
    """Most bytes held at one time: slots read ahead, encoded and decoded chunks, shard indexes."""
    budget_bytes: int = 0
    """Bytes that may be held."""

    def add(self, other: Counters) -> None:
        """Add another reader's costs; of the largest amounts held, the larger."""
        for name in _ADDED:
            if theirs := getattr(other, name):
                setattr(self, name, getattr(self, name) + theirs)
        for name in _PEAKS:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    def to_json(self) -> dict[str, Any]:
        """All counters, and what is usually asked of them; a ratio of nothing is null."""
        return {
            **asdict(self),
            "requests_per_sample": _ratio(self.requests, self.samples),
            "decodes_per_sample": _ratio(self.decodes, self.samples),
            "decodes_per_distinct_chunk": _ratio(self.decodes, self.distinct_chunks),
            "bytes_per_useful_byte": _ratio(self.bytes_read, self.bytes_useful),
            "stall_share": _ratio(self.stall_s, self.wall_s),
            "limiting_stage": self.limiting_stage,
        }

    @property
    def limiting_stage(self) -> str | None:
        """What to make faster: "consumer" if batches were ready in time, else the stage that took the most seconds."""
        if not self.wall_s:
            return None
        if self.stall_s <= STALLED * self.wall_s:
            return "consumer"
        stages = {"plan": self.plan_s, "read": self.read_s, "decode": self.decode_s, "gather": self.gather_s}
        return max(stages, key=lambda name: stages[name])

    def line(self) -> str:
        """One line for a log."""
        found = self.to_json()

        def show(key: str, form: str) -> str:
            return "none" if found[key] is None else format(found[key], form)

        return (
            f"data: {self.samples:,} samples, {show('requests_per_sample', '.2f')} requests a sample, "
            f"{show('bytes_per_useful_byte', '.3f')} bytes read a useful byte, "
            f"{show('decodes_per_distinct_chunk', '.2f')} decodes a distinct chunk, "
            f"stalled {show('stall_share', '.1%')} of the time, limited by the {self.limiting_stage or 'consumer'}; "
            f"{self.held_bytes / 1e6:.0f} of {self.budget_bytes / 1e6:.0f} MB held"
        )


_PEAKS = ("held_bytes", "budget_bytes")
_ADDED = tuple(field.name for field in fields(Counters) if field.name not in _PEAKS)


def _ratio(value: float, of: float) -> float | None:
    return value / of if of else None
