"""Ranks agree on a prefix that is new, whatever ranks that died have left in the store."""

import threading

import torch.distributed as dist

from gpuops.training.rendezvous import fresh_prefix


def agree(store: dist.Store, world: int) -> set[str]:
    prefixes: list[str] = []
    threads = [
        threading.Thread(target=lambda rank=rank: prefixes.append(fresh_prefix(store, rank, world)))
        for rank in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(prefixes) == world
    return set(prefixes)


def test_every_start_has_a_prefix_of_its_own() -> None:
    store = dist.HashStore()
    seen: set[str] = set()
    for world in (4, 4, 2, 3):
        (prefix,) = agree(store, world)
        assert prefix not in seen
        seen.add(prefix)


def test_names_of_ranks_that_died_are_welcomed_in_vain() -> None:
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"gpuops/rendezvous/name/{rank}", "a rank that was killed before it was welcomed")
    assert len(agree(store, 3)) == 1
