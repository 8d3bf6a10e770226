"""The order: a bijection that depends on its key alone, the same samples a step on any number of ranks."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.data import permutation
from gpuops.data.order import Lanes, Order, Strata
from gpuops.errors import InputError

SIZES = [1, 2, 3, 4, 5, *(2**k + d for k in (3, 4, 7, 10, 15) for d in (-1, 0, 1))]


def order(size: int, **changes: object) -> Order:
    values: dict[str, object] = {"seed": 0, "epoch": 0, "fingerprint": "abc", "global_batch": 1, **changes}
    return Order(size, **values)  # type: ignore[arg-type]


# a permutation


@pytest.mark.parametrize("size", SIZES)
def test_each_position_is_read_once(size: int) -> None:
    np.testing.assert_array_equal(np.sort(order(size).permute(np.arange(size))), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**63), 2**63), st.integers(0, 1000), st.text(max_size=8))
def test_each_position_is_read_once_under_any_key(size: int, seed: int, epoch: int, fingerprint: str) -> None:
    places = order(size, seed=seed, epoch=epoch, fingerprint=fingerprint).permute(np.arange(size))
    assert len(np.unique(places)) == size
    assert places.min() == 0
    assert places.max() == size - 1


@pytest.mark.parametrize("size", [10**9 + 7, 10**12, 2**40, 2**40 + 1, 2**62 + 3])
def test_a_place_far_into_a_large_order_costs_no_more_than_the_first(size: int) -> None:
    far = order(size)
    sample = np.unique(np.random.default_rng(0).integers(0, size, 2000))
    tracemalloc.start()
    places = far.permute(sample)
    one = [int(far.permute(sample[[i]])[0]) for i in (0, 1000, -1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, "something as long as the order was made"
    assert len(np.unique(places)) == len(sample)
    assert places.min() >= 0
    assert places.max() < size
    assert one == [int(places[i]) for i in (0, 1000, -1)], "a place must not depend on its neighbours in the call"


# These values must never change: checkpoints and papers refer to them.
GOLDEN = [
    # size, seed, epoch, fingerprint, global batch, first positions
    (1000, 0, 0, "abc", 8, [742, 557, 722, 229, 975, 275, 89, 145]),
    (1000, 7, 0, "abc", 8, [672, 239, 227, 947, 731, 770, 578, 447]),
    (1000, 0, 3, "abc", 8, [763, 634, 662, 830, 852, 903, 249, 887]),
    (1000, 0, 0, "abd", 8, [215, 58, 684, 425, 726, 304, 461, 393]),
    (1000, 0, 0, "abc", 16, [437, 57, 945, 563, 308, 338, 389, 793]),
    (7, 0, 0, "abc", 4, [4, 6, 1, 3, 0, 5, 2]),
    (
        1000000000000,
        1,
        2,
        "f" * 64,
        256,
        [
            751381605747,
            954128630376,
            909959819057,
            335167934759,
            115554194588,
            533494361919,
            640256013989,
            667583161349,
        ],
    ),
]


@pytest.mark.parametrize(("size", "seed", "epoch", "fingerprint", "global_batch", "first"), GOLDEN)
def test_the_order_of_a_key_never_changes(
    size: int, seed: int, epoch: int, fingerprint: str, global_batch: int, first: list[int]
) -> None:
    made = Order(size, seed, epoch, fingerprint, global_batch).permute(np.arange(len(first)))
    assert made.dtype == np.int64
    assert made.tolist() == first


GOLDEN_ENDS = [
    # size, lanes, key, first positions, last positions
    (1, None, {}, [0], [0]),
    (2, None, {}, [1, 0], [1, 0]),
    (10, None, {}, [9, 1, 2, 3, 6, 7, 8, 4, 5, 0], [8, 4, 5, 0]),
    (1000, Lanes(4, 2, 8), {}, [400, 817, 753, 899, 931, 318, 758, 900, 928, 819], [303, 746, 11, 1]),
    (203, Lanes(3, 2, 5), {"epoch": 7}, [12, 135, 168, 7, 139, 160, 9, 112, 165, 6], [198, 185, 78, 195]),
    (
        10**12,
        Lanes(48, 4, 32),
        {"seed": 1, "fingerprint": "f" * 64, "global_batch": 256},
        [502714741049, 343541574788, 266096312398, 323598000266, 145271477327],
        [268622692102, 58802839796, 910415685115, 98664365217],
    ),
]


@pytest.mark.parametrize(("size", "lanes", "key", "first", "last"), GOLDEN_ENDS)
def test_both_ends_of_an_order_never_change(
    size: int, lanes: Lanes | None, key: dict[str, object], first: list[int], last: list[int]
) -> None:
    whole = order(size, lanes=lanes, **key)
    assert whole.permute(np.arange(len(first))).tolist() == first
    assert whole.permute(np.arange(size - len(last), size)).tolist() == last


def test_the_draws_of_strata_never_change() -> None:
    strata = Strata(np.array([5, 3, 12]), np.array([0.5, 0.1, 0.4]), "d")
    made = Order(30, 0, 0, "abc", 4, strata=strata).permute(np.arange(30))
    assert made.tolist() == [
        *(5, 1, 19, 12, 14, 8, 7, 3, 4, 17, 2, 0, 2, 0, 10),
        *(11, 3, 18, 0, 4, 15, 13, 6, 4, 3, 1, 1, 9, 2, 16),
    ]


def test_every_part_of_the_key_changes_the_order() -> None:
    keys: list[dict[str, object]] = [{}, {"seed": 1}, {"epoch": 1}, {"fingerprint": "abd"}, {"global_batch": 2}]
    orders = [order(1000, **key).permute(np.arange(1000)) for key in keys]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in one place on average.
            assert (one == other).sum() < 15


def test_stored_order_without_shuffle() -> None:
    np.testing.assert_array_equal(order(100, shuffle=False).permute(np.arange(100)), np.arange(100))


def test_positions_are_uniform_over_epochs_and_pairs_are_independent() -> None:
    size, epochs = 16, 4000
    drawn = np.stack([order(size, epoch=epoch).permute(np.arange(size)) for epoch in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=size) for column in drawn.T])
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 225 degrees of freedom: mean 225, standard deviation 21.2. The key is fixed, so this cannot flicker.
    assert 140 < chi_square < 330
    pairs = np.bincount(drawn[:, 0] * size + drawn[:, 1], minlength=size * size)
    expected = epochs / (size * (size - 1))
    off = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
    assert 160 < ((off - expected) ** 2 / expected).sum() < 330  # 239 degrees of freedom
    assert np.trace(pairs.reshape(size, size)) == 0


def test_a_large_order_is_spread_out_and_not_a_shift() -> None:
    places = order(100_003).permute(np.arange(100_003))
    assert abs(np.corrcoef(np.arange(100_003), places)[0, 1]) < 0.02
    steps = np.diff(places)
    assert np.unique(steps).size > 50_000
    assert (np.abs(steps) == 1).sum() < 30


# batches


@pytest.mark.parametrize("last", ["drop", "pad"])
@pytest.mark.parametrize("size", [24, 100, 103, 131])
def test_ranks_share_each_global_batch(size: int, last: str) -> None:
    whole = order(size, global_batch=24, last=last)
    assert whole.batches == (size // 24 if last == "drop" else -(-size // 24))
    seen = []
    for index in range(whole.batches):
        alone, alone_valid = whole.batch(index, 0, 1)
        seen.append(alone[alone_valid])
        for ranks in (2, 3, 4):
            shares = [whole.batch(index, rank, ranks) for rank in range(ranks)]
            assert {len(ids) for ids, _ in shares} == {24 // ranks}, "ranks must never differ in batch size"
            together = np.stack([ids for ids, _ in shares], axis=1).ravel()
            valid = np.stack([ok for _, ok in shares], axis=1).ravel()
            np.testing.assert_array_equal(together, alone)
            np.testing.assert_array_equal(valid, alone_valid)
    delivered = np.concatenate(seen)
    assert len(np.unique(delivered)) == len(delivered), "a sample was delivered twice"
    assert len(delivered) == (size // 24 * 24 if last == "drop" else size)


def test_padding_repeats_real_samples_and_marks_them() -> None:
    positions, valid = order(5, global_batch=8, last="pad").batch(0, 0, 1)
    assert valid.tolist() == [True] * 5 + [False] * 3
    assert set(positions[~valid]) <= set(range(5))
    assert sorted(positions[valid]) == list(range(5))
    one, ok = order(1, global_batch=4, last="pad", shuffle=False).batch(0, 1, 2)
    assert one.tolist() == [0, 0]
    assert ok.tolist() == [False, False]


def test_the_middle_of_an_order_is_reached_without_its_beginning() -> None:
    whole = order(1000, global_batch=10)
    places = whole.permute(np.arange(1000))
    np.testing.assert_array_equal(whole.batch(77, 0, 1)[0], places[770:780])
    np.testing.assert_array_equal(whole.batch(77, 3, 5)[0], places[[773, 778]])


# lanes


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 9), st.integers(1, 5), st.integers(1, 7), st.integers(0, 50), st.booleans())
def test_lanes_read_each_sample_once(size: int, count: int, window: int, block: int, epoch: int, apart: bool) -> None:
    whole = order(size, epoch=epoch, lanes=Lanes(count, window, block))
    places = np.arange(size)
    made = whole.permute(places)
    np.testing.assert_array_equal(np.sort(made), places)
    if apart:
        alone = [int(whole.permute(places[[i]])[0]) for i in (0, size // 2, size - 1)]
        assert alone == [int(made[i]) for i in (0, size // 2, size - 1)], "a place must not depend on its neighbours"


def rounds_of(made: np.ndarray, lanes: Lanes) -> list[int]:
    """Places at which whole rounds begin: where the next span of places holds exactly count * window blocks."""
    span = lanes.count * lanes.window * lanes.block
    starts, place = [], 0
    while place + span <= len(made):
        blocks, counts = np.unique(made[place : place + span] // lanes.block, return_counts=True)
        if len(blocks) == lanes.count * lanes.window and (counts == lanes.block).all():
            starts.append(place)
            place += span
        else:
            place += 1
    return starts


@pytest.mark.parametrize("size", [12 * 3 * 5 * 4, 12 * 3 * 5 * 4 + 17, 12 * 3 * 5 * 4 + 77])
def test_no_two_ranks_touch_a_block_of_a_round(size: int) -> None:
    lanes, per_rank = Lanes(12, 3, 5), {}
    whole = order(size, global_batch=24, lanes=lanes, last="pad")
    made = whole.permute(np.arange(size))
    starts = rounds_of(made, lanes)
    assert len(starts) == 4
    for ranks in (1, 2, 3, 4, 6, 12):
        for start in starts:
            inside = np.arange(start, start + 180)
            blocks = [set((made[inside[inside % ranks == rank]] // 5).tolist()) for rank in range(ranks)]
            assert sum(map(len, blocks)) == len(set.union(*blocks)) == 36, "a block is read by two ranks"
            assert {len(one) for one in blocks} == {36 // ranks}
        shares = [[whole.batch(k, rank, ranks) for k in range(whole.batches)] for rank in range(ranks)]
        batches = [np.stack([ids for ids, _ in parts], axis=1).ravel().tolist() for parts in zip(*shares, strict=True)]
        per_rank[ranks] = batches
    assert all(batches == per_rank[1] for batches in per_rank.values()), "batches must not depend on the ranks"


def test_lanes_shuffle_blocks_and_samples_anew_every_epoch() -> None:
    lanes, size = Lanes(4, 2, 8), 4 * 2 * 8 * 20 + 5
    first, second = (order(size, epoch=epoch, lanes=lanes).permute(np.arange(size)) for epoch in (0, 1))
    assert (first == second).sum() < 15
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.3, "160 blocks: a standard deviation of 0.08"
    begin = rounds_of(first, lanes)[0]
    inside = first[begin : begin + 64 : 4]  # one lane of one round: two blocks, mixed
    assert len(set((inside // 8).tolist())) == 2
    assert sorted(inside.tolist()) != inside.tolist()


def test_no_sample_is_always_in_the_batch_that_is_dropped() -> None:
    # 2 samples fill no block, and 6 are dropped: at the end of every epoch, those 2 would never be trained on.
    lanes, size = Lanes(2, 2, 4), 16 * 5 + 2 + 4
    dropped = np.zeros(size, int)
    for epoch in range(400):
        whole = order(size, epoch=epoch, global_batch=8, lanes=lanes)
        dropped[whole.permute(np.arange(whole.batches * 8, size))] += 1
    assert dropped.sum() == 400 * (size % 8)
    assert dropped.max() < 120, "a sample was left out in more than three of ten epochs"


def test_lanes_are_part_of_the_key_and_none_is_the_plain_order() -> None:
    plain = order(1000).permute(np.arange(1000))
    lanes = [Lanes(4, 2, 8), Lanes(2, 4, 8), Lanes(4, 4, 4)]
    made = [order(1000, lanes=one).permute(np.arange(1000)) for one in lanes]
    for i, one in enumerate(made):
        for other in [plain, *made[:i]]:
            assert (one == other).sum() < 15
    np.testing.assert_array_equal(
        order(50, lanes=Lanes(4, 2, 8)).permute(np.arange(50)), order(50).permute(np.arange(50))
    )


# state and seek


@pytest.mark.parametrize("lanes", [None, Lanes(48, 4, 32)])
def test_an_order_of_a_million_million_samples_is_its_key(lanes: Lanes | None) -> None:
    whole = order(10**12, fingerprint="f" * 64, global_batch=256, lanes=lanes)
    assert len(pickle.dumps(whole)) < 1024
    widths: list[int] = []

    def counted(values: np.ndarray, *rest: object) -> np.ndarray:
        widths.append(len(values))
        return feistel(values, *rest)  # type: ignore[arg-type]

    feistel = permutation._feistel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "_feistel", counted)
        whole.batch(whole.batches - 1, 3, 8)
    # The last batch costs passes over its own 32 places and nothing else: 4 values for one is the most that a
    # range of places can need on average, three permutations with lanes.
    assert max(widths) == 32
    assert sum(widths) < 32 * 4 * 4


@pytest.mark.parametrize("lanes", [None, Lanes(4, 2, 4)])
def test_every_sample_is_equally_often_in_the_first_batch(lanes: Lanes | None) -> None:
    size, batch, seeds = 64, 16, 2000
    counts = np.zeros(size)
    for seed in range(seeds):
        counts[order(size, seed=seed, global_batch=batch, lanes=lanes).batch(0, 0, 1)[0]] += 1
    expected = seeds * batch / size
    assert counts.sum() == seeds * batch
    # 63 degrees of freedom. Blocks of 4 in one batch depend on each other, which at most multiplies the spread by 4.
    assert ((counts - expected) ** 2 / expected).sum() < (103 if lanes is None else 260)


# refusals


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (10, {"last": "keep"}, "'drop' or 'pad', not 'keep'"),
        (0, {}, "0 samples"),
        (10, {"global_batch": 0}, "batches of 0"),
        (10, {"global_batch": 11}, "make global_batch smaller"),
        (10, {"lanes": Lanes(1, 1, 1), "strata": Strata(np.array([10]), np.ones(1), "")}, "lanes or a sampling"),
    ],
)
def test_impossible_orders_are_refused(size: int, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        order(size, **changes)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(InputError, match="global_batch 8 is not a multiple of 3"):
        order(100, global_batch=8).batch(0, 0, 3)


@pytest.mark.parametrize("lanes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_lanes_are_refused(lanes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        Lanes(*lanes)


def test_a_split_smaller_than_a_batch_can_be_padded() -> None:
    assert order(3, global_batch=8, last="pad").batches == 1


@pytest.mark.parametrize("last", ["drop", "pad"])
@pytest.mark.parametrize("lanes", [None, Lanes(2, 2, 5)])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 3)])
def test_shares_are_the_batches(last: str, lanes: Lanes | None, rank: int, ranks: int) -> None:
    whole = order(20_011, global_batch=6, last=last, lanes=lanes)
    for first in (0, 1, 3000, whole.batches - 1, whole.batches):
        shares = list(whole.shares(first, rank, ranks))
        assert len(shares) == whole.batches - first
        for place in {0, len(shares) // 2, len(shares) - 1} & set(range(len(shares))):
            for got, want in zip(shares[place], whole.batch(first + place, rank, ranks), strict=True):
                np.testing.assert_array_equal(got, want)
