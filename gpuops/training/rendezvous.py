"""Ranks that torchrun started again must not meet the addresses of those that died.

torchrun's c10d rendezvous keeps one store for all restarts (seen in torch 2.13), and workers find in it what those
before them wrote: gloo then connects to ports that nobody listens on, and the restart fails. Here the ranks that are
alive first agree on a prefix that no others had. A script of one's own gets the same by
`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ...`, which makes a store a restart.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import default_pg_timeout

_FOLDER = "gpuops/rendezvous"
_POLL_S = 0.02


def join_restarted(trainer: Trainer) -> None:
    """Initialise the process group under a fresh prefix, where torchrun may start ranks again on a store of before."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
    strategy: Any = trainer.strategy
    if not restarts or not shared or trainer.world_size == 1 or dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout: timedelta = getattr(strategy, "_timeout", None) or default_pg_timeout
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    prefix = fresh_prefix(store, rank, world)
    backend = strategy.process_group_backend or ("nccl" if strategy.root_device.type == "cuda" else "gloo")
    dist.init_process_group(backend, store=PrefixStore(prefix, store), rank=rank, world_size=world, timeout=timeout)


def fresh_prefix(store: Any, rank: int, world: int) -> str:
    """A prefix that all ranks which are alive have in common and no rank had before.

    Each rank writes a name of its own that nobody had, and waits to be welcomed by it. Rank 0 welcomes whatever names
    it finds, old ones in vain, until every rank has answered with the new prefix.

    Args:
        store: a `torch.distributed.Store` that may hold what dead ranks wrote.
        rank: this rank.
        world: number of ranks.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"{_FOLDER}/name/{rank}", name)
        prefix = store.get(f"{_FOLDER}/welcome/{name}").decode()  # waits for it
        store.set(f"{_FOLDER}/{prefix}/here/{rank}", "1")
        return str(prefix)
    prefix = uuid.uuid4().hex
    waiting = set(range(1, world))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{_FOLDER}/{prefix}/here/{other}"]):
                waiting.remove(other)
            elif store.check([f"{_FOLDER}/name/{other}"]):
                store.set(f"{_FOLDER}/welcome/{store.get(f'{_FOLDER}/name/{other}').decode()}", prefix)
        time.sleep(_POLL_S)
    return prefix
