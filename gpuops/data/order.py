"""Who reads what, when: a pure function of (seed, epoch, fingerprint, global batch), never of ranks or workers.

State is the key alone and any batch is reached by arithmetic (see `gpuops.data.permutation`). The values are a
contract: checkpoints refer to them, so for a key they never change between versions of gpuops; tests hold golden ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.data.permutation import Positions, keys_of_each, permute, round_keys
from gpuops.errors import InputError

TOGETHER = 8192
"""Places that are permuted in one go where batches are read one after the other."""


@dataclass(frozen=True)  # no slots: jsonargparse reads a default instance through vars()
class Lanes:
    """A shuffle in which chunks that hold many samples are decoded once.

    Blocks of consecutive samples are permuted and dealt to lanes. A round is `count * window` blocks: its place p
    belongs to lane p % count, and a lane's samples are shuffled over its `window` blocks of the round. A rank r of R
    takes the places p = r (mod R), so where R divides `count` no two ranks touch the same block. Blocks that fill no
    round, and samples that fill no block, are one more set, shuffled as a whole, between two rounds.
    """

    count: int
    """Lanes; a multiple of the data-parallel ranks for which blocks are to be decoded once."""
    window: int
    """Blocks of a lane that are shuffled together; count * window blocks are in use at one time, over all ranks."""
    block: int
    """Consecutive samples that share stored chunks."""

    def __post_init__(self) -> None:
        if min(self.count, self.window, self.block) < 1:
            raise InputError(f"{self}: count, window and block must be at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """How often each group of samples is drawn; the samples of a group stand next to each other."""

    counts: Positions
    """Samples in each stratum, int64 [strata], each at least 1."""
    shares: npt.NDArray[np.float64]
    """Share of an epoch's draws that each stratum gets, float64 [strata], sum 1."""
    digest: str
    """sha256 of who belongs to which stratum with which share."""

    def quotas(self, draws: int, offset: float) -> Positions:
        """Edges [strata + 1] of the strata's quotas: whole numbers that add up to `draws`.

        A stratum gets floor or ceil of share * draws, and exactly that on average over offsets uniform in [0, 1)
        (systematic sampling: Madow, "On the theory of systematic sampling, II", 1949).
        """
        inner = np.floor(np.cumsum(self.shares)[:-1] * draws + offset).astype(np.int64)
        return np.concatenate([[0], np.minimum(inner, draws), [draws]])


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one epoch over `size` samples."""

    size: int
    """Number of samples in the split, or of draws an epoch where `strata` are given."""
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
    lanes: Lanes | None = None
    """Shuffle that decodes chunks of many samples once; None shuffles over the whole split."""
    strata: Strata | None = None
    """Draws by stratum; None reads each sample once."""

    def __post_init__(self) -> None:
        if self.last not in ("drop", "pad"):
            raise InputError(f"last must be 'drop' or 'pad', not {self.last!r}")
        if self.size < 1 or self.global_batch < 1:
            raise InputError(f"{self.size} samples in batches of {self.global_batch}: both must be at least 1")
        if self.last == "drop" and self.size < self.global_batch:
            raise InputError(
                f"{self.size} samples do not fill one global batch of {self.global_batch}: make global_batch smaller"
            )
        if self.lanes is not None and self.strata is not None:
            raise InputError("an order has lanes or a sampling, not both: leave one of them out")

    @property
    def batches(self) -> int:
        """Global batches in the epoch; the same for every rank."""
        return self.size // self.global_batch if self.last == "drop" else -(-self.size // self.global_batch)

    def batch(self, index: int, rank: int, ranks: int) -> tuple[Positions, npt.NDArray[np.bool_]]:
        """Sample positions of one rank's share of global batch `index`, and which of them are valid.

        Rank r of R takes every R-th sample of the global batch, so the union over ranks is the same for any R.
        """
        places = self._places(index, rank, ranks)
        return self.permute(places % self.size), places < self.size

    def _places(self, index: int, rank: int, ranks: int) -> Positions:
        """Places of one rank's share of a global batch in the epoch; those beyond the last sample fill it up."""
        if self.global_batch % ranks:
            raise InputError(f"global_batch {self.global_batch} is not a multiple of {ranks} data-parallel ranks")
        return np.arange(index * self.global_batch + rank, (index + 1) * self.global_batch, ranks)

    def shares(self, first: int, rank: int, ranks: int) -> Iterator[tuple[Positions, npt.NDArray[np.bool_]]]:
        """What `batch` gives, from global batch `first` to the end of the epoch.

        Several batches are permuted in one go, because a call costs as much for sixteen places as for a thousand.
        """
        together = max(1, TOGETHER // max(self.global_batch // ranks, 1))
        for begin in range(first, self.batches, together):
            batches = range(begin, min(begin + together, self.batches))
            share = self.global_batch // ranks
            places = np.concatenate([self._places(index, rank, ranks) for index in batches])
            samples = self.permute(places % self.size)
            for number in range(len(batches)):
                part = slice(number * share, (number + 1) * share)
                yield samples[part], places[part] < self.size

    def permute(self, positions: Positions) -> Positions:
        """Sample positions at the given places of the epoch's order.

        A bijection on [0, size); with strata, each stratum's quota of draws, no member more than once oftener than
        another of its stratum.
        """
        if not self.shuffle:
            return positions
        if self.strata is not None:
            return self._draw(positions, self.strata)
        if self.lanes is not None and self.size >= self.lanes.count * self.lanes.window * self.lanes.block:
            return self._in_lanes(positions, self.lanes)
        return permute(positions, self.size, round_keys(self._key()))

    def _key(self, *use: Any) -> list[Any]:
        return [self.seed, self.epoch, self.fingerprint, self.global_batch, self.size, *use]

    def _in_lanes(self, positions: Positions, lanes: Lanes) -> Positions:
        key = self._key("lanes", lanes.count, lanes.window, lanes.block)
        blocks, per_round = self.size // lanes.block, lanes.count * lanes.window
        rounds, span = blocks // per_round, per_round * lanes.block
        rest = self.size - rounds * span
        # The rest stands between two rounds, another two every epoch: at the end it would lose the same samples to
        # the dropped last batch again and again.
        start = int(round_keys([*key, "rest at"])[0]) % (rounds + 1) * span
        in_rest = (positions >= start) & (positions < start + rest)
        result = np.empty_like(positions)

        place = positions[~in_rest]
        number, inside = np.divmod(place - np.where(place >= start, rest, 0), span)
        turn, lane = np.divmod(inside, lanes.count)
        keys = keys_of_each(round_keys([*key, "turns"]), number * lanes.count + lane)
        turn, offset = np.divmod(permute(turn, lanes.window * lanes.block, keys), lanes.block)
        block_keys = round_keys([*key, "blocks"])
        block = permute(number * per_round + lane * lanes.window + turn, blocks, block_keys)
        result[~in_rest] = block * lanes.block + offset

        place = permute(positions[in_rest] - start, rest, round_keys([*key, "rest"])) if rest else positions[in_rest]
        turn, offset = np.divmod(place, lanes.block)
        turn += rounds * per_round
        whole = turn < blocks  # the others fill no block and come last in the stored order
        turn[whole] = permute(turn[whole], blocks, block_keys)
        result[in_rest] = turn * lanes.block + offset
        return result

    def _draw(self, positions: Positions, strata: Strata) -> Positions:
        key = self._key("strata", strata.digest)
        offset = int(round_keys([*key, "offset"])[0]) / 2**64
        edges = strata.quotas(self.size, min(offset, 1 - 2**-53))
        draw = permute(positions, self.size, round_keys([*key, "draws"]))
        stratum = np.searchsorted(edges, draw, side="right") - 1
        counts = strata.counts[stratum]
        # Draw after draw goes through the whole stratum before it begins again: no member beyond its quota.
        turn = (draw - edges[stratum]) % counts
        member = permute(turn, counts, keys_of_each(round_keys([*key, "members"]), stratum))
        return (np.cumsum(strata.counts) - strata.counts)[stratum] + member
