"""The peers of bench_loader.py: other ways to the same batches, each in the settings that could be its fastest.

Peers that are not dependencies of gpuops are measured where they are installed; their rows are missing elsewhere.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import xarray as xr
import zarr
from loader_cases import VARIABLE, Case, Fields
from loader_limits import CONNECTIONS
from loader_subjects import BATCH, Contender, Epoch, read_ahead, steps
from torch.utils.data import DataLoader
from zarr.core.sync import sync

from gpuops.data import source
from gpuops.data.sample import Ids

OPTIONAL = {
    "tensorstore": "tensorstore",
    "zarrs": "zarrs",
    "xbatcher": "xbatcher",
    "spdl": "spdl.pipeline",
    "zarr-beluga": "beluga",
    "insitubatch": "insitubatch",
}
"""Modules of the peers that may not be installed, by distribution; insitubatch needs Python 3.12."""
WORKERS = 2
"""Processes of the DataLoader."""
PEER_THREADS = (2, 8)
"""Thread counts that are tried where a peer takes one."""


def installed(peer: str) -> bool:
    """Whether a peer can be imported."""
    try:
        return importlib.util.find_spec(OPTIONAL[peer]) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name
        return False


def peers(case: Case, url: str, opened: source.Source, loader: DataLoaderPeer) -> dict[str, Contender]:
    """Every peer that can read a case's store."""
    array, window = opened.variable(VARIABLE).array, case.window
    local = case.home in ("plain", "v2")
    found = {
        "zarr-oindex": Contender({"": partial(read_oindex, array, window)}),
        "zarr-getitem": Contender({"": partial(read_getitem, array, window)}),
        "zarr-async": Contender({"": partial(read_async, array, window)}),
        "torch-dataloader": Contender({f"{WORKERS} processes": partial(loader, url, window)}, ours=False),
    }
    if installed("tensorstore") and case.home != "icechunk":
        limits = (harness.cores(), 8) if local else CONNECTIONS
        found["tensorstore"] = Contender({f"limit {n}": open_tensorstore(case, url, n) for n in limits})
    if installed("zarrs") and local:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            through_zarrs = source.open(url).variable(VARIABLE).array
        found["zarrs"] = Contender(
            {
                "one by one": partial(read_getitem, through_zarrs, window),
                "async": partial(read_async, through_zarrs, window),
            }
        )
    if installed("xbatcher"):
        found["xbatcher"] = Contender({"": open_xbatcher(case, opened)})
    if installed("spdl"):
        found["spdl"] = Contender({f"{n} threads": partial(read_spdl, array, window, n) for n in PEER_THREADS})
    if installed("zarr-beluga") and case.home == "v2":
        found["zarr-beluga"] = Contender({f"{n} decode threads": open_beluga(url, n) for n in (harness.cores(), 4)})
    return found


def read_oindex(array: zarr.Array[Any], window: int, epoch: Epoch) -> Iterator[Fields]:
    for ids in epoch.batches:
        distinct, where = np.unique(steps(ids, window), return_inverse=True)
        values: Any = array.oindex[ids if window == 1 else distinct]
        yield values if window == 1 else values[where.reshape(len(ids), window)]


def read_getitem(array: zarr.Array[Any], window: int, epoch: Epoch) -> Iterator[Fields]:
    for ids in epoch.batches:
        yield np.stack([array[_selection(i, window)] for i in ids.tolist()])


def read_async(array: zarr.Array[Any], window: int, epoch: Epoch) -> Iterator[Fields]:
    async def gathered(ids: Ids) -> Fields:
        selections = (_selection(i, window) for i in ids.tolist())
        return np.stack(await asyncio.gather(*(array.async_array.getitem(s) for s in selections)))

    for ids in epoch.batches:
        yield sync(gathered(ids))


def _selection(first: int, window: int) -> int | slice:
    return first if window == 1 else slice(first, first + window)


class ZarrDataset:
    """A map-style dataset as most people write it; each worker opens the array for itself."""

    def __init__(self) -> None:
        self._url = ""
        self._array: Any = None

    def __getitem__(self, item: tuple[str, int, int]) -> torch.Tensor:
        url, first, window = item
        if url != self._url:
            self._url, self._array = url, source.open(url).variable(VARIABLE).array
        return torch.from_numpy(self._array[_selection(first, window)])


class DataLoaderPeer:
    """One DataLoader for the whole run: its worker processes start once and stay."""

    def __init__(self) -> None:
        self._batches: list[list[tuple[str, int, int]]] = []
        # Spawned, because the threads of the other subjects do not survive a fork.
        self._loader: DataLoader[torch.Tensor] = DataLoader(
            ZarrDataset(),  # type: ignore[arg-type]
            batch_sampler=self._batches,
            num_workers=WORKERS,
            multiprocessing_context="spawn",
            persistent_workers=True,
        )

    def __call__(self, url: str, window: int, epoch: Epoch) -> Iterator[Fields]:
        self._batches[:] = [[(url, i, window) for i in ids.tolist()] for ids in epoch.batches]
        for batch in self._loader:
            yield batch.numpy()


def open_tensorstore(case: Case, url: str, concurrency: int) -> Callable[[Epoch], Iterator[Fields]]:
    """Tensorstore with a cache for the shard indexes and none worth the name for samples."""
    import tensorstore  # type: ignore[import-not-found,unused-ignore]

    cache_bytes = 2**20
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{url}/{VARIABLE}"}
    if case.home == "s3":
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        kvstore = {
            "driver": "s3",
            "bucket": bucket,
            "path": f"{prefix}/{VARIABLE}/",
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "aws_region": os.environ["AWS_REGION"],
            "aws_credentials": {"type": "environment"},
        }
    limit = {"limit": concurrency}
    array = tensorstore.open(
        {"driver": "zarr" if case.home == "v2" else "zarr3", "kvstore": kvstore},
        context=tensorstore.Context(
            {
                "data_copy_concurrency": {"limit": harness.cores()},
                "s3_request_concurrency" if case.home == "s3" else "file_io_concurrency": limit,
                "cache_pool": {"total_bytes_limit": cache_bytes},
            }
        ),
        open=True,
        read=True,
    ).result()

    def start(number: int, ids: Ids) -> Callable[[], Fields]:
        waits: Callable[[], Fields] = array[steps(ids, case.window)].read().result
        return waits

    return partial(read_ahead, start=start)


def open_xbatcher(case: Case, opened: source.Source) -> Callable[[Epoch], Iterator[Fields]]:
    """A batch generator over the whole array whose samples are taken in our order."""
    import xbatcher  # type: ignore[import-not-found,unused-ignore]

    dataset = xr.open_zarr(opened.store, consolidated=False, chunks=None, mask_and_scale=False)[[VARIABLE]]
    sizes = dict(dataset.sizes)
    axis = str(dataset[VARIABLE].dims[0])
    generator = xbatcher.BatchGenerator(
        dataset[VARIABLE],
        input_dims=sizes | {axis: case.window},
        input_overlap={axis: case.window - 1},
        preload_batch=True,
    )

    def read(epoch: Epoch) -> Iterator[Fields]:
        for ids in epoch.batches:
            values = np.stack([generator[i].values for i in ids.tolist()])
            yield values[:, 0] if case.window == 1 else values

    return read


def read_spdl(array: zarr.Array[Any], window: int, threads: int, epoch: Epoch) -> Iterator[Fields]:
    from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found,unused-ignore]

    ids = np.concatenate(epoch.batches).tolist()
    pipeline = (
        PipelineBuilder()
        .add_source(ids)
        .pipe(lambda i: array[_selection(i, window)], concurrency=threads, output_order="input")
        .aggregate(BATCH)
        .pipe(np.stack)
        .add_sink(2)
        .build(num_threads=threads)
    )
    with pipeline.auto_stop():
        yield from pipeline


def open_beluga(url: str, threads: int) -> Callable[[Epoch], Iterator[Fields]]:
    """Beluga, which is told the whole epoch's order; it reads float32 grids alone."""
    import beluga  # type: ignore[import-not-found,unused-ignore]

    path = Path(url)
    reader = beluga.open_zarr_group(
        str(path.parent), path.name, variables=[VARIABLE], sched={"decode_threads": threads}
    )

    def read(epoch: Epoch) -> Iterator[Fields]:
        samples = reader.stream(np.concatenate(epoch.batches), frames=1)
        for ids in epoch.batches:
            yield np.stack([np.from_dlpack(next(samples))[0, 0] for _ in ids])

    return read
