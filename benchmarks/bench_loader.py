"""Random global-shuffle batches of 64 samples out of a Zarr array: gpuops against its peers and the limit.

One sample is one chunk (three in the window case, an eighth of one in the fat case): a smooth field and noise, int16 in
sharded Zarr v3 with checksums, float32 in the Zarr v2 that xarray writes. Codecs: zstd 1, blosc (bitshuffle, lz4 or
zstd), none. Homes: a directory, an Icechunk repository, an S3 endpoint on loopback (moto), the same behind the node
cache. The arrays lie in $TMPDIR, which should be a disk; pages are in the page cache, or, in `cold` cases, dropped
before each subject's turn.

Subjects:
  gpuops            gpuops.data: Order, Reader
  limit             read, decode and checksum into a preallocated ring with as many threads, all positions known; from
                    Icechunk its own concurrent ranged get of a whole batch, from S3 raw concurrent GETs,
                    for the node cache the same shards as plain files
  zarr-oindex       array.oindex[ids], a batch at a time
  zarr-getitem      array[id], a sample at a time
  zarr-async        array.async_array.getitem(id), all of a batch at once: zarr-python at its best
  torch-dataloader  torch DataLoader over array[id], 2 worker processes kept from round to round
  tensorstore, zarrs, xbatcher, spdl, zarr-beluga    where they are installed

Every subject must deliver the very samples that were written before anything is timed, and is tried in several settings
(threads, concurrency, decoder), of which the fastest goes on. Then one interleaved run: each round, every subject
delivers the same batches (slow ones the first few of them); medians of the rounds. Counters are printed before rates.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import loader_memory
import loader_s3
import numpy as np
from harness import Row
from loader_cases import CASES, QUICK, SHARDS, VARIABLE, Case, Fields, contents, drop_pages, write
from loader_limits import limits
from loader_peers import OPTIONAL, DataLoaderPeer, installed, peers
from loader_subjects import BATCH, Contender, Epoch, Subject, epoch, read_afresh, read_gpuops, steps

from gpuops.data import sample, source
from gpuops.data.reading.node_cache import CacheLocation
from gpuops.data.reading.reader import Reader

PACKAGES = ("numpy", "zarr", "numcodecs", "zstandard", "crc32c", "icechunk", "obstore", "torch", *OPTIONAL)
MEMORY_CASE = "memory-50GB"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    """Turns of each subject."""
    array_bytes: int
    """Decoded bytes of an array, unless --samples says otherwise: at 4 GB/s an epoch of 2^27 would be over in 30 ms, of
    which its beginning and its end take a good part."""
    remote_bytes: int
    """The same on S3, whose server on loopback is slow."""
    turn_s: float
    """Seconds that one turn of a subject should take at most; the fast ones deliver the whole epoch."""


FULL = Effort(rounds=7, array_bytes=2**29, remote_bytes=2**26, turn_s=0.2)
BRIEF = Effort(rounds=3, array_bytes=2**26, remote_bytes=2**25, turn_s=0.1)
FEWEST = 2
"""Batches of a turn, however slow the subject."""


def main() -> None:
    parser = harness.arguments(__doc__ or "", "loader")
    parser.add_argument("--samples", type=int, metavar="N", help="samples an array (default: 512 MiB of them)")
    names = [*(case.name for case in CASES), MEMORY_CASE]
    parser.add_argument("--cases", nargs="+", choices=names, help="only these (default: all; some with --quick)")
    options = parser.parse_args()
    if options.samples is not None and options.samples < SHARDS * BATCH // 4:
        parser.error(f"--samples {options.samples}: at least {SHARDS * BATCH // 4}, so that every shard holds several")
    for peer in OPTIONAL:
        if not installed(peer):
            print(f"{peer} is not installed: its rows are missing")
    chosen = options.cases or (QUICK if options.quick else names)
    effort = BRIEF if options.quick else FULL
    rows: list[Row] = []
    with ExitStack() as stack:
        cases = [case for case in CASES if case.name in chosen]
        if any(case.home == "s3" for case in cases):
            loader_s3.serve(stack)
        loader = DataLoaderPeer()
        for case in cases:
            size = effort.remote_bytes if case.home == "s3" else effort.array_bytes
            samples = options.samples or size // (case.sample_bytes // case.window)
            print(f"{case.name}: {samples} samples, {'pages dropped' if case.cold else 'page cache warm'}", flush=True)
            rows += measure(case, samples, effort, loader)
    if MEMORY_CASE in chosen:
        rows += loader_memory.rows(MEMORY_CASE, batches=100 if options.quick else 1000)
    found = {row.case: (row.value, row.unit) for row in rows if row.subject == "limit" and row.metric == "throughput"}
    harness.report(options.out, packages=PACKAGES, limits=found, rows=rows)


def measure(case: Case, records: int, effort: Effort, loader: DataLoaderPeer) -> list[Row]:
    """Write a case's array, prove that every subject delivers it, then time them all."""
    with tempfile.TemporaryDirectory(prefix="gpuops-bench-") as scratch, ExitStack() as stack:
        fields = contents(case, records)
        folder = write(case, Path(scratch), fields)
        url, bucket = loader_s3.upload(folder, case.name) if case.home == "s3" else (str(folder), None)
        opened = source.open(url)
        bound = sample.bind(_spec(case, opened), opened)
        cache = CacheLocation(f"{scratch}/node-cache", 10**10) if case.cached else None
        reader = Reader(opened, bound, cache=cache)
        stack.callback(reader.close)
        array = opened.variable(VARIABLE).array
        # A reader keeps chunks that are needed again, within its budget, which these small arrays fit into.
        ours = partial(read_afresh, opened, bound) if case.shared else partial(read_gpuops, reader)
        contenders = {
            "gpuops": Contender({"": partial(ours, case.window)}),
            "limit": Contender(limits(case, folder, array, bucket, stack)),
            **peers(case, url, opened, loader),
        }
        epochs = [
            epoch(records - case.window + 1, opened.fingerprint, number, case.dates) for number in range(effort.rounds)
        ]
        counted = count(case, reader, epochs[0], fields)
        for row in counted:
            print(f"  {row.metric} {row.value:.5g} {row.note}", flush=True)
        stayed = [0.0]

        def before() -> None:
            if case.cold:
                stayed.append(drop_pages(folder))

        settled = {
            name: settle(name, contender, epochs[0], fields, case.window, effort.turn_s, before)
            for name, contender in contenders.items()
        }
        turns = {name: partial(drain, s.subject, [e.head(s.batches) for e in epochs]) for name, s in settled.items()}
        earlier = reader.counters.to_json()
        timings = harness.interleave(turns, effort.rounds, before)
        if not case.shared:
            counted.append(timed_decodes(case, earlier, reader.counters.to_json()))
    pages = f"pages dropped, {max(stayed):.1%} of them stayed" if case.cold else "page cache warm"
    outside = {name for name, contender in contenders.items() if not contender.ours}
    return counted + speed_rows(case, timings, settled, pages, outside)


def _spec(case: Case, opened: source.Source) -> sample.SampleSpec:
    if case.window == 1:
        return sample.SampleSpec({VARIABLE: [sample.Field(VARIABLE)]}, {})
    axis = opened.variable(VARIABLE).dims[0]
    field = sample.Field(VARIABLE, at=tuple(range(case.window)))
    return sample.SampleSpec({VARIABLE: [field]}, {}, sample.Window(axis, case.window))


def count(case: Case, reader: Reader, first: Epoch, fields: Fields) -> list[Row]:
    """What one delivery cost, in numbers that no noise moves: shard indexes were not cached before it."""
    tracemalloc.start()  # slows the subject down, so it is on in this untimed delivery alone
    check("gpuops", partial(read_gpuops, reader, case.window), first, fields, case.window)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counters = reader.counters.to_json()
    cold = "shard indexes included, cold"
    costs = [
        ("requests_per_sample", counters["requests_per_sample"], "requests", cold),
        ("bytes_per_useful_byte", counters["bytes_per_useful_byte"], "bytes", cold),
        ("decodes_per_sample", counters["decodes_per_sample"], "decodes", ""),
        ("peak_mb", peak_bytes / 1e6, "MB", "largest Python and numpy memory in one delivery"),
    ]
    if case.shared:
        distinct = sum(len(np.unique(steps(ids, case.window) // case.dates)) for ids in first.batches)
        note = f"in the epoch; each batch's distinct chunks are {distinct}, {counters['decodes']} were decoded"
        costs.append(("decodes_per_distinct_chunk", counters["decodes_per_distinct_chunk"], "decodes", note))
    return [Row(case.name, "gpuops", metric, value, unit, note=note) for metric, value, unit, note in costs]


def timed_decodes(case: Case, earlier: Mapping[str, Any], later: Mapping[str, Any]) -> Row:
    """Whether the timed rounds decoded every sample: a cache would have made them look faster than they are."""
    decodes, samples = (later[name] - earlier[name] for name in ("decodes", "samples"))
    return Row(
        case.name, "gpuops", "timed_decodes_per_sample", decodes / samples, "decodes", note="in the timed rounds"
    )


@dataclass(frozen=True, slots=True)
class Settled:
    """A subject in its fastest setting."""

    subject: Subject
    setting: str
    """Name of the setting, empty if there is no choice."""
    batches: int
    """Batches that it delivers in a turn."""


def settle(
    name: str,
    contender: Contender,
    first: Epoch,
    fields: Fields,
    window: int,
    turn_s: float,
    before: Callable[[], None],
) -> Settled:
    """Check every setting of a subject, keep the fastest, and find how many batches fit in its turn."""
    few = first.head(FEWEST)
    batch_s: dict[str, float] = {}
    for setting, subject in contender.variants.items():
        check(name, subject, few, fields, window)  # also starts its threads and processes
        batch_s[setting] = _batch_s(subject, few, before)
        if batch_s[setting] * len(first.batches) < 2 * turn_s:  # too fast for so few batches to tell
            check(name, subject, first, fields, window)
            batch_s[setting] = _batch_s(subject, first, before)
    best = min(batch_s, key=batch_s.__getitem__)
    batches = min(max(FEWEST, int(turn_s / batch_s[best])), len(first.batches))
    return Settled(contender.variants[best], best, batches)


def _batch_s(subject: Subject, epoch: Epoch, before: Callable[[], None]) -> float:
    """Seconds a batch takes."""
    before()
    begin = time.perf_counter()
    drain(subject, [epoch], 0)
    return (time.perf_counter() - begin) / len(epoch.batches)


def speed_rows(
    case: Case, timings: dict[str, harness.Timing], settled: dict[str, Settled], pages: str, outside: set[str]
) -> list[Row]:
    """Rates of all subjects, and the processor time of those that work in this process."""
    turn_bytes = {n: s.batches * BATCH * case.sample_bytes for n, s in settled.items()}
    rates = {n: [turn_bytes[n] / s / 1e6 for s in t.wall_s] for n, t in timings.items()}
    cpu = {n: statistics.median(t.cpu_s) / turn_bytes[n] * 1e9 for n, t in timings.items() if n not in outside}
    rows = []
    for metric, unit, values in (
        ("throughput", "MB/s", {n: statistics.median(r) for n, r in rates.items()}),
        ("cpu_seconds_per_gb", "s/GB", cpu),
    ):
        for name, value in values.items():
            of_limit = None if name == "limit" else value / values["limit"]
            against = [n for n in values if n not in ("gpuops", "limit")] if name == "gpuops" else []
            note = "all threads, decoded GB"
            if metric == "throughput":
                chosen = f"{settled[name].setting}, " if settled[name].setting else ""
                note = (
                    f"{chosen}decoded bytes, {pages}, {len(rates[name])} rounds of {settled[name].batches} batches, "
                    f"{harness.spread(rates[name])}"
                )
            rows.append(
                Row(case.name, name, metric, value, unit, of_limit, {p: value / values[p] for p in against}, note)
            )
    return rows


def check(name: str, subject: Subject, epoch: Epoch, fields: Fields, window: int = 1) -> None:
    """Stop the benchmark unless the subject delivers exactly what was written."""
    delivered = 0
    for batch, ids in zip(subject(epoch), epoch.batches, strict=True):
        if batch.dtype != fields.dtype or not np.array_equal(batch, fields[steps(ids, window)]):
            raise SystemExit(f"{name} delivered other samples than were written: nothing was timed")
        delivered += len(batch)
    assert delivered == len(epoch.batches) * BATCH


def drain(subject: Subject, epochs: list[Epoch], number: int) -> None:
    """Take every batch and do nothing with it."""
    for _ in subject(epochs[number]):
        pass


if __name__ == "__main__":
    main()
