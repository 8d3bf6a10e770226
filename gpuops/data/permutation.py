"""A keyed permutation of [0, size) with no state but its key: any place of it is computed alone.

Places are permuted by a balanced Feistel network over the next even number of bits, walking cycles until the value
falls inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory and O(1) seek.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.lineage.version import canonical_json

ROUNDS = 8
"""Feistel rounds; 4 are a pseudorandom permutation for a random round function, 8 leave a margin."""

Positions = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
"""Round keys: uint64 [ROUNDS], or [ROUNDS, n] where each place has a permutation of its own."""

TABLED = 8
"""The network is computed over its whole domain at once where that is at most so many times the places asked for."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def round_keys(key: Sequence[Any]) -> Keys:
    """Round keys [ROUNDS] of a key made of JSON values."""
    return np.frombuffer(hashlib.shake_256(canonical_json(list(key))).digest(8 * ROUNDS), "<u8")


def keys_of_each(keys: Keys, numbers: Positions) -> Keys:
    """Round keys [ROUNDS, n]: one permutation for each number, equal numbers alike."""
    return _mix(keys[:, None] + _mix((numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN)[None, :])


def permute(places: Positions, size: int | Positions, keys: Keys) -> Positions:
    """What stands at the given places of the permutation of [0, size).

    Args:
        places: int64 [n], each in [0, size).
        size: length of the permutation, at least 1; int64 [n] where places belong to permutations of several lengths.
        keys: from `round_keys`, or from `keys_of_each` for a permutation of its own at each place.

    Returns:
        int64 [n]. For one key, a bijection on [0, size); a place never depends on the others in the call.
    """
    each = keys.ndim == 2
    limit: Any = size if isinstance(size, int) else size.astype(np.uint64)
    bits: Any = _half(size) if isinstance(size, int) else _halves(size)
    values = places.astype(np.uint64)
    if isinstance(size, int) and not each and (domain := 1 << 2 * int(bits)) <= TABLED * len(values):
        return _walk(places, size, _feistel(np.arange(domain, dtype=np.uint64), bits, keys).astype(np.int64))
    pending = np.ones(len(values), bool)
    while pending.any():
        width = bits if isinstance(size, int) else bits[pending]
        values[pending] = _feistel(values[pending], width, keys[:, pending] if each else keys)
        pending = values >= limit
    return values.astype(np.int64)


def _walk(places: Positions, size: int, table: Positions) -> Positions:
    """Cycles walked in a table of the whole network, which a few passes over stragglers would cost more than."""
    values = table[places]
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = table[values[outside]]
    return values


def _half(size: int) -> np.uint64:
    """Half the bits that hold every place."""
    return np.uint64(max(1, -(-(size - 1).bit_length() // 2)))


def _halves(sizes: Positions) -> Keys:
    distinct, which = np.unique(sizes, return_inverse=True)
    halves: Keys = np.array([_half(int(size)) for size in distinct], np.uint64)[which]
    return halves


def _feistel(values: Keys, bits: Any, keys: Keys) -> Keys:
    """One pass of the network over 2 * bits bits."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    joined: Keys = (left << bits) | right
    return joined


def _mix(value: Keys) -> Keys:
    """splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    value = (value ^ (value >> _SHIFTS[0])) * _FACTORS[0]  # arrays wrap round without a word
    value = (value ^ (value >> _SHIFTS[1])) * _FACTORS[1]
    return value ^ (value >> _SHIFTS[2])
