"""What one batch needs: which inner chunks, where each is decoded to, and what is cut out of them afterwards.

An inner chunk that is one record, wanted once in the batch, is decoded where the record belongs in the slot. Any other
is decoded once into memory of its own, and the samples are cut out of it. Of a variable that is cut into patches only
the inner chunks are decoded that the batch's patches and their halos intersect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.patches import Boxes, chunks_of, intersects, read_box
from gpuops.data.reading.memory import Allocate, Chunk, Key, Memory, Pool
from gpuops.data.reading.shard import Coordinates, Layout, ShardIndexes, Spans
from gpuops.data.sample import BoundSample, Cut, Ids

ALIGN_BYTES = 64
"""Tensors of a slot begin on multiples of this."""
TRACKED_CHUNKS = 2**24
"""Most inner chunks whose repeated decoding is counted; the count takes a byte for each."""
Stored = dict[str, npt.NDArray[Any]]
"""Stored values by tensor name, each [n, channels, *spatial]."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One batch in stored form."""

    inputs: Stored
    """Input tensors."""
    targets: Stored
    """Target tensors."""
    ids: Ids
    """Sample ids, int64 [n]."""
    valid: npt.NDArray[np.bool_]
    """False for samples that only fill up the batch, [n]."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for side in (self.inputs, self.targets) for array in side.values())


@dataclass(slots=True)
class Reads:
    """Inner chunks of one variable to read and decode; columns, because an object a chunk is work for the collector."""

    variable: str
    """Variable."""
    layout: Layout
    """How its array lies."""
    chunks: npt.NDArray[np.int64]
    """Their grid positions, [m, axes]."""
    spans: Spans
    """Where they lie."""
    outs: list[npt.NDArray[np.uint8]]
    """Bytes that each is decoded to."""
    shared: list[Chunk] | None
    """Whose memory `outs` are; None where they are parts of the slot."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of a chunk that is stored as it is, with its checksum."""
        return self.layout.chunk_bytes + (self.layout.chain.tail_bytes or 0)

    @property
    def nbytes(self) -> int:
        """Bytes to be read; for chunks that are a key of their own, at most those of the decoded chunks, as a rule."""
        starts, stops = self.spans.starts, self.spans.stops
        size = self.layout.chunk_bytes
        return sum(size if stop is None else stop - start for start, stop in zip(starts, stops, strict=True))


@dataclass(slots=True)
class Gather:
    """A field of the batch, and the records it is made of."""

    cut: Cut
    """How it is cut out of a record."""
    out: npt.NDArray[Any]
    """[n, *cut.shape], a part of the slot."""
    records: Ids
    """Records, [n, steps]."""
    starts: Ids
    """Starts inside the record, [n]."""
    offsets: Ids
    """Byte in the slot where each record begins if it is taken whole, [n, steps]."""
    boxes: Boxes | None
    """What is taken of each record if it is cut into patches."""


@dataclass(slots=True)
class Plan:
    """One batch."""

    slot: Slot
    """What is to be filled."""
    buffer: npt.NDArray[np.uint8]
    """The slot's memory."""
    fields: dict[str, list[Gather]] = field(default_factory=dict)
    """Fields by stored variable."""
    reads: list[Reads] = field(default_factory=list)
    """Chunks to read and decode, by variable."""
    gathers: list[Gather] = field(default_factory=list)
    """Fields that are cut out of decoded chunks afterwards."""
    chunks: dict[Key, Chunk] = field(default_factory=dict)
    """Decoded chunks, new or not, that `gathers` cut from."""
    fresh: list[Chunk] = field(default_factory=list)
    """Those of them that this batch decodes."""
    distinct: int = 0
    """Chunks that are decoded for the first time in the epoch."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of `chunks`."""
        return sum(chunk.data.nbytes for chunk in self.chunks.values())


class Planner:
    """Plans batches of one sample form."""

    def __init__(
        self,
        sample: BoundSample,
        layouts: Mapping[str, Layout],
        indexes: Mapping[str, ShardIndexes],
        allocate: Allocate | None = None,
    ) -> None:
        """Plan for `sample`, whose variables lie as `layouts` and `indexes` say; slots lie in what `allocate` gives."""
        self._sample, self._layouts, self._indexes = sample, layouts, indexes
        self._tensors = [cuts for side in (sample.inputs, sample.targets) for cuts in side.values()]
        self._constants = {
            cut.variable.name: cut.variable.read() if cut.along == "samples" else np.asarray(cut.variable.array[...])
            for cuts in self._tensors
            for cut in cuts
            if not cut.records
        }
        self._pool = Pool(allocate)
        self._forms: dict[int, list[tuple[tuple[int, ...], np.dtype[Any], int, int]]] = {}
        parts = {
            (
                cut.variable.name,
                cut.along == "inside" or cut.channels is not None or cut.patch is not None,
                np.result_type(*(c.variable.array.dtype for c in cuts)),
            )
            for cuts in self._tensors
            for cut in cuts
            if cut.records
        }
        self._in_place = {
            name: place.record_is_chunk
            and all(
                not partial and dtype == place.array.dtype for variable, partial, dtype in parts if variable == name
            )
            for name, place in layouts.items()
        }
        """Variables whose fields take whole records, each of them a chunk."""
        self._grids = {name: _grid(place) for name, place in layouts.items()}
        self.tracks = sum(map(math.prod, self._grids.values())) <= TRACKED_CHUNKS
        """Whether distinct chunks are counted."""
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Count distinct chunks anew."""
        self._seen = {name: np.zeros(math.prod(grid), bool) for name, grid in self._grids.items() if self.tracks}

    def plan(self, ids: Ids, valid: npt.NDArray[np.bool_], memory: Memory) -> Plan:
        """Plan a batch, and mark its chunks in `memory` as used until the plan is given up or done.

        Raises:
            IntegrityError: a shard's index is damaged.
        """
        plan = self._slot(ids, valid)
        try:
            for name, fields in plan.fields.items():
                records = np.concatenate([gather.records.ravel() for gather in fields])
                if self._in_place[name] and len(set(records.tolist())) == len(records):
                    self._plan_in_place(plan, name, records)
                else:
                    self._plan_shared(plan, name, self._needed(name, fields, records), memory)
        except BaseException as error:
            give_up(plan, memory, error)
            raise
        return plan

    def _slot(self, ids: Ids, valid: npt.NDArray[np.bool_]) -> Plan:
        """An empty slot, its constants filled in, and the fields that its variables' records go to."""
        record, start = self._sample.split_id(ids)
        patch = None if self._sample.grid is None else self._sample.patch_of(ids)
        form = self._forms.get(len(ids)) or self._forms.setdefault(len(ids), self._form(len(ids)))
        buffer = self._pool.take(form[-1][2])
        arrays = [buffer[base:stop].view(dtype).reshape(shape) for shape, dtype, base, stop in form[:-1]]
        named = iter(arrays)
        inputs, targets = ({name: next(named) for name in side} for side in (self._sample.inputs, self._sample.targets))
        plan = Plan(Slot(inputs, targets, ids, valid), buffer)
        for cuts, array, (_, _, base, _) in zip(self._tensors, arrays, form, strict=False):
            first = 0
            for cut in cuts:
                out = array[:, first : first + cut.shape[0]]
                boxes = None if cut.patch is None or patch is None else cut.patch.boxes(patch)
                if cut.records:
                    gather = _gather(cut, out, record, start, base + first * array.strides[1], boxes)
                    plan.fields.setdefault(cut.variable.name, []).append(gather)
                elif boxes is not None:
                    _place_constant(cut, self._constants[cut.variable.name], boxes, out)
                else:
                    values = self._constants[cut.variable.name]
                    origin = record if cut.along == "samples" else start
                    out[...] = values.reshape(cut.shape) if cut.along is None else values[cut.positions(origin)]
                first += cut.shape[0]
        return plan

    def _form(self, count: int) -> list[tuple[tuple[int, ...], np.dtype[Any], int, int]]:
        """Shape, dtype, first byte and byte after the last of each tensor of `count` samples; then the slot's end."""
        form, base = [], 0
        for cuts in self._tensors:
            shape = (count, sum(cut.shape[0] for cut in cuts), *cuts[0].shape[1:])
            dtype = np.result_type(*(cut.variable.array.dtype for cut in cuts))
            stop = base + math.prod(shape) * dtype.itemsize
            form.append((shape, dtype, base, stop))
            base = -(-stop // ALIGN_BYTES) * ALIGN_BYTES
        return [*form, ((), np.dtype(np.uint8), base, base)]

    def samples_of(self, plan: Plan, variable: str, chunk: Coordinates) -> list[int]:
        """Ids of the batch's samples that need a chunk."""
        size = self._layouts[variable].chunk
        needed = []
        for gather in plan.fields[variable]:
            found = (gather.records // size[0] == chunk[0]).any(axis=1)
            needed.append(found if gather.boxes is None else found & intersects(gather.boxes, chunk, size))
        return [int(i) for i in plan.slot.ids[np.logical_or.reduce(needed)]]

    def cut_out(self, plan: Plan, rows: range) -> None:
        """Fill some rows of the fields that are cut out of decoded chunks."""
        for gather in plan.gathers:
            cut, place = gather.cut, self._layouts[gather.cut.variable.name]
            positions = cut.positions(gather.starts) if cut.along == "inside" else None
            size = cut.shape[0] // gather.records.shape[1]
            for row in rows:
                for step, record in enumerate(gather.records[row].tolist()):
                    if gather.boxes is None:
                        values = _record(plan, place, cut.variable.name, record)
                    else:
                        values = read_box(plan.chunks, cut.variable.name, place.chunk, record, _box(gather, place, row))
                    if positions is not None:
                        values = values[positions[row]]
                    elif cut.channels is not None:
                        values = values[list(cut.channels)]
                    into = gather.out[row, step * size : (step + 1) * size]
                    if cut.patch is None or gather.boxes is None:
                        into[...] = values.reshape(into.shape)
                    else:
                        whole = into.reshape(*values.shape[: -len(cut.patch.axes)], *cut.patch.shape)
                        cut.patch.place(values, gather.boxes.before[row].tolist(), whole)

    def _plan_in_place(self, plan: Plan, name: str, records: Ids) -> None:
        """Every chunk is one record that is wanted once: decode it in the slot."""
        place = self._layouts[name]
        chunks = np.zeros((len(records), place.array.ndim), np.int64)
        chunks[:, 0] = records
        offsets = np.concatenate([gather.offsets.ravel() for gather in plan.fields[name]]).tolist()
        size = place.chunk_bytes
        outs = [plan.buffer[offset : offset + size] for offset in offsets]
        plan.reads.append(Reads(name, place, chunks, self._indexes[name].find(chunks), outs, None))
        plan.distinct += self._count_distinct(name, chunks)

    def _needed(self, name: str, fields: list[Gather], records: Ids) -> npt.NDArray[np.int64]:
        """Grid positions of the chunks that some fields of one variable are cut from, each once, [m, axes]."""
        place, counts = self._layouts[name], self._grids[name]
        if all(gather.boxes is None for gather in fields):
            axes = np.meshgrid(np.unique(records // place.chunk[0]), *map(np.arange, counts[1:]), indexing="ij")
            return np.stack(axes, axis=-1).reshape(-1, place.array.ndim).astype(np.int64)
        found: set[tuple[int, ...]] = set()
        for gather in fields:
            if gather.boxes is not None:
                found.update(chunks_of(gather.boxes, gather.records, place.chunk, counts))
        return np.array(sorted(found), np.int64).reshape(-1, place.array.ndim)

    def _plan_shared(self, plan: Plan, name: str, grid: npt.NDArray[np.int64], memory: Memory) -> None:
        """Decode each chunk once to memory of its own, unless an earlier batch did."""
        place = self._layouts[name]
        keys: list[Key] = [(name, tuple(chunk)) for chunk in grid.tolist()]
        chunks, fresh = memory.share(keys, place.chunk, place.array.dtype)
        plan.gathers += plan.fields[name]
        plan.chunks |= dict(zip(keys, chunks, strict=True))
        mine = [chunks[i] for i in fresh]
        plan.fresh += mine
        outs = [chunk.data.reshape(-1).view(np.uint8) for chunk in mine]
        plan.reads.append(Reads(name, place, grid[fresh], self._indexes[name].find(grid[fresh]), outs, mine))
        plan.distinct += self._count_distinct(name, grid[fresh])

    def _count_distinct(self, name: str, chunks: npt.NDArray[np.int64]) -> int:
        """How many of these chunks the epoch had not seen."""
        if not self.tracks:
            return 0
        grid = self._grids[name]
        # A record a chunk is the usual case, and planning holds the interpreter lock that the decoders wait for.
        flat = chunks[:, 0] if len(self._seen[name]) == grid[0] else np.ravel_multi_index(tuple(chunks.T), grid)
        seen = self._seen[name]
        new = len(flat) - int(seen[flat].sum())
        seen[flat] = True
        return new


def give_up(plan: Plan, memory: Memory, error: BaseException) -> None:
    """Leave the chunks of a plan that failed: batches that wait for them fail as well, later ones try again."""
    for chunk in plan.fresh:
        if not chunk.ready.done():
            chunk.ready.set_exception(error)
    memory.leave(list(plan.chunks.values()))


def _grid(place: Layout) -> tuple[int, ...]:
    """Inner chunks along each axis."""
    return tuple(-(-size // chunk) for size, chunk in zip(place.array.shape, place.chunk, strict=True))


def _gather(cut: Cut, out: npt.NDArray[Any], record: Ids, start: Ids, base: int, boxes: Boxes | None) -> Gather:
    records = cut.variable.stored_at(cut.positions(record) if cut.along == "samples" else record[:, None])
    count, steps = records.shape
    step_bytes = out.strides[1] * (cut.shape[0] // steps)
    offsets = base + np.arange(count)[:, None] * out.strides[0] + np.arange(steps) * step_bytes
    return Gather(cut, out, records, start, offsets, boxes)


def _place_constant(cut: Cut, values: npt.NDArray[Any], boxes: Boxes, out: npt.NDArray[Any]) -> None:
    """Cut the patches of a static field, [n, *cut.shape]."""
    assert cut.patch is not None
    lead = values.shape[: -len(cut.patch.axes)]
    for row, (low, high) in enumerate(zip(boxes.low.tolist(), boxes.high.tolist(), strict=True)):
        box: tuple[Any, ...] = (..., *map(slice, low, high))
        cut.patch.place(values[box], boxes.before[row].tolist(), out[row].reshape(*lead, *cut.patch.shape))


def _box(gather: Gather, place: Layout, row: int) -> list[tuple[int, int]]:
    """What one sample takes of its records, [low, high) along each axis behind the first."""
    assert gather.boxes is not None
    low, high = gather.boxes.low[row].tolist(), gather.boxes.high[row].tolist()
    return [(0, size) for size in place.array.shape[1 : -len(low)]] + list(zip(low, high, strict=True))


def _record(plan: Plan, place: Layout, name: str, record: int) -> npt.NDArray[Any]:
    """One record out of the decoded chunks: a view, unless it lies in several."""
    first, row = divmod(record, place.chunk[0])
    sizes, space = place.chunk[1:], place.array.shape[1:]
    if all(size >= extent for size, extent in zip(sizes, space, strict=True)):
        decoded = plan.chunks[name, (first, *(0,) * len(space))].data
        index: tuple[Any, ...] = (row, *map(slice, space))
        return np.asarray(decoded[index])
    return read_box(plan.chunks, name, place.chunk, record, [(0, extent) for extent in space])
