"""Fills planned slots: read, decode, cut out, on threads that never wait for one another.

Each stage of a batch begins when the last share of the one before it is done, in the thread that did it: handing a
batch from thread to thread would cost more than reading a small chunk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from gpuops.data.codec import check_tail
from gpuops.data.counters import Counters
from gpuops.data.node_cache import CACHED, NodeCache
from gpuops.data.plan import Plan, Planner, Reads
from gpuops.data.transport import Files, Transport
from gpuops.errors import IntegrityError


class Filler:
    """Threads that fill slots."""

    def __init__(self, planner: Planner, transport: Transport, threads: int, ahead: int, *, fill_missing: bool) -> None:
        """Start no thread yet.

        Args:
            planner: knows how samples are cut out of chunks.
            transport: where bytes come from.
            threads: threads that decode, and read local files.
            ahead: batches whose requests to a store that is not local are under way at one time.
            fill_missing: deliver a chunk that the store leaves out as the array's fill value; else it is an error.
        """
        self._planner, self._transport, self._threads, self._fill = planner, transport, threads, fill_missing
        self._files = transport if isinstance(transport, Files | NodeCache) else None
        self._decoders = ThreadPoolExecutor(threads, "gpuops-decode")
        self._fetchers = ThreadPoolExecutor(ahead, "gpuops-read")
        self._scratch = _Scratch()

    def start(self, plan: Plan, finish: Callable[[Counters, BaseException | None], None]) -> Future[Plan]:
        """Fill a slot; the future is done after `finish` has been called with what it cost and the first error."""
        job = _Job(plan, finish)
        if self._at_hand(plan):
            self._decode_all(job, None)
        else:
            self._submit(self._fetchers, job, partial(self._fetch, job))
        return job.done

    def close(self) -> None:
        """Stop the threads; batches that are not filled fail."""
        for pool in (self._fetchers, self._decoders):
            pool.shutdown(cancel_futures=True)

    def _at_hand(self, plan: Plan) -> bool:
        """Whether every chunk can be read from a file of this node."""
        cache = self._transport
        if isinstance(cache, NodeCache):
            return all(span[2] == 0 or cache.holds(span) for reads in plan.reads for span in reads.spans)
        return isinstance(cache, Files) or not plan.reads

    def _fetch(self, job: _Job) -> None:
        begin = time.perf_counter()
        spans = [span for reads in job.plan.reads for span in reads.spans]
        fetch = self._transport.fill if isinstance(self._transport, NodeCache) else self._transport.fetch
        found = iter(fetch([span for span in spans if span[2] != 0]))  # 0: known to be missing
        answers = [None if span[2] == 0 else next(found) for span in spans]
        job.costs.read_s += time.perf_counter() - begin
        self._decode_all(job, answers)

    def _decode_all(self, job: _Job, answers: list[Any] | None) -> None:
        """Spread the chunks over the threads, and wait for those that other batches decode."""
        shares, place = [], 0
        for reads in job.plan.reads:
            count = len(reads.outs)
            fetched = None if answers is None else answers[place : place + count]
            shares += [partial(self._decode, job, reads, fetched, first) for first in range(min(self._threads, count))]
            place += count
        mine = set(map(id, job.plan.fresh))
        others = [chunk for chunk in job.plan.chunks.values() if id(chunk) not in mine]
        job.expect(len(shares) + len(others), lambda: self._cut_all(job))
        for share in shares:
            self._submit(self._decoders, job, share)
        for chunk in others:
            chunk.ready.add_done_callback(lambda ready: job.arrive(ready.exception()))

    def _cut_all(self, job: _Job) -> None:
        rows = range(len(job.plan.slot.ids) if job.plan.gathers else 0)
        shares = [
            partial(self._cut, job, rows[first :: self._threads]) for first in range(min(self._threads, len(rows)))
        ]
        job.expect(len(shares), job.resolve)
        for share in shares:
            self._submit(self._decoders, job, share)

    def _cut(self, job: _Job, rows: range) -> None:
        begin = time.perf_counter()
        self._planner.cut_out(job.plan, rows)
        job.add(Counters(gather_s=time.perf_counter() - begin))
        job.arrive(None)

    def _submit(self, pool: ThreadPoolExecutor, job: _Job, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                if job.error is None:
                    work()
                else:
                    job.arrive(None)
            except BaseException as error:
                job.arrive(error)

        def cancelled(future: Future[None]) -> None:
            if future.cancelled():
                job.arrive(CancelledError())

        try:
            pool.submit(run).add_done_callback(cancelled)
        except RuntimeError as error:  # the pool was shut down
            job.arrive(error)

    def _decode(self, job: _Job, reads: Reads, fetched: list[Any] | None, first: int) -> None:
        """Decode a thread's share of chunks, reading them where they were not fetched before."""
        read_s = decode_s = 0.0
        nbytes = decodes = filled = 0
        decode = reads.layout.chain.decode
        for i in range(first, len(reads.outs), self._threads):
            begin, out = time.perf_counter(), reads.outs[i]
            try:
                here = fetched is None or fetched[i] is CACHED
                encoded, size = self._encoded(reads, i) if here else _fetched(fetched, i)
                middle = time.perf_counter()
                if encoded is None:
                    self._fill_missing(job.plan, reads, i)
                    filled += 1
                else:
                    if encoded is not out:
                        decode(encoded, out)
                    decodes += 1
                    nbytes += size
            except ValueError as error:
                raise IntegrityError(
                    f"{self._named(job.plan, reads, i)} is damaged ({error}): restore that object or ingest it again"
                ) from error
            if reads.shared is not None:
                reads.shared[i].ready.set_result(None)
            read_s += middle - begin
            decode_s += time.perf_counter() - middle
        job.add(
            Counters(
                requests=decodes,
                bytes_read=nbytes,
                bytes_useful=nbytes,
                decodes=decodes,
                filled_chunks=filled,
                read_s=read_s,
                decode_s=decode_s,
            )
        )
        job.arrive(None)

    def _encoded(self, reads: Reads, i: int) -> tuple[Any, int]:
        """A chunk of a local file and its stored size; None if there is none.

        A chunk that is stored as it is comes straight to its destination, any other to memory that the thread keeps.

        Raises:
            ValueError: the chunk is cut short, or its checksum differs.
        """
        assert self._files is not None
        spans = reads.spans
        if (
            spans.stops[i] == 0
            or (found := self._files.range((spans.keys[i], spans.starts[i], spans.stops[i]))) is None
        ):
            return None, 0
        file, start, stop = found
        size = stop - start
        tail_bytes = reads.layout.chain.tail_bytes
        into: Any = reads.outs[i]
        if tail_bytes is None:
            into = self._scratch.view(size)
            got = file.read_into((into,), start, size)
        else:
            tail = bytearray(tail_bytes)
            if size != into.nbytes + tail_bytes:
                raise ValueError(f"{size} bytes where {into.nbytes + tail_bytes} belong")
            got = file.read_into((into, tail), start, size)
        if got != size:
            raise ValueError(f"{got} bytes where {size} belong")
        if tail_bytes:
            check_tail(into, tail)
        return into, size

    def _fill_missing(self, plan: Plan, reads: Reads, i: int) -> None:
        """Deliver the declared fill value for a chunk that the store leaves out, or refuse to."""
        array = reads.layout.array
        if not self._fill or array.fill_value is None:
            raise IntegrityError(
                f"{self._named(plan, reads, i)} is missing: ingest it again, hold its samples out, or open the store "
                "with missing_chunks='fill'"
            )
        reads.outs[i].view(array.dtype)[:] = array.fill_value

    def _named(self, plan: Plan, reads: Reads, i: int) -> str:
        """A chunk for a message: its variable, place, object and the samples that need it, the first where many."""
        chunk = tuple(reads.chunks[i].tolist())
        ids = self._planner.samples_of(plan, reads.variable, chunk)
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        samples = f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:3]))}{more}"
        return f"{reads.variable}: inner chunk {chunk} in {reads.spans.keys[i]} ({samples})"


class _Job:
    """One batch under way. Its stages count down to the next."""

    def __init__(self, plan: Plan, finish: Callable[[Counters, BaseException | None], None]) -> None:
        self.plan, self.costs = plan, Counters()
        self.error: BaseException | None = None
        self.done: Future[Plan] = Future()
        self._finish = finish
        self._left = 1
        self._then: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def expect(self, count: int, then: Callable[[], None]) -> None:
        """Go on with `then` after `count` arrivals; at once if there are none to wait for."""
        with self._lock:
            self._left, self._then = count, then
        if not count:
            then()

    def arrive(self, error: BaseException | None) -> None:
        """A share is done."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            last, then = not self._left, None if self.error is not None else self._then
        if last:
            (then or self.resolve)()

    def add(self, costs: Counters) -> None:
        """What a share cost."""
        with self._lock:
            self.costs.add(costs)

    def resolve(self) -> None:
        """The batch is filled, or failed."""
        self._then = None  # it refers to this job: a cycle would keep the slot's memory until the next collection
        self._finish(self.costs, self.error)
        if self.error is None:
            self.done.set_result(self.plan)
        else:
            self.done.set_exception(self.error)


class _Scratch(threading.local):
    """Memory that a thread reads encoded chunks to."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def view(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of it."""
        if len(self._memory) < nbytes:
            self._memory = bytearray(nbytes)
        return memoryview(self._memory)[:nbytes]


def _fetched(answers: list[Any] | None, place: int) -> tuple[Any, int]:
    """One answer of a transport and its size, given away so that its memory is free once it is decoded."""
    assert answers is not None
    data, answers[place] = answers[place], None
    return data, 0 if data is None else memoryview(data).nbytes
