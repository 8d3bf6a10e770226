"""The arrays that bench_loader.py reads: what lies in them, how they are stored, and how cold they are.

A sample is a smooth field plus instrument noise. Packed arrays are int16 as `gpuops ingest` writes them, one sample an
inner chunk; foreign ones are float32 as xarray writes them, one array a variable.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from numcodecs import Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from gpuops.data import source

VARIABLE = "field"
SHARDS = 16
WAVES = ((1, 300.0), (3, 90.0), (7, 30.0))
"""Wave numbers and amplitudes, in stored units."""
NOISES = 32
"""Independent fields of noise; each sample has one of them, moved to a place of its own."""

Fields = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One array to read."""

    name: str
    """Name in the table."""
    codec: str
    """zstd, blosc-lz4, blosc-zstd or none."""
    shape: tuple[int, int]
    """Of one record."""
    home: str = "plain"
    """plain: a Zarr v3 directory; icechunk: a repository; s3: a bucket; v2: a directory as xarray writes it."""
    cold: bool = False
    """Pages are dropped before each subject's turn."""
    window: int = 1
    """Consecutive records in a sample."""
    cached: bool = False
    """The timed rounds find everything in the node cache, which the first delivery filled."""
    dates: int = 1
    """Records of a chunk; where there are several, the order runs in windowed lanes."""

    @property
    def shared(self) -> bool:
        """Whether several samples need the same chunk."""
        return self.window > 1 or self.dates > 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers."""
        return np.dtype(np.float32 if self.home == "v2" else np.int16)

    @property
    def sample_bytes(self) -> int:
        """Decoded bytes of one sample."""
        return self.window * self.shape[0] * self.shape[1] * self.dtype.itemsize


LARGE, SMALL = (256, 512), (128, 256)
CASES = (
    Case("zstd-256KiB-shuffle", "zstd", LARGE),
    Case("blosc-lz4-256KiB-shuffle", "blosc-lz4", LARGE),
    Case("blosc-zstd-256KiB-shuffle", "blosc-zstd", LARGE),
    Case("none-256KiB-shuffle", "none", LARGE),
    Case("cold-zstd-256KiB-shuffle", "zstd", LARGE, cold=True),
    Case("cold-none-256KiB-shuffle", "none", LARGE, cold=True),
    Case("icechunk-zstd-256KiB-shuffle", "zstd", LARGE, home="icechunk"),
    Case("icechunk-cold-zstd-256KiB-shuffle", "zstd", LARGE, home="icechunk", cold=True),
    Case("s3-zstd-256KiB-shuffle", "zstd", LARGE, home="s3"),
    Case("node-cache-zstd-256KiB-shuffle", "zstd", LARGE, home="s3", cached=True),
    Case("window-zstd-256KiB-shuffle", "zstd", LARGE, window=3),
    Case("zstd-64KiB-shuffle", "zstd", SMALL),
    Case("none-64KiB-shuffle", "none", SMALL),
    Case("foreign-v2-zstd", "zstd", SMALL, home="v2"),
    Case("foreign-fat-zstd", "zstd", SMALL, home="v2", dates=8),
)
QUICK = (
    "zstd-256KiB-shuffle",
    "cold-none-256KiB-shuffle",
    "icechunk-zstd-256KiB-shuffle",
    "s3-zstd-256KiB-shuffle",
    "window-zstd-256KiB-shuffle",
    "none-64KiB-shuffle",
    "foreign-fat-zstd",
)
"""Cases of a run with --quick: every home and every kind of sample once."""


@lru_cache(maxsize=1)
def smooth_fields(samples: int, shape: tuple[int, int]) -> Fields:
    """Travelling waves and instrument noise, as temperature in steps of 0.1 K would be; zstd halves it."""
    generator = np.random.default_rng(0)
    y, x = (np.linspace(0, 2 * np.pi, size, dtype=np.float32) for size in shape)
    noises = 0.5 * generator.standard_normal((min(NOISES, samples), *shape), np.float32)
    fields = np.empty((samples, *shape), np.int16)
    for number, field in enumerate(fields):
        phase = np.float32(0.05 * number)
        waves = (a * np.outer(np.cos(k * y + phase), np.sin((k + 1) * x - phase)) for k, a in WAVES)
        moved = np.roll(noises[number % len(noises)], number * 7, axis=(0, 1))
        field[:] = sum(waves) + moved
    return fields


def contents(case: Case, records: int) -> Fields:
    """What is written in a case's array, [records, y, x]: packed integers, or the same numbers as they are unpacked."""
    packed = smooth_fields(records, case.shape)
    return packed if case.dtype == np.int16 else packed.astype(np.float32) * np.float32(0.1)


def write(case: Case, folder: Path, fields: Fields) -> Path:
    """Write a case's array under `folder`; a bucket's objects are written as files first."""
    store = folder / case.home
    if case.home == "icechunk":
        session = icechunk.Repository.create(source.local_storage(store)).writable_session("main")
        _write_sharded(zarr.create_group(session.store), case, fields)
        session.commit("benchmark")
    elif case.home == "v2":
        _write_foreign(store, case, fields)
    else:
        _write_sharded(zarr.create_group(store), case, fields)
    return store


def _write_sharded(group: zarr.Group, case: Case, fields: Fields) -> None:
    """As `gpuops ingest` writes: one sample an inner chunk, checksummed, 16 shards."""
    codecs: dict[str, list[Any]] = {
        "zstd": [ZstdCodec(level=1, checksum=True)],
        "blosc-lz4": [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2), Crc32cCodec()],
        "blosc-zstd": [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=2), Crc32cCodec()],
        "none": [Crc32cCodec()],
    }
    array = group.create_array(
        VARIABLE,
        shape=fields.shape,
        dtype=fields.dtype,
        chunks=(1, *case.shape),
        shards=(max(1, len(fields) // SHARDS), *case.shape),
        compressors=codecs[case.codec],
        filters=None,
        fill_value=0,
        dimension_names=("sample", "y", "x"),
        config={"write_empty_chunks": True},
    )
    array[:] = fields


def _write_foreign(path: Path, case: Case, fields: Fields) -> None:
    """One or several dates a chunk, with the names and coordinates of the WeatherBench2 layout."""
    times, rows, columns = fields.shape
    dataset = xr.Dataset(
        {VARIABLE: (("time", "latitude", "longitude"), fields)},
        {
            "time": np.datetime64("2020-01-01", "ns") + np.arange(times) * np.timedelta64(6, "h"),
            "latitude": np.linspace(-90, 90, rows),
            "longitude": np.linspace(0, 360, columns, endpoint=False),
        },
    )
    encoding = {VARIABLE: {"chunks": (case.dates, rows, columns), "compressors": (Zstd(level=1),)}}
    dataset.to_zarr(path, zarr_format=2, encoding=encoding, consolidated=True)


def drop_pages(folder: Path) -> float:
    """Take a folder's files out of the page cache; the share of their pages that stayed in it."""
    pages = stayed = 0
    for path in folder.rglob("*"):
        if not path.is_file() or not (size := path.stat().st_size):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            resident = _resident(descriptor, size)
        finally:
            os.close(descriptor)
        pages, stayed = pages + len(resident), stayed + sum(page & 1 for page in resident)
    return stayed / max(pages, 1)


def _resident(descriptor: int, size: int) -> bytes:
    """One byte a page of an open file, odd where the page is in memory (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    flags = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    # ctypes finds the address of a writable map only; a private one leaves the file as it is.
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        first = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.addressof(first), size, flags)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return flags.raw
