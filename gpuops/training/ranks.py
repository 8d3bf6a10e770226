"""What ranks tell each other outside of the model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def distributed() -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(value: _T) -> list[_T]:
    """The value of every rank, in rank order, on every rank; a collective call."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def host() -> str:
    """This machine, the same for all its containers: two of them that see one GPU must not count it twice."""
    boot = _BOOT_ID.read_text()[:8] if _BOOT_ID.is_file() else ""
    return f"{socket.gethostname()} (boot {boot})" if boot else socket.gethostname()
