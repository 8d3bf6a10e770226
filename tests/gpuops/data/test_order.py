"""The order: a bijection that depends on its key alone, the same samples a step on any number of ranks."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.data.order import Order
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


# refusals


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (10, {"last": "keep"}, "'drop' or 'pad', not 'keep'"),
        (0, {}, "0 samples"),
        (10, {"global_batch": 0}, "batches of 0"),
        (10, {"global_batch": 11}, "make global_batch smaller"),
    ],
)
def test_impossible_orders_are_refused(size: int, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        order(size, **changes)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(InputError, match="global_batch 8 is not a multiple of 3"):
        order(100, global_batch=8).batch(0, 0, 3)


def test_a_split_smaller_than_a_batch_can_be_padded() -> None:
    assert order(3, global_batch=8, last="pad").batches == 1
