"""What a store is like to read, and every silent slow or blind path a reader of it would take, each with its remedy."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpuops.doctor.finding import Finding
from gpuops.errors import GpuopsError
from gpuops.spec import DTYPES

if TYPE_CHECKING:
    from gpuops.data.cost import Cost
    from gpuops.data.reading.shard import Layout
    from gpuops.data.source import Source
    from gpuops.data.variable import Variable
    from gpuops.doctor.missing import Presence


def store(url: str) -> list[Finding]:
    """Everything worth knowing about a store before training on it; its data is not read, but for the shard indexes.

    Raises:
        InputError: there is no store, or one that the installed packages cannot read.
    """
    from gpuops.data.cost import sampled
    from gpuops.data.source import open

    source = open(url)
    findings = [Finding("ok", "store", f"{source.kind}, {len(source.variables)} variables"), _identity(source)]
    findings += [*_pipeline(source), *_ranges(source), *_processes()]
    variables = sampled(source)
    findings += [*_axes(variables), *_times(source, variables)]
    for variable in variables.values():
        findings += _variable(source, variable)
    return findings


def _identity(source: Source) -> Finding:
    if not source.weak:
        return Finding("ok", "identity", f"fingerprint {source.fingerprint[:16]} over contents")
    detail = f"weak: it rests on {source.rests_on}, because the store holds no digests"
    if source.rests_on == "snapshot id":
        return Finding("note", "identity", f"{detail}; a copy of the same data counts as other data")
    detail += ", so changed bytes are not noticed"
    return Finding("note", "identity", f"{detail}; `gpuops ingest` records them")


def _pipeline(source: Source) -> Iterator[Finding]:
    """Zarr's own codec pipeline, which xarray and Dask use; our reader decodes by itself."""
    import zarr

    path = str(zarr.config.get("codec_pipeline.path", ""))
    if source.kind == "icechunk" and "zarrs" in path.lower():
        yield Finding(
            "note",
            "codec pipeline",
            f"{path} is configured, but on an Icechunk store it silently becomes the pure-Python pipeline (strict "
            "too): Zarr, xarray and Dask read at that speed. gpuops' reader decodes by itself and is not affected; for "
            "the others use a plain Zarr directory",
        )


def _ranges(source: Source) -> Iterator[Finding]:
    """Whether an object store answers with the bytes that were asked for, and no more."""
    from zarr.storage import ObjectStore

    from gpuops.data.view import View

    stores = source.store.members.values() if isinstance(source.store, View) else [source.store]
    yield from (_answers(source, store.store) for store in stores if isinstance(store, ObjectStore))


def _answers(source: Source, objects: Any) -> Finding:
    import obstore
    import obstore.exceptions

    def get(**where: int) -> bytes | None:
        for key in ("zarr.json", ".zgroup", ".zmetadata", ".zattrs"):
            try:
                if where:
                    return bytes(obstore.get_range(objects, key, **where))
                return bytes(obstore.get(objects, key).bytes())
            except FileNotFoundError:
                continue
        return None

    try:
        whole = get()
        part = get(start=1, length=2)
        good = whole is not None and part == whole[1:3]
    except (obstore.exceptions.BaseError, ValueError):
        good = False
    if good:
        return Finding("ok", "byte ranges", "the object store answers ranged requests")
    detail = (
        "the object store does not answer ranged requests: shards cannot be read in parts, every read is a whole "
        "object. Serve it from an S3-compatible store, or copy it with `gpuops ingest`"
    )
    return Finding("bad" if _sharded(source) else "note", "byte ranges", detail)


def _sharded(source: Source) -> bool:
    return any(variable.array.shards is not None for variable in source.variables.values())


def _processes() -> Iterator[Finding]:
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if method == "fork":
        yield Finding(
            "note",
            "worker processes",
            "the start method is fork: a forked DataLoader worker inherits the locks, but not the threads, of Zarr, "
            "obstore and Icechunk, and can hang. gpuops reads with threads in the rank's own process and forks none; "
            "for a DataLoader of yours pass multiprocessing_context='forkserver'",
        )


def _axes(variables: dict[str, Variable]) -> Iterator[Finding]:
    axes: dict[tuple[str, int], list[str]] = {}
    for name, variable in variables.items():
        axes.setdefault((variable.dims[0], variable.array.shape[0]), []).append(name)
    if len(axes) > 1:
        listed = "; ".join(f"{dim} ({size}): {', '.join(names)}" for (dim, size), names in axes.items())
        yield Finding("note", "first axes", f"they differ, so these do not make one sample together: {listed}")


def _times(source: Source, variables: dict[str, Variable]) -> Iterator[Finding]:
    """Missing dates and gaps: a window that crosses one spans more time than it says."""
    import numpy as np

    for dim in dict.fromkeys(variable.dims[0] for variable in variables.values()):
        missing = source.absent.get(dim)
        if missing is not None:
            detail = f"{len(missing)} positions along {dim} hold no data: samples that read one are left out"
            yield Finding("note", "missing dates", detail)
        try:
            times = source.coordinate(dim)
        except GpuopsError:
            continue
        if times.dtype.kind != "M" or len(times) < 3:
            continue
        steps = np.diff(times.astype(np.int64))
        usual = int(np.median(steps))
        odd = np.flatnonzero(steps != usual)
        if len(odd):
            yield Finding(
                "note",
                f"times along {dim}",
                f"{len(odd)} of {len(steps)} steps are not {np.timedelta64(usual, 'ns').astype('m8[s]')}, the first "
                f"after {times[odd[0]].astype('M8[s]')}: a window across one joins times that are no neighbours; "
                "split by periods between them",
            )


def _variable(source: Source, variable: Variable) -> list[Finding]:
    import numpy as np

    from gpuops.data.cost import cost
    from gpuops.data.reading.shard import layout
    from gpuops.doctor.missing import look

    name = variable.name
    try:
        place = layout(variable.array)
    except GpuopsError as error:
        return [Finding("bad", name, str(error))]
    price = cost(place)
    absent = source.absent.get(variable.dims[0], np.empty(0, np.int64))
    counted = look(place, source.store, absent.tolist())
    findings = []
    if place.checksummed and place.record_is_chunk:
        complete = "" if counted is None or not counted.complete else ", no chunk missing"
        detail = f"one record an inner chunk, checksummed ({', '.join(place.codecs)}){complete}"
        findings.append(Finding("ok", name, detail))
    notes = [
        *_values(variable, place),
        *_layout(variable, place, price, variable.name in source.spacing),
        *_channels(source, place),
    ]
    if counted is None:
        notes.append("the store cannot list its keys: missing chunks are not counted")
    elif not counted.complete:
        notes.append(_missing(counted))
    return findings + [Finding("note", name, note) for note in notes]


def _values(variable: Variable, place: Layout) -> Iterator[str]:
    """What is stored, and whether damage would show."""
    attributes: dict[str, Any] = variable.array.attrs.asdict()
    if (dtype := str(variable.array.dtype)) not in DTYPES:
        yield f"stored as {dtype}, which no kernel reads: `gpuops train` takes {', '.join(DTYPES)}; re-ingest it as one"
    if str(attributes.get("_Unsigned", "")).lower() == "true" and variable.array.dtype.kind == "i":
        yield "unsigned values in a signed dtype (_Unsigned): samples of it are refused; re-ingest it"
    if not place.checksummed:
        yield "no checksum on inner chunks: corruption cannot be seen; `gpuops ingest` writes them"
    if variable.array.dtype.kind == "f" and not set(place.codecs) - {"crc32c"}:
        size = variable.array.dtype.itemsize
        yield (
            f"{size} bytes a value, not compressed: packed to 16 bits it is {size / 2:g} times smaller on disk and on "
            "the way to the GPU, where your tolerance allows (`gpuops ingest`)"
        )


def _layout(variable: Variable, place: Layout, price: Cost, patched: bool) -> Iterator[str]:
    """What a random record costs; of images it is patches that are read."""
    from gpuops.data.cost import LARGE, SMALL

    if price.records_per_chunk > 1:
        yield (
            f"{price.records_per_chunk} records a chunk: a random one decodes all of them, "
            f"{price.decoded_per_useful:.3g} bytes per useful byte; lanes (the default) decode each chunk "
            f"once ({price.decoded_in_lanes:.3g}), and one record a chunk needs neither (`gpuops ingest`)"
        )
    if price.chunks_per_record > 1 and not patched:
        yield (
            f"a record of {variable.array.shape[1:]} straddles chunks of {place.chunk[1:]}: {price.chunks_per_record} "
            "reads a record; `gpuops ingest` writes one"
        )
    if price.chunk_bytes < SMALL and place.array.nbytes > SMALL:
        yield (
            f"chunks of {price.chunk_bytes:,} bytes: below 64 KiB the number of requests is the limit, not the bytes; "
            "make a record several time steps or levels (`gpuops ingest`)"
        )
    if price.chunk_bytes > LARGE:
        yield (
            f"chunks of {price.chunk_bytes / 2**20:.0f} MiB: above 16 MiB a sample waits for one thread's decode "
            "and read-ahead takes much memory; make the record smaller (`gpuops ingest`)"
        )


def _channels(source: Source, place: Layout) -> Iterator[str]:
    """What a field of few channels costs."""
    names = source.channels.get(place.array.path, ())
    if len(names) > 1 and place.chunk[1] > 1:
        yield f"{place.chunk[1]} of {len(names)} channels share a chunk: a field of one channel decodes them all, once"


def _missing(counted: Presence) -> str:
    what = f"{counted.keys - counted.present} of {counted.keys} keys are not there"
    if counted.inner > counted.inner_present:
        absent = counted.inner - counted.inner_present
        what += f", {absent} of {counted.inner} inner chunks in the {counted.shards} shards looked at are missing"
    return (
        f"{what} (first: {', '.join(counted.missing)}): an error when a sample needs one. If the archive leaves out "
        "chunks without data, open it with missing_chunks='fill'; else restore them"
    )
