"""The same bytes from threads and from workers; random layouts; every result read by zarr-python alone."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import zarr
from series_room import independent, plain_store, series

import gpuops as go
from gpuops.data.writing.quality import Rules
from gpuops.data.writing.recipe import VariableRecipe
from gpuops.errors import QualityError, UnavailableError


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """Address of a cluster of processes on loopback."""
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=workers, processes=True, **options) as running:
        yield running.scheduler_address


def files(folder: Path) -> str:
    """The series in two NetCDF files, as a glob."""
    for name, (first, last) in {"a": (0, 15), "b": (15, 40)}.items():
        series(first, last).to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
    return str(folder / "*.nc")


def check_workers(tmp_path: Path, workers: int) -> None:
    source = files(tmp_path)
    threads = go.ingest(source, url=tmp_path / "threads", shard_records=3)
    chunked = {name: series()[name].chunk({"time": 7}) for name in ("temperature", "rain")}
    with cluster(workers) as address:
        seen: list[int] = []
        one = go.ingest(
            source, url=tmp_path / "one", shard_records=3, scheduler=address, progress=lambda d, t: seen.append(d)
        )
        two = go.ingest(chunked, url=tmp_path / "two", shard_records=3, scheduler=address, format="zarr")
        rules = {"rain": VariableRecipe(series()["rain"], quality=Rules(valid_max=0.0))}
        with pytest.raises(QualityError, match=r"rain\[.*valid_max 0"):
            go.ingest(rules, url=tmp_path / "bad", scheduler=address)
    assert one.fingerprint == threads.fingerprint == two.fingerprint
    assert seen == sorted(seen)
    assert len(seen) == 28
    np.testing.assert_array_equal(independent(tmp_path / "one")["rain"], series()["rain"])
    np.testing.assert_array_equal(independent(tmp_path / "two")["temperature"], series()["temperature"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nc", "b.nc", "one", "threads", "two"]


def test_the_same_fingerprint_from_threads_and_from_two_workers(tmp_path: Path) -> None:
    check_workers(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_fingerprint_from_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    check_workers(tmp_path, workers)


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuops.data.writing.schedule._CONNECT_S", 0.2)
    with pytest.raises(UnavailableError, match=r"no Dask cluster answers at tcp://127.0.0.1:1 "):
        go.ingest(series(), url=tmp_path / "s", scheduler="tcp://127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def combination(folder: Path, seed: int) -> None:
    """One random (chunk, shard, source chunk, append, codec, dtype, packing) and what zarr-python reads of it."""
    generator = np.random.default_rng(seed)
    records = int(generator.integers(1, 60))
    record = tuple(int(n) for n in generator.integers(1, 7, generator.integers(1, 4)))
    dtype = generator.choice(["u1", "<i2", ">i2", "<u2", "<i4", "<f4", ">f8"])
    values = generator.integers(0, 200, (records, *record)).astype(dtype)
    if values.dtype.kind == "f":
        values[generator.random(values.shape) < 0.1] = np.nan
    if generator.random() < 0.1:
        values[:] = 0
    chunks = tuple(int(generator.integers(1, n + 1)) for n in values.shape)
    options: dict[str, Any] = {
        "chunk_records": int(generator.integers(1, 6)),
        "shard_records": int(generator.integers(1, 30)),
        "codec": str(generator.choice(["zstd", "blosc-lz4", "blosc-zstd", "none"])),
        "format": str(generator.choice(["icechunk", "zarr"])),
    }
    match generator.integers(3):
        case 0:
            whole: Any = values
        case 1:
            whole = dask.array.from_array(values, chunks=chunks)
        case _:
            native = values.astype(values.dtype.newbyteorder("<"))
            place = {"shape": native.shape, "dtype": native.dtype, "chunks": chunks, "fill_value": 0}
            whole = zarr.create_array(folder / "source", **place, config={"write_empty_chunks": True})
            whole[:] = native
    cuts = sorted({0, records, *map(int, generator.integers(0, records + 1, generator.integers(0, 4)))})
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        with dask.config.set(num_workers=int(generator.integers(1, 5))):
            part = whole[first:last]
            source = go.ingest({"a": part}, url=folder / "store", append=number > 0, **options)
    stored = zarr.open_group(plain_store(folder / "store"), mode="r")["a"]
    assert isinstance(stored, zarr.Array)
    np.testing.assert_array_equal(stored[:], values)
    assert stored.shards is not None
    assert stored.shards[0] % stored.chunks[0] == 0
    assert source.fingerprint == go.ingest({"a": values}, url=folder / "whole", **options).fingerprint


@pytest.mark.parametrize("seed", range(4))
def test_random_combinations(tmp_path: Path, seed: int) -> None:
    combination(tmp_path, seed)


@pytest.mark.slow
def test_200_random_combinations(tmp_path: Path) -> None:
    for seed in range(100, 300):
        folder = tmp_path / str(seed)
        folder.mkdir()
        combination(folder, seed)
