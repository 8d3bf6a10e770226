"""Who reads what, when: a keyed permutation of the samples with no state but its key.

The order of an epoch is a pure function of (seed, epoch, fingerprint, global batch), never of ranks or workers.
Positions are permuted by a balanced Feistel network over the next even number of bits, walking cycles until the value
falls inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory and O(1) seek.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError
from gpuops.lineage.version import canonical_json

ROUNDS = 8
"""Feistel rounds; 4 are a pseudorandom permutation for a random round function, 8 leave a margin."""

Positions = npt.NDArray[np.int64]
_U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one epoch over `size` samples."""

    size: int
    """Number of samples in the split."""
    seed: int
    """The run's seed."""
    epoch: int
    """Epoch, from 0."""
    fingerprint: str
    """Identity of the data and of the declared samples."""
    global_batch: int
    """Samples a loader step over all data-parallel ranks."""
    shuffle: bool = True
    """False reads the samples in their stored order."""
    last: str = "drop"
    """What happens to an incomplete last global batch: "drop" it, or "pad" it with samples marked invalid."""

    def __post_init__(self) -> None:
        if self.last not in ("drop", "pad"):
            raise InputError(f"last must be 'drop' or 'pad', not {self.last!r}")
        if self.size < 1 or self.global_batch < 1:
            raise InputError(f"{self.size} samples in batches of {self.global_batch}: both must be at least 1")
        if self.last == "drop" and self.size < self.global_batch:
            raise InputError(
                f"{self.size} samples do not fill one global batch of {self.global_batch}: make global_batch smaller"
            )

    @property
    def batches(self) -> int:
        """Global batches in the epoch; the same for every rank."""
        return self.size // self.global_batch if self.last == "drop" else -(-self.size // self.global_batch)

    def batch(self, index: int, rank: int, ranks: int) -> tuple[Positions, npt.NDArray[np.bool_]]:
        """Sample positions of one rank's share of global batch `index`, and which of them are valid.

        Rank r of R takes every R-th sample of the global batch, so the union over ranks is the same for any R.
        """
        if self.global_batch % ranks:
            raise InputError(f"global_batch {self.global_batch} is not a multiple of {ranks} data-parallel ranks")
        positions = np.arange(index * self.global_batch + rank, (index + 1) * self.global_batch, ranks)
        valid = positions < self.size
        return self.permute(positions % self.size), valid

    def permute(self, positions: Positions) -> Positions:
        """Sample positions at the given places of the epoch's order (a bijection on [0, size))."""
        if not self.shuffle:
            return positions
        half = max(1, -(-(self.size - 1).bit_length() // 2))
        keys = self._round_keys()
        values = positions.astype(np.uint64)
        pending = np.ones(len(values), bool)
        while pending.any():
            values[pending] = _feistel(values[pending], half, keys)
            pending = values >= self.size
        return values.astype(np.int64)

    def _round_keys(self) -> _U64:
        key = [self.seed, self.epoch, self.fingerprint, self.global_batch, self.size]
        digest = hashlib.shake_256(canonical_json(key)).digest(8 * ROUNDS)
        return np.frombuffer(digest, "<u8")


def _feistel(values: _U64, half: int, keys: _U64) -> _U64:
    """One pass of the network over 2 * half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(value: _U64) -> _U64:
    """splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
