"""How much memory a reader takes on a store of 50 GB: `memory-50GB` of bench_loader.py, in a process of its own.

The store is real to every reader, but takes little disk: 782 shards of 64 MiB (decoded) that are hard links of one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import zarr
from harness import Row
from loader_cases import LARGE, VARIABLE, smooth_fields
from loader_subjects import BATCH, epoch
from zarr.codecs import ZstdCodec

from gpuops.data import sample, source
from gpuops.data.reading.reader import Reader

SHARD = 256
"""Samples of a shard."""
SHARD_COUNT = 782
"""Shards of 64 MiB: 52 GB in all."""
BUDGET_BYTES = 512 * 2**20
"""Of the reader."""
ALLOWED_BYTES = BUDGET_BYTES + 300_000_000
"""What the process may grow by."""


def rows(case: str, batches: int) -> list[Row]:
    """Measure in a fresh process, so that nothing else's memory is counted."""
    done = subprocess.run([sys.executable, __file__, str(batches)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    note = (
        f"peak resident memory over that before the reader, budget {BUDGET_BYTES / 1e6:.0f} MB, {batches} batches of "
        f"{BATCH} out of {found['logical_gb']:.1f} GB, {found['rate_mb_s']:.0f} MB/s"
    )
    print(f"{case}: grew by {found['grown_mb']:.0f} MB of {ALLOWED_BYTES / 1e6:.0f} MB allowed", flush=True)
    return [
        Row(case, "gpuops", "peak_mb", found["grown_mb"], "MB", found["grown_mb"] * 1e6 / ALLOWED_BYTES, note=note),
        Row(case, "limit", "peak_mb", ALLOWED_BYTES / 1e6, "MB", note="byte budget and 300 MB"),
    ]


def write_linked(path: Path) -> Path:
    """An array whose shards are all the first one."""
    fields = smooth_fields(SHARD, LARGE)
    zarr.create_group(path).create_array(
        VARIABLE,
        shape=(SHARD * SHARD_COUNT, *LARGE),
        dtype=fields.dtype,
        chunks=(1, *LARGE),
        shards=(SHARD, *LARGE),
        compressors=[ZstdCodec(level=1, checksum=True)],
        filters=None,
        fill_value=0,
        dimension_names=("sample", "y", "x"),
    )[:SHARD] = fields
    chunks = path / VARIABLE / "c"
    for number in range(1, SHARD_COUNT):
        (chunks / str(number) / "0").mkdir(parents=True)
        os.link(chunks / "0" / "0" / "0", chunks / str(number) / "0" / "0")
    return path


def measure(batches: int) -> dict[str, float]:
    """Read batches in a global shuffle; bytes that the process grew by at its highest."""
    with tempfile.TemporaryDirectory(prefix="gpuops-bench-") as scratch:
        opened = source.open(write_linked(Path(scratch, "plain")))
        smooth_fields.cache_clear()
        samples = SHARD * SHARD_COUNT
        order = epoch(samples, opened.fingerprint, 0).order
        spec = sample.SampleSpec({VARIABLE: [sample.Field(VARIABLE)]}, {})
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _status_bytes("VmRSS")
        reader = Reader(opened, sample.bind(spec, opened), budget_bytes=BUDGET_BYTES)
        begin, total = time.perf_counter(), 0
        for slot in reader.iterate(islice(order.shares(0, 0, 1), batches)):
            total += slot.inputs[VARIABLE].nbytes
        elapsed_s = time.perf_counter() - begin
        reader.close()
        return {
            "grown_mb": (_status_bytes("VmHWM") - before) / 1e6,
            "logical_gb": samples * LARGE[0] * LARGE[1] * 2 / 1e9,
            "rate_mb_s": total / elapsed_s / 1e6,
        }


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
