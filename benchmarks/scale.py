"""A training run of 1,024 GPUs on 1 PB in an object store, played event by event: where does the reader stall?

Every rank reads its share of each global batch ahead, within a byte budget, over a bounded number of connections. A
request waits for its prefix's turn, then for the first byte, then for the connection and the node's network; the chunk
then waits for a core. A step begins when every rank has its batch, and the slowest of 1,024 decides. A shard index that
is not cached costs a request of its own before the sample's.

Costs of decoding come from benchmarks/results/<device>/loader.json where it lies, else from --decode-s-per-gb; those of
the store from options whose defaults are published figures (docs/scale.md names them). The same --seed gives the same
numbers. `--doc FILE` puts the table between the marks in FILE; `--svg FILE` draws stall over prefixes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import harness

MARKS = ("<!-- scale: begin -->", "<!-- scale: end -->")
DECODE_S_PER_GB = 1.2
"""Used where nothing was measured: zstd 1, on 2 cores of a virtual machine."""
ENTRY_BYTES = 16
"""Of an inner chunk in a shard index."""


@dataclass(frozen=True, slots=True)
class Plant:
    """The data, the cluster and the store."""

    name: str = ""
    """What this one changes."""
    samples: int = 10**9
    """Inner chunks in the data set."""
    sample_bytes: int = 10**6
    """Stored bytes of one."""
    expansion: float = 2.0
    """Decoded bytes over stored bytes."""
    shard_bytes: int = 256 * 10**6
    """Stored bytes of a shard."""
    nodes: int = 128
    """Machines."""
    ranks: int = 8
    """GPUs of a machine."""
    cores: int = 12
    """Decoding cores of a rank."""
    batch: int = 8
    """Samples of a rank's batch."""
    step_s: float = 0.125
    """Seconds the GPUs take for a step."""
    prefixes: int = 32
    """Key prefixes that the shards are spread over."""
    requests_per_s: float = 5500.0
    """GETs that the store answers, for each prefix."""
    first_byte_s: float = 0.1
    """Median seconds to the first byte."""
    spread: float = 0.4
    """Standard deviation of that time's logarithm."""
    connection_bytes_per_s: float = 85e6
    """Of one connection."""
    node_bytes_per_s: float = 12.5e9
    """Of a machine's network."""
    connections: int = 32
    """Of a rank."""
    budget_bytes: int = 256 * 2**20
    """Decoded bytes that a rank may read ahead."""
    index_bytes: float = 64 * 2**20
    """What an index cache holds."""
    cached: float = 0.0
    """Share of samples that a node finds in its own cache."""
    index_hits: float | None = None
    """Share of samples whose shard index is cached; None: as a global shuffle gives, `index_bytes` over all indexes."""
    decode_s_per_gb: float = DECODE_S_PER_GB
    """Core seconds for a decoded gigabyte."""

    @property
    def hit(self) -> float:
        """Share of samples whose shard index is cached: a global shuffle touches every page alike."""
        if self.index_hits is not None:
            return self.index_hits
        return min(1.0, self.index_bytes / (ENTRY_BYTES * self.samples))

    @property
    def requests_per_sample(self) -> float:
        """GETs that reach the store."""
        return (1 - self.cached) * (2 - self.hit)

    @property
    def ahead(self) -> int:
        """Batches that the byte budget holds, at least the next one."""
        return max(1, int(self.budget_bytes / (self.batch * self.sample_bytes * self.expansion)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of a plant showed."""

    stall: float
    """Share of time in which the GPUs waited for data."""
    samples_per_s: float
    """Of all ranks."""
    busy: dict[str, float]
    """Share of each resource's capacity that was used."""

    @property
    def limit(self) -> str:
        """The busiest resource, or that nothing holds the run back."""
        return max(self.busy, key=self.busy.__getitem__) if self.stall > 0.02 else "the GPUs"


class Run:
    """One plant, played for a number of steps."""

    def __init__(self, plant: Plant, steps: int, seed: int) -> None:
        if steps < 2 * plant.ahead + 2:
            raise SystemExit(f"{steps} steps are too few: the read-ahead alone fills and empties in {2 * plant.ahead}")
        self.plant, self.steps = plant, steps
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, str, int, int, bool]] = []
        self._serial = 0
        total = plant.nodes * plant.ranks
        self._total = total
        self._prefix_free = [0.0] * plant.prefixes
        self._network_free = [0.0] * plant.nodes
        self._cores_free = [[0.0] * plant.cores for _ in range(total)]
        self._idle = [plant.connections] * total
        self._todo: list[deque[int]] = [deque() for _ in range(total)]
        self._left = [[plant.batch] * total for _ in range(steps)]
        self._waiting = [total] * steps
        self._asked = 0
        self._next_step = 0
        self._gpu_free = 0.0
        self._begins: list[float] = []
        self._work = dict.fromkeys(("requests", "connections", "network", "decode"), 0.0)

    def play(self) -> Outcome:
        """Run to the end of the last step."""
        for _ in range(min(self.plant.ahead, self.steps)):
            self._ask(0.0)
        handle = {"go": self._request, "bytes": self._transfer, "arrived": self._arrive, "decoded": self._decoded}
        while self._events:
            now, _, kind, rank, step, index = heapq.heappop(self._events)
            if kind == "step":
                self._ask(now)
            else:
                handle[kind](now, rank, step, index)
        plant = self.plant
        # Between two steps with the read-ahead in full swing: what is in store at the one is in store at the other.
        first, last = plant.ahead, self.steps - 1 - plant.ahead
        elapsed, done = self._begins[last] - self._begins[first], last - first
        whole = self._gpu_free
        capacity = {
            "requests": whole * plant.requests_per_s * plant.prefixes,
            "connections": whole * plant.connections * self._total,
            "network": whole * plant.node_bytes_per_s * plant.nodes,
            "decode": whole * plant.cores * self._total,
        }
        busy = {name: self._work[name] / capacity[name] for name in capacity}
        return Outcome(max(0.0, 1 - done * plant.step_s / elapsed), done * plant.batch * self._total / elapsed, busy)

    def _at(self, time: float, kind: str, rank: int, step: int, index: bool) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, kind, rank, step, index))

    def _ask(self, now: float) -> None:
        """Let every rank read one batch more."""
        if self._asked == self.steps:
            return
        for rank in range(self._total):
            self._todo[rank].extend([self._asked] * self.plant.batch)
            self._feed(now, rank)
        self._asked += 1

    def _feed(self, now: float, rank: int) -> None:
        """Put a rank's idle connections to work."""
        while self._idle[rank] and self._todo[rank]:
            step = self._todo[rank].popleft()
            self._idle[rank] -= 1
            if self._random.random() < self.plant.cached:
                self._at(now, "arrived", rank, step, False)  # from local disk: far below the store's latency
            else:
                self._at(now, "go", rank, step, self._random.random() >= self.plant.hit)

    def _request(self, now: float, rank: int, step: int, index: bool) -> None:
        """Wait for a turn at a prefix, then for the first byte."""
        plant, prefix = self.plant, self._random.randrange(self.plant.prefixes)
        turn = max(now, self._prefix_free[prefix])
        self._prefix_free[prefix] = turn + 1 / plant.requests_per_s
        first_byte = turn + plant.first_byte_s * math.exp(self._random.gauss(0, plant.spread))
        size = 0 if index else plant.sample_bytes
        self._work["requests"] += 1
        self._work["connections"] += first_byte - turn + size / plant.connection_bytes_per_s
        self._at(first_byte + size / plant.connection_bytes_per_s, "bytes", rank, step, index)

    def _transfer(self, now: float, rank: int, step: int, index: bool) -> None:
        """An index leads to its sample's request; a sample's bytes pass the node's network."""
        if index:
            self._at(now, "go", rank, step, False)
            return
        node, taken = rank // self.plant.ranks, self.plant.sample_bytes / self.plant.node_bytes_per_s
        end = max(now, self._network_free[node]) + taken
        self._network_free[node] = end
        self._work["network"] += self.plant.sample_bytes
        self._at(end, "arrived", rank, step, False)

    def _arrive(self, now: float, rank: int, step: int, index: bool) -> None:
        """The connection is free again; the chunk waits for a core."""
        self._idle[rank] += 1
        self._feed(now, rank)
        taken = self.plant.sample_bytes * self.plant.expansion / 1e9 * self.plant.decode_s_per_gb
        end = max(now, heapq.heappop(self._cores_free[rank])) + taken
        heapq.heappush(self._cores_free[rank], end)
        self._work["decode"] += taken
        self._at(end, "decoded", rank, step, False)

    def _decoded(self, now: float, rank: int, step: int, index: bool) -> None:
        """Count down; a step begins when all ranks have its batch and the step before it is done."""
        self._left[step][rank] -= 1
        if not self._left[step][rank]:
            self._waiting[step] -= 1
        while self._next_step < self.steps and not self._waiting[self._next_step]:
            begin = max(now, self._gpu_free)
            self._begins.append(begin)
            self._gpu_free = begin + self.plant.step_s
            self._at(begin, "step", 0, self._next_step, False)
            self._next_step += 1


def first_epoch_hit(plant: Plant, sharers: int) -> float:
    """Share of samples whose index a cache of any size has seen before, in the first epoch of a global shuffle.

    `sharers` ranks with one cache read samples / (ranks of the run / sharers) of them; m of these fall in a shard on
    average, Poisson: 1 - (1 - exp(-m)) / m find its index there.
    """
    per_shard = plant.shard_bytes / plant.sample_bytes
    mean = per_shard * sharers / (plant.nodes * plant.ranks)
    return 1 - (1 - math.exp(-mean)) / mean


def plants(base: Plant) -> list[Plant]:
    """The rows of the table: one change at a time."""
    whole = ENTRY_BYTES * base.samples
    in_lanes = 1 - base.sample_bytes / base.shard_bytes
    large = replace(base, samples=base.samples // 8, sample_bytes=base.sample_bytes * 8, batch=1)
    return [
        replace(base, name="one prefix", prefixes=1),
        replace(base, name="12 prefixes, enough for 1 request a sample", prefixes=12),
        replace(base, name="32 prefixes, index cache 64 MiB a rank"),
        replace(base, name="32 prefixes, 8 connections a rank", connections=8),
        replace(base, name="16 prefixes, index cache 64 MiB a rank", prefixes=16),
        replace(
            base,
            name="16 prefixes, all 16 GB of indexes kept a node, first epoch",
            prefixes=16,
            index_hits=first_epoch_hit(base, base.ranks),
        ),
        replace(base, name="16 prefixes, the same, later epochs", prefixes=16, index_bytes=whole),
        replace(base, name="16 prefixes, order in lanes of whole shards", prefixes=16, index_hits=in_lanes),
        replace(large, name="2 prefixes, samples of 8 MB, 8 times fewer", prefixes=2),
        replace(large, name="4 prefixes, samples of 8 MB, 8 times fewer", prefixes=4),
        replace(base, name="16 prefixes, node cache 30 TB of 1 PB", prefixes=16, cached=30e12 / 1e15),
        replace(base, name="1 prefix, node cache that holds all (30 TB set), later epochs", prefixes=1, cached=1.0),
        replace(base, name="32 prefixes, network 10 Gb/s a node", node_bytes_per_s=1.25e9),
        replace(base, name="32 prefixes, network 3 Gb/s a node", node_bytes_per_s=0.375e9),
        replace(
            base, name="32 prefixes, 1 decoding core a rank, and no faster than 0.1 GB/s", cores=1, decode_s_per_gb=10.0
        ),
    ]


def table(chosen: list[Plant], steps: int, seed: int) -> str:
    """Markdown, a row a plant."""
    lines = [
        "| what | requests a sample | samples/s | stall | store | connections | network | decode | held by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for plant in chosen:
        found = Run(plant, steps, seed).play()
        busy = " | ".join(f"{found.busy[name]:.0%}" for name in ("requests", "connections", "network", "decode"))
        lines.append(
            f"| {plant.name} | {plant.requests_per_sample:.2f} | {found.samples_per_s:,.0f} | {found.stall:.0%} "
            f"| {busy} | {found.limit} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def draw(path: Path, base: Plant, steps: int, seed: int) -> None:
    """Stall over prefixes, a line for each way to find the shard indexes."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scale"
    from matplotlib import pyplot as plt

    ways = {
        "global shuffle, index cache 64 MiB a rank": base,
        "global shuffle, 16 GB of indexes a node, first epoch": replace(
            base, index_hits=first_epoch_hit(base, base.ranks)
        ),
        "lanes of whole shards, or every index kept": replace(base, index_hits=1.0),
    }
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    counts = (2, 4, 8, 12, 16, 24, 32)
    for label, plant in ways.items():
        stalls = [100 * Run(replace(plant, prefixes=n), steps, seed).play().stall for n in counts]
        axes.plot(counts, stalls, marker="o", label=label)
    axes.set(xlabel="prefixes (5,500 GET/s each)", ylabel="time that GPUs wait, %", ylim=(-2, 100), xticks=counts)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def measured_decode() -> float | None:
    """Core seconds for a decoded gigabyte of zstd, from this machine's result of bench_loader.py."""
    path = harness.RESULTS / harness.device() / "loader.json"
    if not path.exists():
        return None
    wanted = ("zstd-256KiB-shuffle", "gpuops", "cpu_seconds_per_gb")
    rows = json.loads(path.read_text())["rows"]
    return next((row["value"] for row in rows if (row["case"], row["subject"], row["metric"]) == wanted), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the cluster and of the store's limits, not to cite"
    )
    parser.add_argument("--steps", type=int, default=64, help="steps to play (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--decode-s-per-gb", type=float, help="core seconds for a decoded gigabyte, instead of measured"
    )
    parser.add_argument("--requests-per-s", type=float, default=5500.0, help="of a prefix (default 5,500)")
    parser.add_argument("--first-byte-s", type=float, default=0.1, help="median (default 0.1)")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="put the table in this document")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw stall over prefixes")
    options = parser.parse_args()
    decode = options.decode_s_per_gb or measured_decode() or DECODE_S_PER_GB
    base = Plant(decode_s_per_gb=decode, requests_per_s=options.requests_per_s, first_byte_s=options.first_byte_s)
    if options.quick:
        base = replace(base, nodes=base.nodes // 8, requests_per_s=base.requests_per_s / 8)
    print(f"decoding {decode:.3g} core seconds a decoded GB; read-ahead {base.ahead} batches")
    text = table(plants(base), options.steps, options.seed)
    if options.doc is not None:
        document = options.doc.read_text()
        head, tail = document.split(MARKS[0])[0], document.split(MARKS[1])[1]
        note = f"Decoding: {decode:.3g} core seconds a decoded GB. Seed {options.seed}, {options.steps} steps."
        options.doc.write_text(f"{head}{MARKS[0]}\n{text}\n\n{note}\n{MARKS[1]}{tail}")
    if options.svg is not None:
        draw(options.svg, base, options.steps, options.seed)


if __name__ == "__main__":
    main()
