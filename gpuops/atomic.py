"""Directories that appear whole or not at all."""

from __future__ import annotations

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

    On an error or a kill the destination is as it was before.

    Raises:
        InputError: the destination exists and `overwrite` is false.
    """
    if destination.exists() and not overwrite:
        raise InputError(f"{destination} exists: pass --overwrite to replace it, or name another place")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if destination.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{destination.name}-old-", dir=destination.parent))
            os.replace(destination, old / "old")
            os.replace(temporary, destination)
            shutil.rmtree(old)
        else:
            os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
