"""HDF5, NetCDF or Zarr in; one checked, sharded, committed Zarr v3 store out.

Whole shards only, one Dask task a shard. Each task reads its block, checks the declared rules, computes statistics,
writes the shard, reads it back and compares it with what it wrote. The commit happens once, if every task passed.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from gpuops.atomic import new_directory
from gpuops.data.block import Block, check_aligned, make_block
from gpuops.data.quality import Violation, check, gate
from gpuops.data.recipe import Recipe, axis_values, load_recipe
from gpuops.data.shard import ShardIndexes, layout, read_ranges
from gpuops.data.source import META, Source, array_metadata, local_storage, open, strong_fingerprint
from gpuops.data.statistics import COLUMNS, describe
from gpuops.drift import Sketch
from gpuops.errors import InputError, IntegrityError

SHARD_BYTES = 256 * 2**20
"""Largest size of a shard, before compression."""
SHARDS = 16
"""Smallest number of shards aimed at, so that small arrays are still read and written in parallel."""
_NOTHING = "nothing was committed; check the disk and ingest again"


@dataclass(frozen=True, slots=True)
class Written:
    """What one task found and wrote."""

    name: str
    """Variable."""
    shard: int
    """Position of the shard on the sample axis."""
    digest: str
    """sha256 of the shard as it lies in the store."""
    rows: npt.NDArray[np.float64]
    """Statistics, [records, channels, 5]."""
    sketch: Sketch
    """Histogram of the stored values."""
    violations: list[Violation]
    """Broken rules."""
    nbytes: int
    """Packed bytes."""


def ingest(
    recipe: Recipe | str | Path,
    *,
    url: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Write a recipe's data set as an Icechunk repository and return it opened.

    Args:
        recipe: a recipe or the path of its YAML file.
        url: where to write, in place of the recipe's.
        overwrite: replace what is there, once the new store is complete.
        progress: called with (bytes written, bytes in all) after each shard.

    Raises:
        InputError: a source, dataset or dimension that does not exist, or a destination that does.
        QualityError: a rule is broken; nothing is left behind.
        IntegrityError: a shard did not read back as it was written; nothing is left behind.
    """
    import icechunk

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, url)
    destination = _destination(url or recipe.url, overwrite)
    blocks = [make_block(name, part, recipe.tiling) for name, part in recipe.variables.items()]
    check_aligned(blocks)
    with new_directory(destination, overwrite=overwrite) as directory:
        repository = icechunk.Repository.create(local_storage(directory), **_spec_version())
        session = repository.writable_session("main")
        root = zarr.create_group(session.store, attributes={"title": recipe.title, "Conventions": "CF-1.10"})
        located = _write_coordinates(root, recipe, blocks)
        arrays = {block.name: _create(root, block, recipe.codec, located) for block in blocks}
        written = _write_all(blocks, arrays, progress)
        _gate(recipe, written)
        fingerprint = _write_meta(root, arrays, written)
        session.commit(recipe.title or "ingest", metadata={"fingerprint": fingerprint})
    return open(destination)


def _destination(url: str, overwrite: bool) -> Path:
    """The local directory to write; never one that holds anything but a store."""
    if "://" in url:
        raise InputError(f"cannot write to {url}: ingest into a local directory, then copy that to where it is served")
    path = Path(url)
    if overwrite and path.exists():
        store = (path / "snapshots").is_dir() or (path / "zarr.json").is_file() or (path / ".zgroup").is_file()
        if not path.is_dir() or not (store or not any(path.iterdir())):
            raise InputError(f"{path} is not a store, so it is not overwritten: name another place or remove it")
    return path


def _spec_version() -> dict[str, Any]:
    """Icechunk 2 writes a format that 1.1 cannot read, unless it is told otherwise."""
    import inspect

    import icechunk

    return {"spec_version": 1} if "spec_version" in inspect.signature(icechunk.Repository.create).parameters else {}


def _create(root: zarr.Group, block: Block, codec: str, located: list[str]) -> zarr.Array[Any]:
    recipe, record = block.recipe, block.shape[1:]
    record_bytes = math.prod(record) * block.dtype.itemsize
    packing = {"scale_factor": float(recipe.scale), "add_offset": float(recipe.offset)}
    attributes: dict[str, Any] = {**packing, "units": recipe.unit}
    optional = {
        "long_name": recipe.long_name or None,
        "_FillValue": block.missing,
        "gpuops_fill": recipe.fill,
        "coordinates": " ".join(located) or None,
    }
    attributes |= {key: value for key, value in optional.items() if value is not None}
    return root.create_array(
        block.name,
        shape=block.shape,
        dtype=block.dtype,
        chunks=(1, *record),
        shards=(_shard_records(block, record_bytes), *record),
        compressors=[ZstdCodec(level=1, checksum=True)] if codec == "zstd" else [Crc32cCodec()],
        filters=None,
        fill_value=0,
        dimension_names=block.dims,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def _shard_records(block: Block, record_bytes: int) -> int:
    """Records a shard; whole rows of tiles where they fit. Depends on the data alone, never on the machine."""
    records = max(1, min(block.shape[0] // SHARDS, SHARD_BYTES // record_bytes))
    if block.tiling is not None:
        columns = block.source.shape[block.recipe.dims.index(block.tiling.columns)] // block.tiling.size
        if records > columns:
            records -= records % columns
    return records


def _write_coordinates(root: zarr.Group, recipe: Recipe, blocks: list[Block]) -> list[str]:
    """Write every coordinate; return the names of those that locate a tile (CF's auxiliary coordinates)."""

    def put(name: str, dim: str, values: npt.NDArray[Any], unit: str) -> None:
        if name in recipe.variables:
            raise InputError(f"a variable and a coordinate are both called {name!r}: rename the variable")
        root.create_array(
            name,
            data=values,
            dimension_names=(dim,),
            attributes={"units": unit},
            compressors=[ZstdCodec(level=1, checksum=True)],
            config={"write_empty_chunks": True},
        )

    tiling = recipe.tiling
    sizes = {dim: size for block in blocks for dim, size in block.sizes.items()}
    for dim, axis in recipe.coordinates.items():
        if dim not in sizes:
            raise InputError(f"coordinates name dimension {dim!r}; the variables have {', '.join(sizes)}")
        if tiling is None or dim not in (tiling.rows, tiling.columns):
            put(dim, dim, axis_values(axis, sizes[dim]), axis.unit)
    if tiling is None:
        return []
    row, column = np.divmod(np.arange(blocks[0].shape[0]), sizes[tiling.columns] // tiling.size)
    for dim, position in ((tiling.rows, row), (tiling.columns, column)):
        if dim in recipe.coordinates:
            axis = recipe.coordinates[dim]
            middle = axis.first + axis.step * (position * tiling.size + (tiling.size - 1) / 2)
            put(dim, tiling.name, middle.astype(np.float32), axis.unit)
    across = -(-sizes[tiling.columns] // (tiling.size * tiling.region))
    region = (row // tiling.region) * across + column // tiling.region
    put("region", tiling.name, region.astype(np.int32), "1")
    return [*(dim for dim in (tiling.rows, tiling.columns) if dim in recipe.coordinates), "region"]


def _write_all(
    blocks: list[Block], arrays: Mapping[str, zarr.Array[Any]], progress: Callable[[int, int], None] | None
) -> list[Written]:
    """Every shard of every variable, one Dask task each, on local threads."""
    import dask.config
    import dask.system
    from dask.base import compute
    from dask.callbacks import Callback
    from dask.delayed import delayed

    total = sum(math.prod(block.shape) * block.dtype.itemsize for block in blocks)
    done = 0
    at_work = _AtWork()

    def write(*arguments: Any) -> Written:
        with at_work.one():
            return _write_shard(*arguments)

    tasks = []
    for block in blocks:
        shards = arrays[block.name].shards
        assert shards is not None
        per_shard = shards[0]
        for shard in range(-(-block.shape[0] // per_shard)):
            last = min((shard + 1) * per_shard, block.shape[0])
            tasks.append(delayed(write)(block, arrays[block.name], shard, shard * per_shard, last))

    class Reporter(Callback):
        def _posttask(self, key: Any, result: Any, dsk: Any, state: Any, worker_id: Any) -> None:
            nonlocal done
            if isinstance(result, Written):
                done += result.nbytes
                if progress is not None:
                    progress(done, total)

    # A pool of its own, because Dask's lasts as long as the process and its threads could keep that from ending.
    threads = dask.config.get("num_workers", None) or dask.system.CPU_COUNT
    try:
        with ThreadPoolExecutor(threads, "gpuops-ingest") as pool, Reporter():  # type: ignore[no-untyped-call]
            return list(compute(*tasks, scheduler="threads", pool=pool))
    finally:
        at_work.stop()


class _AtWork:
    """Tasks that are running. The first failure or signal ends Dask's call, but not the tasks beside it.

    A thread pool's own waiting is not enough: a signal that arrives while it starts a thread makes it forget that one.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._running = 0
        self._stopped = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count the task in the block; refuse it after `stop`."""
        with self._change:
            if self._stopped:
                raise RuntimeError("the ingest has ended")
            self._running += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()

    def stop(self) -> None:
        """Return once no task runs and none will start, so that their directory can be removed."""
        with self._change:
            self._stopped = True
            self._change.wait_for(lambda: self._running == 0)


def _write_shard(block: Block, array: zarr.Array[Any], shard: int, first: int, last: int) -> Written:
    records = block.read(first, last)
    recipe = block.recipe
    packing = (recipe.scale, recipe.offset, block.missing)
    violations = check(block.name, records, first, recipe.quality, packing)
    array[first:last] = records
    digest = _read_back(array, records, shard, first)
    sketch = Sketch.of(records, *_sketch_range(block), missing=block.missing)
    return Written(block.name, shard, digest, describe(records, *packing), sketch, violations, records.nbytes)


def _read_back(array: zarr.Array[Any], records: npt.NDArray[Any], shard: int, first: int) -> str:
    """Compare every inner chunk of a shard with what was written, by our own decoder; return the shard's digest."""
    place = layout(array)
    store = array.store_path.store
    chunks = [(first + i, *(0,) * (array.ndim - 1)) for i in range(len(records))]
    key, _ = place.key(chunks[0])
    (whole,) = read_ranges(store, [(key, None)])
    got = np.empty((1, *records.shape[1:]), records.dtype)
    for i, (_, span) in enumerate(ShardIndexes(place, store).locate(chunks)):
        assert whole is not None
        assert span is not None
        try:
            place.decode(whole[span.start : span.end], got)
        except ValueError as error:
            raise IntegrityError(f"{array.path}: shard {shard} cannot be read back ({error}): {_NOTHING}") from error
        if not np.array_equal(got.view(np.uint8), records[i : i + 1].view(np.uint8)):
            raise IntegrityError(f"{array.path}: shard {shard} did not read back as written: {_NOTHING}")
    return hashlib.sha256(whole.tobytes()).hexdigest()  # type: ignore[union-attr]


def _sketch_range(block: Block) -> tuple[float, float]:
    """Range of the histogram of stored values: exact for 8 bits, else the rules' bounds, else the dtype's."""
    dtype, recipe = block.dtype, block.recipe
    if dtype.itemsize == 1:
        info = np.iinfo(dtype)
        return info.min - 0.5, info.max + 0.5
    bounds = (recipe.quality.valid_min, recipe.quality.valid_max)
    if None not in bounds:
        stored = sorted((bound - recipe.offset) / recipe.scale for bound in bounds if bound is not None)
        return stored[0], stored[1]
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(np.float16)
    return float(limits.min), float(limits.max)


def _gate(recipe: Recipe, written: list[Written]) -> None:
    missing = {}
    for name in recipe.variables:
        parts = [part for part in written if part.name == name]
        absent, present = sum(part.sketch.missing for part in parts), sum(part.sketch.total for part in parts)
        missing[name] = absent / max(absent + present, 1)
    rules = {name: variable.quality for name, variable in recipe.variables.items()}
    gate([violation for part in written for violation in part.violations], missing, rules)


def _write_meta(root: zarr.Group, arrays: Mapping[str, zarr.Array[Any]], written: list[Written]) -> str:
    """Digests, statistics and sketches into the same commit; returns the fingerprint."""
    digests = {name: [w.digest for w in _parts(written, name)] for name in arrays}
    coordinates = {name: array for name, array in root.arrays() if name not in arrays}
    for name, array in coordinates.items():
        digests[name] = [hashlib.sha256(np.ascontiguousarray(array[:]).tobytes()).hexdigest()]
    metadata = {name: array_metadata(array) for name, array in {**arrays, **coordinates}.items()}
    fingerprint = strong_fingerprint(metadata, digests)
    meta = root.create_group(META, attributes={"fingerprint": fingerprint, "columns": list(COLUMNS)})
    for name, values in digests.items():
        raw = np.frombuffer(bytes.fromhex("".join(values)), np.uint8).reshape(len(values), 32)
        meta.create_array(f"digests/{name}", data=raw)
    for name in arrays:
        parts = _parts(written, name)
        meta.create_array(f"stats/{name}", data=np.concatenate([part.rows for part in parts]))
        counts = np.stack([part.sketch.counts for part in parts])
        edges: dict[str, Any] = {"lo": parts[0].sketch.lo, "hi": parts[0].sketch.hi}
        meta.create_array(f"sketch/{name}", data=counts, attributes=edges)
    return fingerprint


def _parts(written: list[Written], name: str) -> list[Written]:
    return sorted((part for part in written if part.name == name), key=lambda part: part.shard)
