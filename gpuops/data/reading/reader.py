"""From sample ids to filled slots: plan the distinct chunks, read their ranges, decode them, cut the samples out.

One process a rank and threads only. What is held is bounded by a byte budget.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from gpuops.data.reading.counters import Counters
from gpuops.data.reading.filler import Filler
from gpuops.data.reading.memory import Allocate, Memory
from gpuops.data.reading.node_cache import CacheLocation, NodeCache
from gpuops.data.reading.plan import Plan, Planner, Slot, Stored, give_up
from gpuops.data.reading.shard import ShardIndexes, layout
from gpuops.data.reading.transport import Files, Retry, open_transport
from gpuops.data.sample import BoundSample, Ids
from gpuops.data.source import Source
from gpuops.errors import InputError

BUDGET_BYTES = 512 * 2**20
"""What a reader may hold, unless it is told otherwise."""
AHEAD_LOCAL, AHEAD_REMOTE = 2, 8
"""Batches read ahead, budget allowing: decoding hides a disk, but only requests under way hide a network."""


def wire_inputs(sample: BoundSample, slot: Slot) -> Stored:
    """The inputs of a slot as a served model takes them: by variable instead of by tensor."""
    wire = {}
    for tensor, cuts in sample.inputs.items():
        edges = np.cumsum([cut.shape[0] for cut in cuts])
        for cut, part in zip(cuts, np.split(slot.inputs[tensor], edges[:-1], axis=1), strict=True):
            wire[cut.name] = np.ascontiguousarray(part)
    return wire


class Reader:
    """Reads batches of samples ahead of their consumer."""

    def __init__(
        self,
        source: Source,
        sample: BoundSample,
        *,
        threads: int | None = None,
        budget_bytes: int = BUDGET_BYTES,
        ahead: int | None = None,
        retry: Retry | None = None,
        cache: CacheLocation | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        """Prepare to read `sample` from `source`.

        Args:
            source: an opened source.
            sample: the declared sample bound to it.
            threads: decoding threads; the cores of this process if None.
            budget_bytes: most bytes held: slots read ahead, decoded chunks and shard indexes.
            ahead: most batches read ahead of the consumer; 2 for local files and 8 for other stores if None.
            retry: how patient to be with a store that fails.
            cache: where the ranks of this node keep what they fetched; of no use to a store of local files.
            allocate: gives the memory of slots; pageable memory if None.
        """
        self.sample = sample
        self._counters = Counters(budget_bytes=budget_bytes)
        self._lock = threading.Lock()
        self._transport = open_transport(source.store, retry)
        self._local = isinstance(self._transport, Files)
        if cache is not None and not self._local:
            self._transport = NodeCache(self._transport, cache, source.fingerprint)
        self.ahead = ahead or (AHEAD_LOCAL if self._local else AHEAD_REMOTE)
        cuts = [cut for side in (sample.inputs, sample.targets) for cuts in side.values() for cut in cuts]
        self._layouts = {cut.variable.name: layout(cut.variable.array) for cut in cuts if cut.records}
        index_budget = budget_bytes // 8 // max(len(self._layouts), 1)
        self._indexes = {
            name: ShardIndexes(place, self._transport, index_budget) for name, place in self._layouts.items()
        }
        self._memory = Memory(budget_bytes - budget_bytes // 8)
        # Single batches have memory of their own: in the midst of an iteration they would wait for chunks of batches
        # that themselves wait for the consumer.
        self._aside = Memory(budget_bytes - budget_bytes // 8)
        self._pending: deque[Future[Future[Plan]]] = deque()
        self._planner = Planner(sample, self._layouts, self._indexes, allocate)
        self._filler = Filler(
            self._planner,
            self._transport,
            threads or len(os.sched_getaffinity(0)),
            self.ahead + 1,
            fill_missing=source.missing_chunks == "fill",
        )
        self._plans = ThreadPoolExecutor(1, "gpuops-plan")
        self._process = os.getpid()
        self._closed = False
        self._ids = (sample.records - sample.length + 1) * sample.per_record

    @property
    def counters(self) -> Counters:
        """What reading cost so far."""
        counters, indexes = self._counters, self._indexes.values()
        counters.retries = self._transport.retries
        counters.held_bytes = self._memory.peak_bytes + self._aside.peak_bytes + sum(index.nbytes for index in indexes)
        return counters

    def close(self) -> None:
        """Stop the threads; batches not yet delivered are dropped."""
        self._closed = True
        self._memory.close()
        self._aside.close()
        self._plans.shutdown(cancel_futures=True)
        self._filler.close()
        self._transport.close()

    def iterate(self, batches: Iterable[tuple[Ids, npt.NDArray[np.bool_]]]) -> Iterator[Slot]:
        """Slots of the given (ids, valid) batches, in order, `ahead` of them read before they are asked for.

        Raises:
            IntegrityError: see `read`.
            InputError: one batch needs more memory than the budget.
        """
        self._abandon(self._pending)  # an earlier iteration that was left, and that somebody still refers to
        pending = self._pending = deque()
        remaining = iter(batches)
        self._planner.begin_epoch()
        begun = time.perf_counter()
        try:
            while True:
                if pending is not self._pending:
                    raise InputError("another iteration of this reader has begun: make a reader for each of them")
                self._refuse_closed()
                while len(pending) <= self.ahead and (batch := next(remaining, None)) is not None:
                    pending.append(self._plans.submit(self._start, *batch))
                if not pending:
                    return
                asked = time.perf_counter()
                plan = self._delivered(pending[0])
                pending.popleft()
                self._memory.release(plan.slot.nbytes)
                now = time.perf_counter()
                with self._lock:
                    self._counters.stall_s += now - asked
                    self._counters.wall_s += now - begun
                begun = now
                yield plan.slot
                del plan  # its memory is the consumer's to give back
        finally:
            self._abandon(pending)

    def read(self, ids: Ids, valid: npt.NDArray[np.bool_] | None = None) -> Slot:
        """One batch, now.

        Raises:
            InputError: an id that does not exist, or a reader that was closed.
            IntegrityError: a chunk is missing or fails its checksum; the message names variable, shard and samples.
        """
        self._refuse_closed()
        plan = self._plan(ids, np.ones(len(ids), bool) if valid is None else valid, self._aside, wait=False)
        filled = self._fill(plan, self._aside)
        # Given back by the batch itself, so that an interrupt here loses nothing.
        filled.add_done_callback(partial(self._release, self._aside))
        try:
            return filled.result().slot
        except CancelledError:
            self._refuse_closed()
            raise

    def _delivered(self, started: Future[Future[Plan]]) -> Plan:
        """A batch once it is filled."""
        try:
            return started.result().result()
        except CancelledError:
            self._refuse_closed()
            raise

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InputError("this reader was closed: make a new one")

    def _start(self, ids: Ids, valid: npt.NDArray[np.bool_]) -> Future[Plan]:
        return self._fill(self._plan(ids, valid, self._memory, wait=True), self._memory)

    def _fill(self, plan: Plan, memory: Memory) -> Future[Plan]:
        taken = self._taken(plan)

        def finish(costs: Counters, error: BaseException | None) -> None:
            if error is None:
                memory.release(taken - plan.slot.nbytes)
                memory.leave(list(plan.chunks.values()))
                costs.samples, costs.batches, costs.distinct_chunks = len(plan.slot.ids), 1, plan.distinct
            else:
                memory.release(taken)
                give_up(plan, memory, error)
            plan.reads.clear()
            plan.gathers.clear()
            self._count(costs)

        return self._filler.start(plan, finish)

    def _abandon(self, pending: deque[Future[Future[Plan]]]) -> None:
        """Give back the memory of batches that nobody will ask for, once they are filled."""

        def started_late(started: Future[Future[Plan]]) -> None:
            if started.exception() is None:
                started.result().add_done_callback(partial(self._release, self._memory))

        while pending:
            if not (started := pending.popleft()).cancel():
                started.add_done_callback(started_late)

    def _release(self, memory: Memory, filled: Future[Plan]) -> None:
        if not filled.cancelled() and filled.exception() is None:
            memory.release(filled.result().slot.nbytes)

    def _plan(self, ids: Ids, valid: npt.NDArray[np.bool_], memory: Memory, *, wait: bool) -> Plan:
        """Plan a batch and take the memory for it."""
        if os.getpid() != self._process:
            raise InputError(
                "a reader does not survive a fork: its threads stay behind. Make it in the process that reads "
                "(no DataLoader workers are needed: it reads ahead on threads)"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._ids:
            raise InputError(f"sample ids {ids.min()} to {ids.max()}: there are {self._ids}, from 0")
        begin, costs = time.perf_counter(), self._index_cost()
        plan = self._planner.plan(ids, valid, memory)
        try:
            memory.acquire(self._taken(plan), shared=plan.chunk_bytes, wait=wait)
        except BaseException as error:
            give_up(plan, memory, error)
            raise
        requests, bytes_read = (now - then for now, then in zip(self._index_cost(), costs, strict=True))
        self._count(Counters(requests=requests, bytes_read=bytes_read, plan_s=time.perf_counter() - begin))
        return plan

    def _taken(self, plan: Plan) -> int:
        """Bytes that a batch takes until it is delivered: its slot and, but for local files, what is read at once."""
        return plan.slot.nbytes + (0 if self._local else sum(reads.nbytes for reads in plan.reads))

    def _count(self, costs: Counters) -> None:
        with self._lock:
            self._counters.add(costs)

    def _index_cost(self) -> tuple[int, int]:
        """(requests, bytes) spent on shard indexes so far."""
        indexes = self._indexes.values()
        return sum(index.requests for index in indexes), sum(index.bytes_read for index in indexes)
