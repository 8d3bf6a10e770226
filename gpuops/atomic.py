"""Directories that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuops.errors import InputError


@contextmanager
def new_directory(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `destination` that takes its place when the block ends without error.

    On an error or a kill the destination is as it was before. What a killed process left beside it is removed by the
    next one: a temporary directory is locked while its process lives.

    Raises:
        InputError: the destination exists and `overwrite` is false.
    """
    parent, name = destination.parent, destination.name
    parent.mkdir(parents=True, exist_ok=True)
    replaced = parent / f".{name}.replaced"
    with locked(parent):
        if replaced.exists() and not destination.exists():
            os.replace(replaced, destination)  # killed between the two renames below
        _refuse_existing(destination, overwrite)
        for left in (*parent.glob(f".{name}.new-*"), replaced):
            remove_unless_locked(left)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=parent))
        temporary.chmod(0o755)
        alive = os.open(temporary, os.O_RDONLY)
        fcntl.flock(alive, fcntl.LOCK_EX)
    try:
        yield temporary
        with locked(parent):
            _refuse_existing(destination, overwrite)  # another process may have been faster
            if destination.exists():
                os.replace(destination, replaced)
            os.replace(temporary, destination)
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(alive)
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not overwrite:
        raise InputError(f"{destination} exists: pass --overwrite to replace it, or name another place")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; it ends with the process at the latest."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_unless_locked(directory: Path) -> None:
    """Remove what a dead process left."""
    if not directory.exists():
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        pass  # its process lives
    finally:
        os.close(descriptor)
