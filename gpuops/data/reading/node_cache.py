"""Encoded ranges of a remote store, kept on a node's disk or in its memory for all of its ranks and later runs.

One sparse file an object, each range at its own place, so that what was fetched once is read like a local store. A
journal beside it says which ranges are whole. A range is fetched once a node: who fills it holds a lock on its first
byte, which the kernel takes back from a process that was killed; the journal is written after the data.

Nothing of the data set in use is ever thrown out: a shuffled epoch touches every sample once, so that forgetting the
least recently used would throw each range out just before it is wanted. When the budget is spent, other data sets that
nobody uses make room, and what does not fit is fetched again every time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c

from gpuops.data.reading.transport import OPEN_FILES, File, Span, Transport
from gpuops.errors import InputError

CACHED = object()
"""Stands for a range that can be read from the cache."""
_RECORD = struct.Struct("<QQII")
"""A line of a journal: first byte, byte after the last, crc32c of the data, crc32c of the line so far."""
_BLOCK = 4096
LOCKS = 256
"""Ranges that a process fills, and holds locked, at one time: each takes a descriptor."""


@dataclass(frozen=True, slots=True)
class CacheLocation:
    """Where a node keeps what its ranks fetched."""

    directory: str
    """On a disk of the node, or under /dev/shm; shared by ranks, runs and data sets."""
    budget_bytes: int
    """Most bytes kept there."""


class NodeCache:
    """A transport that fetches each range once a node. Thread-safe, and safe between processes of one host."""

    def __init__(self, transport: Transport, location: CacheLocation, identity: str) -> None:
        """Keep what `transport` fetches.

        Args:
            transport: where ranges come from.
            location: where they are kept, and how many bytes of them.
            identity: what the ranges belong to: the data set's fingerprint.

        Raises:
            InputError: the directory cannot be written.
        """
        # A folder of its own: what else lies in the directory is nobody's business, least of all to be evicted.
        self._transport, self._root = transport, Path(location.directory) / "gpuops-ranges"
        self._budget, self._closed = location.budget_bytes, False
        self._directory = self._root / hashlib.sha256(identity.encode()).hexdigest()[:32]
        try:
            self._in_use = _use(self._directory)
            self._ledger = _open(self._root / "used")
        except OSError as error:
            raise InputError(
                f"the node cache {location.directory} cannot be written ({error}): name another directory"
            ) from error
        self._objects: OrderedDict[tuple[str, str], _Object] = OrderedDict()
        self._guard = threading.Lock()
        self._filling = threading.Lock()
        self.hits = 0
        """Ranges found."""
        self.misses = 0
        """Ranges fetched."""
        with self._counting():
            self._write_used(sum(_disk_bytes(path) for path in self._root.glob("*/*")))

    @property
    def retries(self) -> int:
        """Requests that had to be made again."""
        return self._transport.retries

    def range(self, span: Span) -> tuple[File, int, int] | None:
        """A cached range: its file, first byte and byte after the last."""
        found = self._object(span)
        return found.data, *found.bounds(span)

    def holds(self, span: Span) -> bool:
        """Whether `range` has it."""
        try:
            return self._object(span).has(span)
        except OSError:  # the directory is gone
            return False

    def fetch(self, spans: Sequence[Span]) -> list[Any]:
        """See Transport."""
        answers = self.fill(spans)
        return [self._read(span) if data is CACHED else data for span, data in zip(spans, answers, strict=True)]

    def fill(self, spans: Sequence[Span]) -> list[Any]:
        """See that ranges are in the cache: CACHED for each that is, its bytes if there is no room, None if absent."""
        answers: list[Any] = [CACHED if self.holds(span) else None for span in spans]
        wanted = sorted({span for span, answer in zip(spans, answers, strict=True) if answer is None}, key=_order)
        self.hits += len(spans) - len(wanted)
        fetched: dict[Span, Any] = {}
        for first in range(0, len(wanted), LOCKS):
            fetched |= self._fill_some(wanted[first : first + LOCKS])
        return [fetched[span] if answer is None else answer for span, answer in zip(spans, answers, strict=True)]

    def _fill_some(self, wanted: list[Span]) -> dict[Span, Any]:
        """`fill` for as many ranges as are locked at one time."""
        # Locks belong to open files, not to threads, so threads of this process take turns here. Every process takes
        # its locks in the same order, so that no two wait for each other.
        with self._filling, ExitStack() as stack:
            try:
                for span in wanted:
                    stack.enter_context(self._object(span).filling(span))
                still = [span for span in wanted if not self._object(span).has(span, refresh=True)]
            except OSError:  # the directory is gone, or no descriptor is left: go on without the cache
                return dict(zip(wanted, self._transport.fetch(wanted), strict=True))
            fetched = dict.fromkeys(wanted, CACHED)
            for span, data in zip(still, self._transport.fetch(still) if still else [], strict=True):
                fetched[span] = CACHED if data is not None and self._keep(span, data) else data
            self.misses += len(still)
        return fetched

    def _keep(self, span: Span, data: Any) -> bool:
        """Keep a range; False if there is no room for it, or the disk refuses it."""
        try:
            if not self._admit(memoryview(data).nbytes):
                return False
            self._object(span).put(span, data)
        except OSError:
            return False
        return True

    def forget(self, span: Span) -> None:
        """Ask the store again for a range that turned out to be damaged."""
        with suppress(OSError):
            self._object(span).forget(span)

    def close(self) -> None:
        """Let the files go; what was kept stays for the next run."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            self._objects.clear()
        for descriptor in (self._in_use, self._ledger):
            os.close(descriptor)
        self._transport.close()

    def _object(self, span: Span) -> _Object:
        key, start, stop = span
        name = key, "whole" if stop is None and start >= 0 else "ranges" if start >= 0 else str(start)
        with self._guard:
            found = self._objects.get(name)
            if found is None:
                file = hashlib.sha256("|".join(name).encode()).hexdigest()[:40]
                found = self._objects[name] = _Object(self._directory / file)
                if len(self._objects) > OPEN_FILES:
                    self._objects.popitem(last=False)
            else:
                self._objects.move_to_end(name)
            return found

    def _read(self, span: Span) -> bytes:
        found = self._object(span)
        start, stop = found.bounds(span)
        return os.pread(found.data.descriptor, stop - start, start)

    def _admit(self, nbytes: int) -> bool:
        """Whether there is room for a range; if so, it is taken."""
        nbytes += _BLOCK  # what a file system may add to it
        with self._counting():
            used = self._read_used()
            if used + nbytes > self._budget:
                used -= self._evict(used + nbytes - self._budget)
            if used + nbytes > self._budget:
                self._write_used(used)
                return False
            self._write_used(used + nbytes)
            return True

    def _evict(self, nbytes: int) -> int:
        """Remove data sets that nobody uses, the one used longest ago first, until `nbytes` are free; bytes freed."""
        freed = 0
        others = [path for path in self._root.iterdir() if (path / "in-use").is_file() and path != self._directory]
        for path in sorted(others, key=lambda path: path.stat().st_mtime):
            if freed >= nbytes:
                break
            descriptor = _open(path / "in-use")
            try:
                if _lock(descriptor, fcntl.F_WRLCK, 0, wait=False):
                    freed += sum(map(_disk_bytes, path.iterdir()))
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)
        return freed

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Hold the count of used bytes; the descriptor is shared by threads, so they take turns."""
        with self._guard:
            _lock(self._ledger, fcntl.F_WRLCK, 0)
            try:
                yield
            finally:
                _lock(self._ledger, fcntl.F_UNLCK, 0)

    def _read_used(self) -> int:
        return int.from_bytes(os.pread(self._ledger, 8, 0), "little")

    def _write_used(self, used: int) -> None:
        os.pwrite(self._ledger, used.to_bytes(8, "little"), 0)


class _Object:
    """One object's ranges: a sparse file and its journal."""

    def __init__(self, path: Path) -> None:
        os.close(_open(path))
        self.data = File(path)
        self._path = path
        self._ranges: dict[int, int] = {}
        self._unproved: dict[int, int] = {}
        """Checksums of ranges that another run, or another process, wrote: compared when they are first wanted."""
        self._journal = path.with_suffix(".journal")
        self._read_to = 0
        self._refresh()

    def has(self, span: Span, *, refresh: bool = False) -> bool:
        """Whether a range is whole here."""
        if refresh:
            self._refresh()
        start = max(span[1], 0)
        stop = self._ranges.get(start)
        if stop is None or not (span[2] is None or span[1] < 0 or stop == span[2]):
            return False
        recorded = self._unproved.get(start)
        if recorded is not None:  # a machine that lost power may have kept the journal and not the data
            if crc32c.crc32c(os.pread(self.data.descriptor, stop - start, start)) != recorded:
                self.forget(span)
                return False
            del self._unproved[start]
        return True

    def forget(self, span: Span) -> None:
        """Take a range out of the journal."""
        start = max(span[1], 0)
        self._append(start, start, 0)

    def _append(self, start: int, stop: int, checksum: int) -> None:
        line = struct.pack("<QQI", start, stop, checksum)
        with open(self._journal, "ab", buffering=0) as journal:
            journal.write(line + crc32c.crc32c(line).to_bytes(4, "little"))
        self._refresh()
        if stop > start:
            self._unproved.pop(start, None)  # its own writing

    def bounds(self, span: Span) -> tuple[int, int]:
        """(first byte, byte after the last) of a range in the file."""
        start = max(span[1], 0)
        return start, self._ranges[start]

    def put(self, span: Span, data: Any) -> None:
        """Write a range, then its line in the journal."""
        start, view = max(span[1], 0), memoryview(data).cast("B")
        with open(self._path, "r+b", buffering=0) as file:
            file.seek(start)
            written = 0
            while written < len(view):
                written += file.write(view[written:])
        self._append(start, start + len(view), crc32c.crc32c(view))

    @contextmanager
    def filling(self, span: Span) -> Iterator[None]:
        """Be the only process that fills this range."""
        descriptor = _open(self._path)
        try:
            _lock(descriptor, fcntl.F_WRLCK, max(span[1], 0), 1)
            yield
        finally:
            os.close(descriptor)  # which unlocks

    def _refresh(self) -> None:
        """Read what was added to the journal; a line that was cut short by a kill is passed over."""
        try:
            with open(self._journal, "rb") as journal:
                journal.seek(self._read_to)
                added = journal.read()
        except FileNotFoundError:
            return
        place = 0
        while place + _RECORD.size <= len(added):
            start, stop, checksum, check = _RECORD.unpack_from(added, place)
            if crc32c.crc32c(added[place : place + _RECORD.size - 4]) == check:
                if stop > start:
                    self._ranges[start], self._unproved[start] = stop, checksum
                else:
                    self._ranges.pop(start, None)
                place += _RECORD.size
            else:
                place += 1
        self._read_to += place


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _use(directory: Path) -> int:
    """Mark a data set's directory as in use until the descriptor is closed, which a kill does as well."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        os.utime(directory)
        descriptor = _open(directory / "in-use")
        _lock(descriptor, fcntl.F_RDLCK, 0)
        if (directory / "in-use").exists():
            return descriptor
        os.close(descriptor)  # another process removed the directory before it was locked


def _order(span: Span) -> tuple[str, int]:
    return span[0], span[1]


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # another process's
        return 0


def _lock(descriptor: int, kind: int, start: int, length: int = 0, *, wait: bool = True) -> bool:
    """Lock bytes of an open file for its descriptor alone (open file description locks); False if that would wait."""
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
    except BlockingIOError:
        return False
    return True
