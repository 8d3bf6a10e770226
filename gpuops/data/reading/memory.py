"""The bytes a reader may hold: one budget for slots and chunks, a cache of decoded chunks, a pool of slot memory."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError

Bytes = npt.NDArray[np.uint8]
Key = tuple[str, tuple[int, ...]]
"""Variable and grid position of an inner chunk."""
Allocate = Callable[[int], Bytes]
"""Gives uint8 memory of so many bytes."""


class Chunk:
    """A decoded inner chunk that more than one sample is cut from."""

    __slots__ = ("data", "ready", "users")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.data: npt.NDArray[Any] = np.empty(shape, dtype)
        self.ready: Future[None] = Future()
        """Done once `data` is decoded, or with the error that it met."""
        self.users = 0
        """Batches that are being filled from it; it is not forgotten before they are done."""


class Memory:
    """What is held, against a budget. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        """Hold at most `budget_bytes`."""
        self.budget_bytes = budget_bytes
        self.peak_bytes = 0
        """Most bytes held at one time."""
        self._held = 0
        self._chunks: OrderedDict[Key, Chunk] = OrderedDict()
        self._change = threading.Condition(threading.RLock())
        self._closed = False

    def share(self, keys: list[Key], shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[list[Chunk], list[int]]:
        """Chunks for `keys`, now in use by one more batch, and the places of those that are new and must be decoded."""
        found, fresh = [], []
        with self._change:
            for place, key in enumerate(keys):
                chunk = self._chunks.get(key)
                if chunk is None:
                    chunk = self._chunks[key] = Chunk(shape, dtype)
                    self._held += chunk.data.nbytes
                    fresh.append(place)
                else:
                    self._chunks.move_to_end(key)
                chunk.users += 1
                found.append(chunk)
        return found, fresh

    def leave(self, chunks: list[Chunk]) -> None:
        """A batch is done with its chunks; those that could not be decoded are forgotten."""
        with self._change:
            for chunk in chunks:
                chunk.users -= 1
            failed = [k for k, c in self._chunks.items() if not c.users and c.ready.done() and c.ready.exception()]
            for key in failed:
                self._held -= self._chunks.pop(key).data.nbytes
            self._change.notify_all()

    def acquire(self, nbytes: int, *, shared: int, wait: bool) -> None:
        """Take bytes for a batch: forget idle chunks, oldest first, then wait until earlier batches are delivered.

        Args:
            nbytes: bytes of the slot and of what is read for it.
            shared: bytes of the chunks that the batch uses, which are held already.
            wait: False for who reads one batch by itself and gets it, whatever it takes.

        Raises:
            InputError: the batch alone needs more than the budget.
        """
        with self._change:
            while wait and self._held + nbytes > self.budget_bytes and not self._closed:
                if self._forget_one():
                    continue
                if self._held <= shared:
                    raise InputError(
                        f"one batch needs {(shared + nbytes) / 1e6:.0f} MB in memory, the budget is "
                        f"{self.budget_bytes / 1e6:.0f} MB: raise budget_mb, or make global_batch smaller"
                    )
                self._change.wait()
            self._held += nbytes
            while not wait and self._held > self.budget_bytes and self._forget_one():
                pass
            self.peak_bytes = max(self.peak_bytes, self._held)

    def release(self, nbytes: int) -> None:
        """Give bytes back."""
        with self._change:
            self._held -= nbytes
            self._change.notify_all()

    def close(self) -> None:
        """Let waiting threads go, and forget every chunk."""
        with self._change:
            self._closed = True
            self._chunks.clear()
            self._change.notify_all()

    def _forget_one(self) -> bool:
        idle = next((key for key, chunk in self._chunks.items() if not chunk.users and chunk.ready.done()), None)
        if idle is None:
            return False
        self._held -= self._chunks.pop(idle).data.nbytes
        return True


class Pool:
    """Memory of slots, used again once nobody refers to a slot's arrays: fresh pages cost more than raw chunks.

    Thread-safe; a slot that a consumer keeps simply does not come back.
    """

    KEPT = 4

    def __init__(self, allocate: Allocate | None = None) -> None:
        """Start empty; `allocate` makes memory that a device can copy from while it computes (pinned), say."""
        self._allocate = allocate or _pageable
        self._free: list[Bytes] = []
        self._lock = threading.RLock()  # a finalizer may run in the thread that holds it

    def take(self, nbytes: int) -> Bytes:
        """Bytes of any content, [nbytes]."""
        with self._lock:
            owner = next((free for free in self._free if free.nbytes == nbytes), None)
            if owner is not None:
                self._free = [free for free in self._free if free is not owner]
        if owner is None:
            owner = self._allocate(nbytes)
        # Through a memoryview, because NumPy would let views of an array refer to `owner` itself, past `lent`.
        lent = np.frombuffer(owner.data, np.uint8)
        weakref.finalize(lent, self._give_back, owner).atexit = False
        return lent

    def _give_back(self, owner: Bytes) -> None:
        with self._lock:
            self._free = [*self._free, owner][-self.KEPT :]


def _pageable(nbytes: int) -> Bytes:
    return np.empty(nbytes, np.uint8)
