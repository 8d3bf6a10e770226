"""Random numbers that are a function of where they are used, and of nothing that came before.

Philox4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: a key and a counter
become four 32-bit numbers. The same sample is augmented alike on any rank, world size, device and restart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""Numbers below 2^32, kept in 64 bits so that products do not overflow."""

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Words, key: Words) -> Words:
    """Four random words for each counter.

    Args:
        counter: uint64 [4, n], each below 2^32.
        key: uint64 [2], each below 2^32.

    Returns:
        uint64 [4, n], each below 2^32, uniform.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> _SHIFT) ^ c1 ^ k0, second & _LOW, (first >> _SHIFT) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def draw(
    ids: npt.NDArray[np.int64], seed: int, epoch: int, step: int | npt.NDArray[np.int64], number: int = 0
) -> Words:
    """Four random words for each sample, for one step of a pipeline.

    Args:
        ids: sample ids, int64 [n].
        seed: the run's seed; its upper 32 bits are folded into the lower.
        epoch: epoch, from 0.
        step: position of the step in its pipeline; int64 [n] where each has its own.
        number: which draw of that step.

    Returns:
        uint64 [4, n], each below 2^32: Philox4x32-10 with key (seed, epoch) and counter (id, id >> 32, step, number).
    """
    names = ids.astype(np.uint64)
    others = [np.broadcast_to(np.asarray(value, np.uint64), len(ids)) for value in (step, number)]
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    key = np.array([folded, epoch & 0xFFFFFFFF], np.uint64)
    return philox4x32(np.stack([names & _LOW, names >> _SHIFT, *others]), key)


def below(words: Words, limit: int) -> npt.NDArray[np.int64]:
    """Words as integers in [0, limit), of which none is likelier than another by more than limit / 2^32."""
    return ((words * np.uint64(limit)) >> _SHIFT).astype(np.int64)
