"""Random global-shuffle batches of 64 samples out of a sharded Zarr v3 array: gpuops against its peers and the limit.

One sample is one inner chunk, int16, a smooth field plus noise. Cases: compressed (zstd 1 with checksum) or not (crc32c
alone), 256 KiB or 64 KiB a sample, in a plain Zarr directory; and one in an Icechunk repository. The arrays lie in a
temporary directory ($TMPDIR) and in the page cache: this is about requests, decoding and copies, not about disks.

Subjects:
  gpuops            gpuops.data: Order, Reader, one decoding thread a core, two batches read ahead
  limit             pread and decode, checksum included, into a preallocated ring, as many threads, nothing planned;
                    for Icechunk the same shards as plain files
  zarr-oindex       array.oindex[ids], a batch at a time
  zarr-getitem      array[id], a sample at a time
  zarr-async        array.async_array.getitem(id), all of a batch at once: zarr-python at its best
  torch-dataloader  torch DataLoader over array[id], 2 worker processes kept from round to round
  tensorstore       array[ids], two batches read ahead (only where it is installed)

Every subject must deliver the very samples that were written before anything is timed. Then one interleaved run: each
round, every subject delivers the same batches; medians of the rounds.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import tracemalloc
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import icechunk
import numpy as np
import zarr
from harness import Row
from loader_subjects import (
    AHEAD,
    BATCH,
    VARIABLE,
    DataLoaderSubject,
    Epoch,
    Fields,
    Limit,
    Subject,
    epoch,
    open_tensorstore,
    read_async,
    read_getitem,
    read_gpuops,
    read_oindex,
)
from zarr.codecs import Crc32cCodec, ZstdCodec

from gpuops.data import sample, source
from gpuops.data.reader import Reader

SHARDS = 16
WAVES = ((1, 300.0), (3, 90.0), (7, 30.0))
"""Wave numbers and amplitudes, in stored units."""
PACKAGES = ("numpy", "zarr", "numcodecs", "google-crc32c", "icechunk", "torch", "tensorstore")


@dataclass(frozen=True, slots=True)
class Case:
    """One array to read."""

    name: str
    """Name in the table."""
    codec: str
    """zstd or none."""
    shape: tuple[int, int]
    """Of one sample."""
    versioned: bool = False
    """In an Icechunk repository, not a directory."""


CASES = (
    Case("zstd-256KiB-shuffle", "zstd", (256, 512)),
    Case("zstd-64KiB-shuffle", "zstd", (128, 256)),
    Case("none-256KiB-shuffle", "none", (256, 512)),
    Case("none-64KiB-shuffle", "none", (128, 256)),
    Case("icechunk-zstd-256KiB-shuffle", "zstd", (256, 512), versioned=True),
)


def main() -> None:
    parser = harness.arguments(__doc__ or "", "loader")
    parser.add_argument("--samples", type=int, metavar="N", help="samples an array (default 512; 256 with --quick)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these (default: all)")
    options = parser.parse_args()
    samples = options.samples or (256 if options.quick else 512)
    if samples < SHARDS * BATCH // 4:
        parser.error(f"--samples {samples}: at least {SHARDS * BATCH // 4}, so that every shard holds several")
    if importlib.util.find_spec("tensorstore") is None:
        print("tensorstore is not installed: its rows are missing")
    rows: list[Row] = []
    for case in CASES:
        if options.cases is None or case.name in options.cases:
            print(f"{case.name}: {samples} samples, page cache warm")
            rows += measure(case, samples, rounds=3 if options.quick else 7)
    limits = {row.case: (row.value, row.unit) for row in rows if row.subject == "limit" and row.metric == "throughput"}
    harness.report(options.out, packages=PACKAGES, limits=limits, rows=rows)


def measure(case: Case, samples: int, rounds: int) -> list[Row]:
    """Write a case's array, prove that every subject delivers it, then time them all."""
    with tempfile.TemporaryDirectory(prefix="gpuops-bench-") as scratch, ExitStack() as stack:
        fields = smooth_fields(samples, case.shape)
        plain = write_plain(Path(scratch, "plain"), case, fields)
        store = write_icechunk(Path(scratch, "icechunk"), case, fields) if case.versioned else plain
        opened = source.open(store)
        spec = sample.SampleSpec({VARIABLE: [sample.Field(VARIABLE)]}, {})
        reader = Reader(opened, sample.bind(spec, opened), ahead=AHEAD)
        stack.callback(reader.close)
        array = opened.variable(VARIABLE).array
        subjects: dict[str, Subject] = {
            "gpuops": partial(read_gpuops, reader),
            "limit": Limit(plain, stack),
            "zarr-oindex": partial(read_oindex, array),
            "zarr-getitem": partial(read_getitem, array),
            "zarr-async": partial(read_async, array),
            "torch-dataloader": DataLoaderSubject(store),
        }
        if importlib.util.find_spec("tensorstore") is not None and not case.versioned:
            subjects["tensorstore"] = open_tensorstore(store)
        epochs = [epoch(samples, opened.fingerprint, number) for number in range(rounds)]
        tracemalloc.start()  # slows the subject down, so it is on in this untimed delivery alone
        check("gpuops", subjects["gpuops"], epochs[0], fields)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        counters = reader.counters.to_json()  # of this one delivery: shard indexes were not cached before it
        for name, subject in subjects.items():
            check(name, subject, epochs[0], fields)
        useful_bytes = sum(map(len, epochs[0].batches)) * fields[0].nbytes
        del fields
        timings = harness.interleave({n: partial(drain, s, epochs) for n, s in subjects.items()}, rounds)
    costs = {
        "requests_per_sample": (counters["requests_per_sample"], "requests", "shard indexes included, cold"),
        "bytes_per_useful_byte": (counters["bytes_per_useful_byte"], "bytes", "shard indexes included, cold"),
        "decodes_per_sample": (counters["decodes_per_sample"], "decodes", ""),
        "peak_mb": (peak_bytes / 1e6, "MB", "largest Python and numpy memory in one delivery"),
    }
    return speed_rows(case, timings, useful_bytes) + [
        Row(case.name, "gpuops", metric, value, unit, note=note) for metric, (value, unit, note) in costs.items()
    ]


def speed_rows(case: Case, timings: dict[str, harness.Timing], useful_bytes: int) -> list[Row]:
    """Rates of all subjects, and the processor time of those that work in this process."""
    rates = {n: [useful_bytes / s / 1e6 for s in t.wall_s] for n, t in timings.items()}
    cpu = {n: statistics.median(t.cpu_s) / useful_bytes * 1e9 for n, t in timings.items() if n != "torch-dataloader"}
    rows = []
    for metric, unit, values in (
        ("throughput", "MB/s", {n: statistics.median(r) for n, r in rates.items()}),
        ("cpu_seconds_per_gb", "s/GB", cpu),
    ):
        for name, value in values.items():
            of_limit = None if name == "limit" else value / values["limit"]
            peers = [n for n in values if n not in ("gpuops", "limit")] if name == "gpuops" else []
            note = "all threads, decoded GB"
            if metric == "throughput":
                note = f"decoded bytes, page cache warm, {len(rates[name])} rounds, {harness.spread(rates[name])}"
            rows.append(
                Row(case.name, name, metric, value, unit, of_limit, {p: value / values[p] for p in peers}, note)
            )
    return rows


def check(name: str, subject: Subject, epoch: Epoch, fields: Fields) -> None:
    """Stop the benchmark unless the subject delivers exactly what was written."""
    delivered = 0
    for batch, ids in zip(subject(epoch), epoch.batches, strict=True):
        if batch.dtype != fields.dtype or not np.array_equal(batch, fields[ids]):
            raise SystemExit(f"{name} delivered other samples than were written: nothing was timed")
        delivered += len(batch)
    assert delivered == len(epoch.batches) * BATCH


def drain(subject: Subject, epochs: list[Epoch], number: int) -> None:
    """Take every batch and do nothing with it."""
    for _ in subject(epochs[number]):
        pass


def smooth_fields(samples: int, shape: tuple[int, int]) -> Fields:
    """Travelling waves and instrument noise, as temperature in steps of 0.1 K would be; zstd halves it."""
    generator = np.random.default_rng(0)
    y, x = (np.linspace(0, 2 * np.pi, size, dtype=np.float32) for size in shape)
    fields = np.empty((samples, *shape), np.int16)
    for number, field in enumerate(fields):
        phase = np.float32(0.05 * number)
        waves = (a * np.outer(np.cos(k * y + phase), np.sin((k + 1) * x - phase)) for k, a in WAVES)
        field[:] = sum(waves) + 0.5 * generator.standard_normal(shape, np.float32)
    return fields


def write_array(group: zarr.Group, case: Case, fields: Fields) -> None:
    """As `gpuops ingest` writes: one sample an inner chunk, checksummed, 16 shards."""
    zstd = [ZstdCodec(level=1, checksum=True)]
    array = group.create_array(
        VARIABLE,
        shape=fields.shape,
        dtype=fields.dtype,
        chunks=(1, *case.shape),
        shards=(max(1, len(fields) // SHARDS), *case.shape),
        compressors=zstd if case.codec == "zstd" else [Crc32cCodec()],
        filters=None,
        fill_value=0,
        dimension_names=("sample", "y", "x"),
        config={"write_empty_chunks": True},
    )
    array[:] = fields


def write_plain(path: Path, case: Case, fields: Fields) -> Path:
    write_array(zarr.create_group(path), case, fields)
    return path


def write_icechunk(path: Path, case: Case, fields: Fields) -> Path:
    session = icechunk.Repository.create(source.local_storage(path)).writable_session("main")
    write_array(zarr.create_group(session.store), case, fields)
    session.commit("benchmark")
    return path


if __name__ == "__main__":
    main()
