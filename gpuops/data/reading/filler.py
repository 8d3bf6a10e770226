"""Fills planned slots: read, decode, cut out, on threads that never wait for one another.

Each stage of a batch begins when the last share of the one before it is done, in the thread that did it: handing a
batch from thread to thread would cost more than reading a small chunk.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from gpuops.data.reading.codec import check_tail
from gpuops.data.reading.counters import Counters
from gpuops.data.reading.node_cache import CACHED, NodeCache
from gpuops.data.reading.plan import Plan, Planner, Reads
from gpuops.data.reading.transport import File, Files, Span, Transport
from gpuops.errors import IntegrityError

DISK_SHARE = 1 / 8
"""Share of the bytes read that came from a disk, above which the next ones are expected to."""
DISK_THREADS = 4
"""Threads a core for files that come from a disk; from the page cache they would only stand in one another's way."""


class Filler:
    """Threads that fill slots."""

    def __init__(self, planner: Planner, transport: Transport, threads: int, ahead: int, *, fill_missing: bool) -> None:
        """Start the threads.

        Args:
            planner: knows how samples are cut out of chunks.
            transport: where bytes come from.
            threads: threads that decode, and read local files.
            ahead: batches whose requests to a store that is not local are under way at one time.
            fill_missing: deliver a chunk that the store leaves out as the array's fill value; else it is an error.
        """
        self._planner, self._transport, self._threads, self._fill = planner, transport, threads, fill_missing
        self._range: Callable[[Span], tuple[File, int, int] | None] = (
            transport.range if isinstance(transport, Files | NodeCache) else _never
        )
        self._read_open = transport.read_open if isinstance(transport, Files) else _not_open
        self._decoders = _Workers(threads, "gpuops-decode")
        self._patient = _Workers(DISK_THREADS * threads if isinstance(transport, Files) else 0, "gpuops-disk")
        """Threads that decode what they have to wait for: while some wait for the disk, others have the cores."""
        self._fetchers = _Workers(0 if isinstance(transport, Files) else ahead, "gpuops-read")
        self._scratch = _Scratch()
        self._waiting = False
        """Whether local files come from a disk. Counted, not timed: a thread waits for the interpreter lock as well."""

    def start(self, plan: Plan, finish: Callable[[Counters, BaseException | None], None]) -> Future[Plan]:
        """Fill a slot; the future is done after `finish` has been called with what it cost and the first error."""
        job = _Job(plan, finish)
        if self._at_hand(plan):
            self._decode_all(job, None)
        else:
            self._fetchers.put(job, partial(self._fetch, job))
        return job.done

    def close(self) -> None:
        """Stop the threads; batches that are not filled fail."""
        self._fetchers.close()
        self._patient.close()
        self._decoders.close()

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
        from_disk = self._waiting and answers is None and isinstance(self._transport, Files)
        workers, split = (self._patient, DISK_THREADS * self._threads) if from_disk else (self._decoders, self._threads)
        for reads in job.plan.reads:
            count = len(reads.outs)
            fetched = None if answers is None else answers[place : place + count]
            shares += [
                partial(self._decode, job, reads, fetched, range(first, count, split))
                for first in range(min(split, count))
            ]
            place += count
        mine = set(map(id, job.plan.fresh))
        others = [chunk for chunk in job.plan.chunks.values() if id(chunk) not in mine]
        job.expect(len(shares) + len(others), lambda: self._cut_all(job))
        for share in shares:
            workers.put(job, share)
        for chunk in others:
            chunk.ready.add_done_callback(lambda ready: job.arrive(ready.exception()))

    def _cut_all(self, job: _Job) -> None:
        rows = range(len(job.plan.slot.ids) if job.plan.gathers else 0)
        shares = [
            partial(self._cut, job, rows[first :: self._threads]) for first in range(min(self._threads, len(rows)))
        ]
        job.expect(len(shares), job.resolve)
        for share in shares:
            self._decoders.put(job, share)

    def _cut(self, job: _Job, rows: range) -> None:
        begin = time.perf_counter()
        self._planner.cut_out(job.plan, rows)
        with job.lock:
            job.costs.gather_s += time.perf_counter() - begin
        job.arrive(None)

    def _decode(self, job: _Job, reads: Reads, fetched: list[Any] | None, share: range) -> None:
        """Decode a thread's share of chunks, reading them where they were not fetched before."""
        clock, outs, shared, stored_bytes = time.perf_counter, reads.outs, reads.shared, reads.stored_bytes
        read = self._reader_of(reads)
        decode = reads.layout.chain.decode
        read_s = decode_s = 0.0
        nbytes = filled = 0
        disk = _disk_bytes()
        decoded = clock()
        for i in share:
            begun = decoded
            try:
                encoded = read(i) if fetched is None or fetched[i] is CACHED else _take(fetched, i)
                got = clock()
                if encoded is None:
                    self._fill_missing(job.plan, reads, i)
                    filled += 1
                elif encoded is outs[i]:
                    nbytes += stored_bytes
                else:
                    decode(encoded, outs[i])
                    nbytes += len(encoded)
            except (ValueError, OSError) as error:
                if isinstance(self._transport, NodeCache):
                    self._transport.forget((reads.spans.keys[i], reads.spans.starts[i], reads.spans.stops[i]))
                raise IntegrityError(
                    f"{self._named(job.plan, reads, i)} is damaged ({error}): restore that object or ingest it again"
                ) from error
            if shared is not None:
                shared[i].ready.set_result(None)
            decoded = clock()
            read_s += got - begun
            decode_s += decoded - got
        self._waiting = _disk_bytes() - disk > nbytes * DISK_SHARE
        job.add(len(share) - filled, filled, nbytes, read_s, decode_s)
        job.arrive(None)

    def _reader_of(self, reads: Reads) -> Callable[[int], Any]:
        """What reads the i-th chunk from a file of this node; it gives None if there is none.

        A chunk that is stored as it is comes straight to its destination, is checked there, and the destination is
        given; any other is given in memory that the thread keeps.
        """
        keys, starts, stops = reads.spans.keys, reads.spans.starts, reads.spans.stops
        outs, stored_bytes, tail_bytes = reads.outs, reads.stored_bytes, reads.layout.chain.tail_bytes
        tail, scratch = bytearray(tail_bytes or 0), self._scratch
        range_of, read_open = self._range, self._read_open

        def compressed(i: int) -> Any:
            if stops[i] == 0 or (found := range_of((keys[i], starts[i], stops[i]))) is None:
                return None
            file, start, stop = found
            encoded = scratch.view(stop - start)
            file.read_into((encoded,), start, stop - start)
            return encoded

        def raw(i: int) -> Any:
            out, start, stop = outs[i], starts[i], stops[i]
            buffers = (out, tail) if tail else (out,)
            if stop != start + stored_bytes or not read_open(keys[i], buffers, start, stored_bytes):
                if stop == 0 or (found := range_of((keys[i], start, stop))) is None:
                    return None
                file, start, stop = found
                if stop - start != stored_bytes:
                    raise ValueError(f"{stop - start} bytes where {stored_bytes} belong")
                file.read_into(buffers, start, stored_bytes)
            if tail:
                check_tail(out, tail)
            return out

        return compressed if tail_bytes is None else raw

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
        self.lock = threading.Lock()

    def expect(self, count: int, then: Callable[[], None]) -> None:
        """Go on with `then` after `count` arrivals; at once if there are none to wait for."""
        with self.lock:
            self._left, self._then = count, then
        if not count:
            then()

    def arrive(self, error: BaseException | None) -> None:
        """A share is done."""
        with self.lock:
            self.error = self.error or error
            self._left -= 1
            last, then = not self._left, None if self.error is not None else self._then
        if last:
            (then or self.resolve)()

    def add(self, decodes: int, filled: int, nbytes: int, read_s: float, decode_s: float) -> None:
        """What a share of the decoding cost."""
        with self.lock:
            costs = self.costs
            costs.requests += decodes
            costs.decodes += decodes
            costs.bytes_read += nbytes
            costs.bytes_useful += nbytes
            costs.filled_chunks += filled
            costs.read_s += read_s
            costs.decode_s += decode_s

    def resolve(self) -> None:
        """The batch is filled, or failed."""
        self._then = None  # it refers to this job: a cycle would keep the slot's memory until the next collection
        self._finish(self.costs, self.error)
        plan, self.plan = self.plan, None  # type: ignore[assignment]  # a cached chunk remembers who waited for it
        if self.error is None:
            self.done.set_result(plan)
        else:
            self.done.set_exception(self.error)


class _Workers:
    """Threads that work off shares of jobs: less to do for each than an executor's future and work item."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: SimpleQueue[tuple[_Job, Callable[[], None]] | None] = SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name=f"{name}_{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def put(self, job: _Job, work: Callable[[], None]) -> None:
        """Have a share worked off; the job fails if it raises or never begins."""
        with self._lock:
            if not self._closed:
                self._queue.put((job, work))
                return
        job.arrive(CancelledError())

    def close(self) -> None:
        """Finish the shares that have begun, fail the others, and end the threads."""
        dropped = []
        with self._lock:
            self._closed = True
            while not self._queue.empty():
                with suppress(Empty):  # a thread was faster
                    dropped.append(self._queue.get_nowait())
            for _ in self._threads:
                self._queue.put(None)
        for item in dropped:
            if item is not None:
                item[0].arrive(CancelledError())
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            job, work = item
            try:
                if job.error is None:
                    work()
                else:
                    job.arrive(None)
            except BaseException as error:
                job.arrive(error)
            del item, job, work  # a slot's memory is not kept while waiting for the next


class _Scratch(threading.local):
    """Memory that a thread reads encoded chunks to."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def view(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of it."""
        if len(self._memory) < nbytes:
            self._memory = bytearray(nbytes)
        return memoryview(self._memory)[:nbytes]


def _take(answers: list[Any] | None, place: int) -> memoryview | None:
    """One answer of a transport, given away so that its memory is free once it is decoded."""
    assert answers is not None
    data, answers[place] = answers[place], None
    return None if data is None else memoryview(data).cast("B")


def _disk_bytes() -> int:
    """Bytes that this thread had the kernel read from block devices; 0 where the kernel does not count them."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock * 512


def _not_open(key: str, buffers: Sequence[Any], start: int, size: int) -> bool:
    return False


def _never(span: Span) -> None:
    raise AssertionError(f"{span} is asked for from a file, and this store has none")
