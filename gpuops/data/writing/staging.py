"""Where an ingest works until its one commit, and what a rerun finds there after a kill.

A local destination has a directory beside it, `.NAME.ingest-KEY`; a bucket has one in the user's cache. KEY is the
recipe's digest, so only the same recipe over the same sources takes up what is there: the plan (arrays created, packing
chosen) and a journal with one file for each finished shard. The destination itself changes once, at the end: a rename
of the staged directory, or an Icechunk commit that moves the branch `main`.

Icechunk sessions end with their process, but a forked session can be pickled: each shard is written through a fork of
its own, whose pickle (the references to chunks that already lie in the store) is what the journal keeps.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr.storage
from zarr.abc.store import Store

from gpuops.atomic import locked, remove_unless_locked
from gpuops.data.icechunk_store import storage
from gpuops.data.source import open as open_source
from gpuops.errors import GpuopsError, InputError

BRANCH = "main"
"""The branch that an ingest moves."""
_MERGED = 256
"""Forks merged at a time, so that memory does not grow with the number of shards."""


@dataclass(frozen=True, slots=True)
class Root:
    """The way to a store in which the arrays of an ingest have been created; travels to workers."""

    path: str | None
    """Directory of a plain Zarr store; None for Icechunk."""
    fork: bytes | None
    """Pickled fork of an Icechunk session in which they were created; None for plain Zarr."""

    def open(self) -> tuple[Store, Any]:
        """A store to write one shard in, and the fork that `pickled` wants."""
        if self.fork is None:
            assert self.path is not None
            return zarr.storage.LocalStore(self.path), None
        fork = pickle.loads(self.fork)  # our own file, in a directory that only this user writes
        return fork.store, fork


def pickled(fork: Any) -> bytes | None:
    """What a fork has written, for the journal and for the merge."""
    return None if fork is None else pickle.dumps(fork)


@dataclass(slots=True)
class Staging:
    """The working place of one ingest."""

    folder: Path
    """Plan and journal, and the staged store if it is renamed at the end."""
    destination: str
    """Local path or URL."""
    format: str
    """icechunk or zarr."""
    append: bool
    """Whether the destination's arrays grow."""
    overwrite: bool
    """Whether the destination may be replaced."""
    fork: Any = None
    """Fork of an Icechunk session in which arrays are created."""

    @property
    def in_place(self) -> bool:
        """Whether shards go straight to the destination: to a bucket, or to an Icechunk repository that grows."""
        return self.format == "icechunk" and (self.append or "://" in self.destination)

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    # the plan

    def begin(self) -> Store:
        """The store in which arrays are created; what an unfinished beginning left is removed."""
        for left in (self._store, self.folder / "journal"):
            if left.exists():
                shutil.rmtree(left)
        (self.folder / "journal").mkdir()
        if self.format == "zarr":
            if self.append:
                shutil.copytree(self.destination, self._store, copy_function=_link_chunks)
            return zarr.storage.LocalStore(self._store)
        repository = self._repository(create=True)
        self.fork = repository.writable_session(BRANCH).fork()
        store: Store = self.fork.store
        return store

    def save_plan(self, plan: Mapping[str, Any]) -> Root:
        """Keep the plan, once the arrays are created; from now on a rerun resumes."""
        fork, self.fork = self.fork, None
        root = Root(str(self._store) if self.format == "zarr" else None, pickled(fork))
        base = None if self.format == "zarr" else self._tip()
        _write(self.folder / "plan.pickle", pickle.dumps({**plan, "root": root, "base": base}))
        return root

    def plan(self) -> dict[str, Any] | None:
        """The plan that a killed ingest kept, if it still fits the destination."""
        file = self.folder / "plan.pickle"
        if not file.is_file():
            return None
        try:
            plan: dict[str, Any] = pickle.loads(file.read_bytes())
            fits = self.format == "zarr" or plan["base"] == self._tip()
        except Exception:  # a plan of another version, or of a repository that is gone: nothing to resume
            return None
        return plan if fits else None

    # the journal

    def keep(self, name: str, entry: Any) -> None:
        """Note a finished shard."""
        _write(self.folder / "journal" / f"{name}.pickle", pickle.dumps(entry))

    def kept(self) -> dict[str, Any]:
        """Finished shards by name."""
        files = sorted((self.folder / "journal").glob("*.pickle"))
        return {file.stem: pickle.loads(file.read_bytes()) for file in files}

    # the end

    def merged(self, root: Root, forks: list[bytes | None]) -> tuple[Store, Any]:
        """One store with every shard in it, and the session to commit (None for plain Zarr)."""
        if root.path is not None:
            for left in Path(root.path).rglob("*.partial"):  # of writes that a kill cut off
                left.unlink()
            return zarr.storage.LocalStore(root.path), None
        session = self._repository(create=False).writable_session(BRANCH)
        for first in range(0, len(forks), _MERGED):
            session.merge(*(pickle.loads(one) for one in forks[first : first + _MERGED] if one is not None))
        store: Store = session.store
        return store, session

    def commit(self, session: Any, message: str, fingerprint: str) -> None:
        """Make it what the destination holds: one commit, one rename."""
        _write(self.folder / "finished", fingerprint.encode())
        if session is not None:
            session.commit(message, metadata={"fingerprint": fingerprint})
        if not self.in_place:
            self.swap()

    def complete(self) -> bool:
        """Whether an ingest was killed between its commit and the rename that shows it."""
        if self.in_place or not self._store.exists() or (wanted := self.finished()) is None:
            return False
        try:
            return open_source(self._store).fingerprint == wanted
        except InputError:
            return False

    def swap(self) -> None:
        """Let the staged store take the destination's place."""
        destination = Path(self.destination)
        replaced = _replaced(destination)
        with locked(destination.parent):
            _refuse_existing(destination, self.overwrite or self.append)  # another process may have been faster
            if destination.exists():
                os.replace(destination, replaced)
            os.replace(self._store, destination)
            shutil.rmtree(replaced, ignore_errors=True)

    def finished(self) -> str | None:
        """Fingerprint of an ingest that was killed after its commit began."""
        file = self.folder / "finished"
        return file.read_text() if file.is_file() else None

    def _repository(self, create: bool) -> Any:
        import icechunk

        place = storage(self.destination if self.in_place else str(self._store))
        if create and not icechunk.Repository.exists(place):
            return icechunk.Repository.create(place, **_spec_version())
        return icechunk.Repository.open(place)

    def _tip(self) -> str:
        return str(self._repository(create=False).lookup_branch(BRANCH))


@contextmanager
def staging(destination: str, key: str, *, format: str, append: bool, overwrite: bool) -> Iterator[Staging]:
    """The working place of an ingest with this key; removed at the end, unless it was interrupted with shards finished.

    Raises:
        InputError: the destination exists (or, to append, does not), or another process ingests the same there.
    """
    remote = "://" in destination
    place = Path(destination).absolute()
    folder = _cache() / f"{hashlib.sha256(destination.encode()).hexdigest()[:16]}.ingest-{key}"
    if not remote:
        folder = place.parent / f".{place.name}.ingest-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent):
        replaced = _replaced(place)
        if not remote and replaced.exists() and not place.exists():
            os.replace(replaced, place)  # killed between the two renames of a commit
        resumed = (folder / "finished").is_file()
        if not remote and not append and not resumed:
            _refuse_existing(place, overwrite)
        folder.mkdir(exist_ok=True)
        alive = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(alive)
            raise InputError(f"another process ingests the same into {destination}: wait for it to end") from None
    try:
        yield Staging(folder, destination if remote else str(place), format, append, overwrite)
    except BaseException as error:
        if isinstance(error, GpuopsError) or not any((folder / "journal").glob("*.pickle")):
            _discard(folder)
        raise
    else:
        _discard(folder)
        _remove_abandoned(folder)
    finally:
        os.close(alive)


def exists(url: str) -> bool:
    """Whether an Icechunk repository with data lies at a URL, or anything at a path."""
    import icechunk

    if "://" not in url:
        return Path(url).exists()
    place = storage(url)
    try:
        if not icechunk.Repository.exists(place):
            return False
        repository = icechunk.Repository.open(place)
        return len(list(repository.ancestry(branch=BRANCH))) > 1
    except icechunk.IcechunkError as error:
        reason = str(error).splitlines()[0].strip(" x")
        raise InputError(f"{url} cannot be reached ({reason}): check the bucket and the AWS_* variables") from error


def _spec_version() -> dict[str, Any]:
    """Icechunk 2 writes a format that 1.1 cannot read, unless it is told otherwise."""
    import inspect

    import icechunk

    return {"spec_version": 1} if "spec_version" in inspect.signature(icechunk.Repository.create).parameters else {}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuops" / "ingest"


def _replaced(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.replaced"


def _refuse_existing(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise InputError(f"{destination} exists: pass --overwrite to replace it, or name another place")


def _discard(folder: Path) -> None:
    """Remove a working place; renamed first, because half of one must not be taken up by a rerun."""
    gone = folder.with_name(f"{folder.name}-gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed ingests of other recipes left for the same destination."""
    stem = folder.name.rpartition("-")[0]
    for other in folder.parent.glob(f"{stem}-*"):
        if other.is_dir():
            remove_unless_locked(other)


def _link_chunks(source: str, target: str) -> None:
    """Chunks are replaced, never changed, so that a second name for one is as good as a copy; metadata is copied."""
    if Path(source).name == "zarr.json":
        shutil.copy2(source, target)
    else:
        os.link(source, target)


def _write(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)
