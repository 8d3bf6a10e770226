"""HDF5, NetCDF, Zarr or arrays in; one checked, sharded, committed Zarr v3 store out.

Whole shards only, one Dask task a shard. Each task reads its block, checks the declared rules, computes statistics,
writes the shard, reads it back and compares it with what it wrote. The commit happens once, if every task passed. What
a killed ingest finished is taken up by the next one with the same recipe (`gpuops.data.writing.staging`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zarr

from gpuops.data.census import count_chunks
from gpuops.data.place import local_path
from gpuops.data.source import META, Source, open
from gpuops.data.writing.append import array_of, check_same_variables, fitted, grown_coordinates
from gpuops.data.writing.block import Block, check_aligned, make_block
from gpuops.data.writing.choice import chosen, divide
from gpuops.data.writing.commit import QUALITY, Kept, fingerprint_of, joined, judge, kept_of, write_meta
from gpuops.data.writing.coordinates import check_coordinates, located, make_coordinates
from gpuops.data.writing.inputs import parts_of, variables_of
from gpuops.data.writing.packing import choose
from gpuops.data.writing.recipe import Recipe, StaticRecipe, VariableRecipe, known_keys, load_recipe, vars_of
from gpuops.data.writing.schedule import THREADS, run_all
from gpuops.data.writing.shards import Written, census, create, digest_of, write_shard, write_whole
from gpuops.data.writing.staging import Root, Staging, exists, pickled, staging
from gpuops.data.writing.static import check_same, make_static, put
from gpuops.errors import InputError, QualityError
from gpuops.lineage.version import canonical_json

_REMOTE = ("s3", "s3a", "gs", "gcs", "az", "azure")
"""Object stores that Icechunk writes."""


def ingest(
    recipe: Any,
    *,
    url: str | Path | None = None,
    overwrite: bool = False,
    append: bool = False,
    scheduler: str = THREADS,
    tolerance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Source:
    """Write a data set as an Icechunk repository, or a plain Zarr v3 directory, and return it opened.

    Args:
        recipe: a Recipe, the path of its YAML file, the path or URL of a file or store whose variables are all taken,
            an xarray.Dataset or DataArray, or a mapping of names to arrays of NumPy, Dask or xarray.
        url: where to write, in place of the recipe's: a local directory or `s3://BUCKET/PREFIX`, which takes
            endpoint, region and keys from the AWS_* environment variables.
        overwrite: replace what is there, once the new store is complete.
        append: add the records behind those that are there.
        scheduler: "threads", or the address of a `distributed` cluster.
        tolerance: pack floats within this absolute error, physical units, where the recipe does not say how.
        progress: called with (bytes written, bytes in all) after each shard.
        options: further keys of a Recipe, in place of its own: codec, format, shard_records, ...

    Raises:
        InputError: a source, dataset or dimension that does not exist, a destination that does (or does not fit what
            is appended), or a tolerance that no integers keep.
        QualityError: a rule is broken; nothing is left behind.
        IntegrityError: a shard did not read back as it was written; nothing is left behind.
        UnavailableError: no cluster answers.
    """
    whole = as_recipe(recipe, None if url is None else str(url), tolerance, options)
    _check_destination(whole, overwrite, append)
    blocks = [make_block(name, part, whole.tiling) for name, part in whole.variables.items()]
    check_aligned(blocks)
    if append:
        whole = replace(whole, format=open(whole.url).kind)
    key = _key(whole, blocks, append)
    with staging(whole.url, key, format=whole.format, append=append, overwrite=overwrite) as stage:
        finished = stage.finished()
        if finished is not None and exists(whole.url) and open(whole.url).fingerprint == finished:
            pass  # killed while it cleaned up
        elif stage.complete():
            stage.swap()
        else:
            _carry_out(whole, blocks, stage, scheduler, progress)
    return open(whole.url)


def as_recipe(recipe: Any, url: str | None, tolerance: float | None, options: Mapping[str, Any]) -> Recipe:
    """The recipe behind whatever `ingest` is given.

    Raises:
        InputError: it says nothing that can be ingested, or has no place to write to.
    """
    known = [name for name in Recipe.__dataclass_fields__ if name not in ("url", "variables")]
    if wrong := [name for name in options if name not in known]:
        raise InputError(f"an ingest has no option {wrong[0]!r}: {known_keys(wrong[0], known)}")
    if isinstance(recipe, str | Path) and str(recipe).endswith((".yaml", ".yml")):
        recipe = load_recipe(recipe, url)
    if isinstance(recipe, Recipe):
        whole = Recipe(**{**vars_of(recipe), **options, "url": url or recipe.url})
    else:
        sources, static, title = _sources(recipe)
        if url is None:
            raise InputError("nothing says where to write: give a url (`--url STORE`)")
        variables = {
            str(name): source if isinstance(source, VariableRecipe) else VariableRecipe(source)
            for name, source in sources.items()
        }
        fields = {name: StaticRecipe(source) for name, source in static.items()}
        whole = Recipe(url, variables, **{"title": title, "static": fields, **options})
    if tolerance is not None:
        whole = replace(whole, tolerance=tolerance)
    path = local_path(whole.url)
    return whole if path is None else replace(whole, url=str(path))


def _sources(given: Any) -> tuple[Mapping[Any, Any], Mapping[str, Any], str]:
    """Sources of variables by name, those of static fields, and a title, of what is no recipe."""
    import xarray as xr

    if isinstance(given, str | Path):
        location, _, dataset = str(given).partition("#")
        if dataset:
            return {dataset.rpartition("/")[2]: str(given)}, {}, ""
        return *variables_of(location), ""
    if isinstance(given, xr.DataArray):
        return {str(given.name or "data"): given}, {}, ""
    if isinstance(given, xr.Dataset):
        arrays = {str(name): array for name, array in given.data_vars.items()}
        forms = {name: (tuple(map(str, a.dims)), a.shape, a.dtype) for name, a in arrays.items()}
        moving, static = chosen("the data set", forms)
        title = str(given.attrs.get("title", ""))
        return {name: arrays[name] for name in moving}, {name: arrays[name] for name in static}, title
    if isinstance(given, Mapping):
        named = {name: array for name, array in given.items() if isinstance(array, xr.DataArray) and array.ndim}
        static = divide({n: (tuple(map(str, a.dims)), a.shape) for n, a in named.items()})[1] if named else []
        return {n: a for n, a in given.items() if n not in static}, {str(n): named[n] for n in static}, ""
    raise InputError(f"{type(given).__name__} cannot be ingested: give a recipe, a file or arrays by name")


def _check_destination(recipe: Recipe, overwrite: bool, append: bool) -> None:
    """Refuse a place that cannot be written, or that holds what would be lost."""
    url, path = recipe.url, Path(recipe.url)
    if append and overwrite:
        raise InputError("append keeps what is there and overwrite replaces it: pass one of them")
    if "://" in url:
        parts = urlsplit(url)
        if parts.scheme not in _REMOTE or not parts.netloc or not parts.path.strip("/"):
            raise InputError(f"cannot write to {url}: give a local directory or s3://BUCKET/PREFIX")
        if recipe.format != "icechunk":
            raise InputError(f"cannot write plain Zarr to {url}, where nothing is atomic: use format icechunk")
    else:
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"cannot write to {path}: {above} is no directory that may be written to")
    there = exists(url)
    if append and not there:
        raise InputError(f"{url} does not exist, so nothing can be appended: leave out --append")
    if append and recipe.tiling is not None:
        raise InputError("tiles are a place each, so there are no more to append: ingest the whole area again")
    if "://" in url and there and not (overwrite or append):
        raise InputError(f"{url} exists: pass --overwrite to replace it, or name another place")
    if overwrite and there and "://" not in url:
        store = (path / "snapshots").is_dir() or (path / "zarr.json").is_file() or (path / ".zgroup").is_file()
        if not path.is_dir() or not (store or not any(path.iterdir())):
            raise InputError(f"{path} is not a store, so it is not overwritten: name another place or remove it")


def _key(recipe: Recipe, blocks: list[Block], append: bool) -> str:
    """What a rerun must have in common with an ingest to take up its shards."""
    plain = {name: getattr(recipe, name) for name in ("codec", "title", "format", "chunk_records", "shard_records")}
    variables = [
        {
            "name": block.name,
            "from": block.input.identity,
            "dims": list(block.source_dims),
            "meaning": repr((block.source_scale, block.source_offset, block.source_missing, block.fill)),
            "words": [block.unit, block.long_name],
            "rules": repr((block.rules, recipe.pack_of(block.name, block.input.dtype))),
            "dtype": str(block.input.dtype),
            "shape": list(block.shape),
        }
        for block in blocks
    ]
    axes = repr((recipe.coordinates, recipe.tiling))
    static = {
        name: [[part.identity for part in parts_of(field.source)], repr(replace(field, source=None))]
        for name, field in recipe.static.items()
    }
    document = {**plain, "variables": variables, "static": static, "coordinates": axes, "append": append}
    return hashlib.sha256(canonical_json(document)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Task:
    """One shard of one variable."""

    block: int
    """Position of the variable."""
    shard: int
    """Position of the shard on the sample axis."""
    first: int
    """Its first record."""
    last: int
    """One past its last record."""
    before: tuple[Written, bytes | None] | None = None
    """What an ingest that was killed kept of it."""

    @property
    def name(self) -> str:
        """Its name in the journal."""
        return f"{self.block}-{self.shard}"


@dataclass(frozen=True, slots=True)
class WriteShards:
    """Carries tasks out, in a thread or in a worker of a cluster."""

    blocks: tuple[Block, ...]
    """The variables."""
    root: Root
    """The store in which their arrays were created."""

    def __call__(self, task: Task) -> tuple[Task, Written, bytes | None]:
        """Write one shard, unless it is there already as the journal says."""
        block = self.blocks[task.block]
        if task.before is not None:
            written, fork = task.before
            store, _ = replace(self.root, fork=fork).open()
            if digest_of(zarr.open_array(store, path=block.name, mode="r"), task.first) == written.digest:
                return task, written, fork
        store, session = self.root.open()
        array = zarr.open_array(store, path=block.name, mode="r+")
        array = array.with_config({"write_empty_chunks": True})
        return task, _write_shard(block, array, task.shard, task.first, task.last), pickled(session)


def _write_shard(block: Block, array: zarr.Array[Any], shard: int, first: int, last: int) -> Written:
    return write_shard(block, array, shard, first, last)


def _carry_out(
    recipe: Recipe,
    blocks: list[Block],
    stage: Staging,
    scheduler: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    plan = stage.plan()
    if plan is None:
        plan = _begin(recipe, blocks, stage, scheduler)
    packings, befores, chunks, axes, kept = (plan[k] for k in ("packing", "before", "chunks", "axes", "kept"))
    blocks = [
        replace(block, packing=packings[block.name], before=befores[block.name], old=plan["old"][block.name])
        for block in blocks
    ]
    root: Root = plan["root"]
    journal = stage.kept()
    tasks = [replace(task, before=journal.get(task.name)) for task in _tasks(blocks, plan["per_shard"])]
    total = sum((task.last - task.first) * _record_bytes(blocks[task.block]) for task in tasks)
    results: dict[str, list[Written]] = {block.name: [] for block in blocks}
    forks: list[bytes | None] = [root.fork]
    done = 0

    def keep(result: tuple[Task, Written, bytes | None]) -> None:
        nonlocal done
        task, written, fork = result
        if task.before is None or task.before[0].digest != written.digest:
            stage.keep(task.name, (written, fork))
        results[written.name].append(written)
        forks.append(fork)
        done += written.nbytes
        if progress is not None:
            progress(done, total)

    run_all(WriteShards(tuple(blocks), root), tasks, keep, scheduler)
    wholes = {block.name: joined(block, results[block.name], kept[block.name]) for block in blocks}
    report = judge(blocks, wholes, axes, chunks)
    store, session = stage.merged(root, forks)
    group = zarr.open_group(store, mode="r+")
    found = dict(group.arrays())
    arrays = {block.name: found.pop(block.name) for block in blocks}
    for block in blocks:
        census(arrays[block.name], {part.shard: part.size for part in results[block.name]})
    report["static"] = plan["static"]
    fingerprint, digests = fingerprint_of(arrays, found, wholes)
    write_meta(group, wholes, digests, fingerprint, report)
    stage.commit(session, recipe.title or "ingest", fingerprint)


def _record_bytes(block: Block) -> int:
    return math.prod(block.shape[1:]) * block.dtype.itemsize


def _tasks(blocks: list[Block], per_shard: Mapping[str, int]) -> list[Task]:
    """Every shard that an ingest writes, whole; an append begins with the shard that is not full."""
    tasks = []
    for i, block in enumerate(blocks):
        per = per_shard[block.name]
        for shard in range(block.before // per, -(-block.records // per)):
            tasks.append(Task(i, shard, shard * per, min((shard + 1) * per, block.records)))
    return tasks


def _begin(recipe: Recipe, blocks: list[Block], stage: Staging, scheduler: str) -> dict[str, Any]:
    """Look at the sources, choose the packing, create or grow the arrays; the plan that a rerun finds."""
    chunks = {block.name: _source_chunks(block) for block in blocks}
    store = stage.begin()
    if stage.append:
        group = zarr.open_group(store, mode="r+")
        old = {block.name: array_of(group, block.name, stage.destination) for block in blocks}
        check_same_variables(group, old, stage.destination)
        said: Any = group[f"{META}/{QUALITY}"].attrs["variables"]
        blocks = [fitted(recipe, block, old[block.name], said[block.name], stage.destination) for block in blocks]
    else:
        blocks = [_packed(recipe, block, scheduler) for block in blocks]
        group = zarr.create_group(
            store, attributes={"title": recipe.title, "Conventions": "CF-1.10"}, overwrite=stage.in_place
        )
    coordinates = make_coordinates(recipe, blocks)
    static = make_static(recipe, blocks)
    kept: dict[str, Kept | None] = {block.name: None for block in blocks}
    arrays = {}
    for block in blocks:
        if stage.append:
            arrays[block.name] = array = old[block.name]
            per = (array.shards or array.chunks)[0]
            kept[block.name] = kept_of(group, block.name, block.before // per, block.before - block.before % per)
            array.resize((block.records, *block.shape[1:]))
        else:
            arrays[block.name] = create(group, block, recipe, located(recipe, coordinates))
    if stage.append:
        recorded = dict(group[f"{META}/{QUALITY}"].attrs.get("static", {}))  # type: ignore[arg-type]
        check_same(group, list(recorded), static)
        coordinates = grown_coordinates(group, coordinates, blocks[0], {*arrays, *recorded})
    else:
        put(group, static)
        recorded = {name: field.report for name, field in static.items()}
    for name, coordinate in coordinates.items():
        write_whole(group, name, coordinate.values, (coordinate.dim,), coordinate.attributes)
    plan = {
        "packing": {block.name: block.packing for block in blocks},
        "before": {block.name: block.before for block in blocks},
        "old": {block.name: block.old for block in blocks},
        "per_shard": {name: (array.shards or array.chunks)[0] for name, array in arrays.items()},
        "chunks": chunks,
        "axes": check_coordinates(recipe, coordinates, blocks[0].dims[0]),
        "kept": kept,
        "static": recorded,
    }
    return {**plan, "root": stage.save_plan(plan)}


def _source_chunks(block: Block) -> dict[str, int] | None:
    """Chunks of a Zarr source; QualityError if some are absent and that does not mean "no data"."""
    if block.input.zarr is None:
        return None
    array = block.input.zarr()
    found = count_chunks(array)
    allowed = block.rules.allow_missing_chunks
    if allowed is None:
        fill = array.fill_value
        allowed = fill is not None and bool(fill != fill or fill in block.source_missing)
    if found.absent and not allowed:
        raise QualityError(
            f"nothing was committed: {block.name}: {found.absent:,} of {found.expected:,} chunks are missing from the "
            f"source, the first at {list(found.first or ())}; they would be stored as {array.fill_value}. Restore "
            "them, or declare `allow_missing_chunks: true`"
        )
    return {"expected": found.expected, "absent": found.absent}


def _packed(recipe: Recipe, block: Block, scheduler: str) -> Block:
    """The block with its packing; the data is read once more if no range is declared."""
    pack = recipe.pack_of(block.name, block.input.dtype)
    if pack is None:
        return block
    rules = block.rules
    low = rules.valid_min if pack.minimum is None else pack.minimum
    high = rules.valid_max if pack.maximum is None else pack.maximum
    if low is None or high is None:
        ends = [(math.inf, -math.inf)]
        step = max(1, 2**26 // (math.prod(block.shape[1:]) * block.input.dtype.itemsize))
        spans = [(first, min(first + step, block.shape[0])) for first in range(0, block.shape[0], step)]
        run_all(FindRange(block), spans, ends.append, scheduler)
        found = min(end[0] for end in ends), max(end[1] for end in ends)
        if found[0] > found[1]:
            raise InputError(f"{block.name} holds no data, so no packing can be chosen: declare minimum and maximum")
        low, high = found[0] if low is None else low, found[1] if high is None else high
    return replace(block, packing=choose(block.name, pack, low, high))


@dataclass(frozen=True, slots=True)
class FindRange:
    """Finds the range of some records of a source."""

    block: Block
    """The variable."""

    def __call__(self, span: tuple[int, int]) -> tuple[float, float]:
        """Smallest and largest value of records span[0] to span[1]."""
        return self.block.range(*span)
