"""What an ingest costs in processor seconds per GB of packed data, against a bare copy of the same bytes.

The source is one HDF5 dataset of int16, a smooth field plus noise, in the page cache; destinations lie in a temporary
directory ($TMPDIR). An ingest reads, checks, describes, encodes, writes, reads back, decodes and compares; a copy does
none of that, so it is the floor, not a peer.

Subjects:
  gpuops-<codec>   go.ingest into an Icechunk repository, local threads
  gpuops-zarr      the same (zstd) into a plain Zarr directory
  zarr-python      whole shards written with zarr-python, zstd with checksums: nothing checked, nothing read back
  copy             the file copied through a buffer of 16 MiB
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import h5py
import harness
import numpy as np
import zarr
from harness import Row
from zarr.codecs import ZstdCodec

from gpuops.data.writing.ingest import ingest
from gpuops.data.writing.recipe import Recipe, VariableRecipe

RECORD = (256, 512)
SHARDS = 16
CODECS = ("zstd", "blosc-lz4", "blosc-zstd", "none")
PACKAGES = ("numpy", "zarr", "numcodecs", "icechunk", "dask", "h5py")


def write_source(path: Path, records: int) -> None:
    y, x = np.mgrid[: RECORD[0], : RECORD[1]] / max(RECORD)
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("a", (records, *RECORD), "i2")
        for i in range(records):
            wave = 300 * np.sin(6 * (x + i / 50)) + 90 * np.cos(18 * (y - i / 70))
            data[i] = (wave + generator.normal(0, 2, RECORD)).astype(np.int16)


def run_ingest(source: Path, folder: Path, codec: str, format: str, number: int) -> None:
    place = folder / f"{codec}-{format}-{number}"
    variables = {"a": VariableRecipe(f"{source}#a", ["time", "y", "x"])}
    ingest(Recipe(str(place), variables, codec=codec, format=format))
    shutil.rmtree(place)


def run_zarr(source: Path, folder: Path, number: int) -> None:
    place = folder / f"plain-{number}"
    with h5py.File(source) as file:
        data = file["a"]
        per = len(data) // SHARDS
        array = zarr.create_array(
            place,
            shape=data.shape,
            dtype=data.dtype,
            chunks=(1, *RECORD),
            shards=(per, *RECORD),
            compressors=[ZstdCodec(level=1, checksum=True)],
        )
        for first in range(0, len(data), per):
            array[first : first + per] = data[first : first + per]
    shutil.rmtree(place)


def run_copy(source: Path, folder: Path, number: int) -> None:
    place = folder / f"copy-{number}"
    with source.open("rb") as read, place.open("wb") as write:
        shutil.copyfileobj(read, write, 16 * 2**20)
    place.unlink()


def main() -> None:
    options = harness.arguments(__doc__ or "", "ingest").parse_args()
    records, rounds = (SHARDS * 4, 3) if options.quick else (SHARDS * 64, 7)
    gigabytes = records * RECORD[0] * RECORD[1] * 2 / 1e9
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.h5"
        write_source(source, records)
        subjects = {f"gpuops-{codec}": partial(run_ingest, source, folder, codec, "icechunk") for codec in CODECS}
        subjects["gpuops-zarr"] = partial(run_ingest, source, folder, "zstd", "zarr")
        subjects["zarr-python"] = partial(run_zarr, source, folder)
        subjects["copy"] = partial(run_copy, source, folder)
        for run in subjects.values():
            run(-1)  # imports, and the source into the page cache
        timings = harness.interleave(subjects, rounds)
    cpu = {name: statistics.median(timing.cpu_s) / gigabytes for name, timing in timings.items()}
    rate = {name: gigabytes * 1e3 / statistics.median(timing.wall_s) for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        subject = "limit" if name == "copy" else "gpuops" if name.startswith("gpuops") else name
        case = name.removeprefix("gpuops-")
        note = harness.spread([value / gigabytes for value in timing.cpu_s])
        ratio = {"zarr-python": cpu[name] / cpu["zarr-python"]} if subject == "gpuops" else {}
        rows.append(Row(case, subject, "cpu_seconds_per_gb", cpu[name], "s/GB", cpu[name] / cpu["copy"], ratio, note))
        ratio = {"zarr-python": rate[name] / rate["zarr-python"]} if subject == "gpuops" else {}
        note = harness.spread([gigabytes * 1e3 / value for value in timing.wall_s])
        rows.append(Row(case, subject, "throughput", rate[name], "MB/s", rate[name] / rate["copy"], ratio, note))
    limits = {"copy": (cpu["copy"], "s/GB")}
    harness.report(options.out, packages=PACKAGES, limits=limits, rows=rows)


if __name__ == "__main__":
    main()
