"""Sampling: declared shares kept to the draw in every epoch, nobody beyond the quota, resumable and free of ranks."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.data.datamodule import ZarrDataModule
from gpuops.data.order import Lanes, Order, Strata
from gpuops.data.runs import Runs
from gpuops.data.sample import Field, SampleSpec, Window, bind
from gpuops.data.sampling import Foreground, Sampling, Stratified, Weighted, stratify
from gpuops.data.source import Source, open
from gpuops.data.split import Holdout
from gpuops.errors import InputError, IntegrityError

RECORDS = 60
PLAIN = SampleSpec({"x": [Field("x")]}, {})
WEIGHTS = np.where(np.arange(RECORDS) % 4 == 0, 0, np.arange(RECORDS) % 3 + 1).astype(np.float32)
REGIONS = np.repeat([3, 7, 7, 7, 9, 3], 10)


def write(folder: Path, **changes: Any) -> str:
    generator = np.random.default_rng(0)
    mask = np.zeros((RECORDS, 3, 3), np.uint8)
    mask[::6, 1, 1] = 2
    arrays: dict[str, tuple[Any, tuple[str, ...]]] = {
        "x": (generator.normal(size=(RECORDS, 4, 4)).astype(np.float32), ("time", "y", "x")),
        "weight": (WEIGHTS, ("time",)),
        "monthly": (np.arange(RECORDS * 4).reshape(RECORDS, 4) % 5, ("time", "month")),
        "year": (generator.normal(size=(RECORDS, 4, 2)).astype(np.float32), ("time", "month", "x")),
        "region": (REGIONS, ("time",)),
        "mask": (mask, ("time", "y", "x")),
        "short": (np.ones(3), ("other",)),
        **changes,
    }
    root = zarr.open_group(folder, mode="w")
    for name, (values, dims) in arrays.items():
        root.create_array(
            name, data=values, chunks=(1 if values.ndim > 2 else 7, *values.shape[1:]), dimension_names=dims
        )
    return str(folder)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("sampled") / "store")


@pytest.fixture(scope="module")
def source(url: str) -> Source:
    return open(url)


def draws_of(source: Source, sampling: Sampling, draws: int, epoch: int = 0, **options: Any) -> list[int]:
    """Ids of one epoch's draws."""
    sample = bind(options.get("spec", PLAIN), source)
    ids, strata = stratify(source, sample, options.get("ids", Runs.up_to(sample.records * sample.starts)), sampling)
    order = Order(draws, 0, epoch, "abc", 4, last="pad", strata=strata)
    return ids[order.permute(np.arange(draws))].tolist()


# laws


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=50), st.integers(1, 200), st.integers(0, 20))
def test_an_epoch_keeps_the_quotas(labels: list[int], draws: int, epoch: int) -> None:
    values = np.sort(np.array(labels))
    distinct, counts = np.unique(values, return_counts=True)
    shares = (distinct + 1) * counts / ((distinct + 1) * counts).sum()
    order = Order(draws, 1, epoch, "abc", 1, strata=Strata(counts.astype(np.int64), shares, "d"))
    made = order.permute(np.arange(draws))
    drawn = np.bincount(made, minlength=len(values))
    for label, count, share in zip(distinct, counts, shares, strict=True):
        mine = drawn[values == label]
        assert abs(mine.sum() - share * draws) < 1 + 1e-9, "a stratum got more or less than its share"
        assert mine.max() - mine.min() <= 1, "a sample was drawn beyond its quota"
        assert mine.max() <= -(-mine.sum() // count)


def test_quotas_are_exact_on_average_and_members_take_turns(source: Source) -> None:
    epochs, draws = 600, 50
    ids, strata = stratify(source, bind(PLAIN, source), Runs.up_to(RECORDS), Weighted("weight"))
    total: Counter[int] = Counter()
    for epoch in range(epochs):
        total.update(ids[Order(draws, 0, epoch, "abc", 4, strata=strata).permute(np.arange(draws))].tolist())
    expected = WEIGHTS / WEIGHTS.sum() * epochs * draws
    drawn = np.array([total[i] for i in range(RECORDS)])
    assert (drawn[WEIGHTS == 0] == 0).all(), "weight 0 is never drawn"
    # Each count is a sum of nearly independent draws of 0 or 1 more: well below a Poisson spread.
    assert (np.abs(drawn - expected) < 4 * np.sqrt(np.maximum(expected, 1))).all()
    for weight in (1, 2, 3):
        assert abs(drawn[weight == WEIGHTS].sum() - expected[weight == WEIGHTS].sum()) < epochs * 0.1


def test_weights_are_rounded_to_a_bounded_number_of_strata(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = generator.lognormal(0, 3, RECORDS)
    source = open(write(tmp_path / "store", weight=(weights, ("time",))))
    sample = bind(PLAIN, source)
    ids, strata = stratify(source, sample, Runs.up_to(RECORDS), Weighted("weight"))
    share = np.repeat(strata.shares / strata.counts, strata.counts)
    np.testing.assert_allclose(share, (weights / weights.sum())[ids[:]], rtol=0.01)
    assert strata.shares.sum() == pytest.approx(1)


# declarations


def test_strata_get_the_declared_shares(source: Source) -> None:
    even = Counter(REGIONS[draws_of(source, Stratified("region"), 90)].tolist())
    assert even == {3: 30, 7: 30, 9: 30}
    declared = Counter(REGIONS[draws_of(source, Stratified("region", {"3": 1, "7": 0, "9": 3}), 40)].tolist())
    assert declared == {3: 10, 9: 30}
    each = Counter(draws_of(source, Stratified("region"), 90))
    assert {each[i] for i in range(40, 50)} == {3}, "10 samples share 30 draws"


def test_foreground_gets_its_share_from_a_mask(source: Source) -> None:
    drawn = draws_of(source, Foreground("mask", 0.4), 50)
    assert sum(i % 6 == 0 for i in drawn) == 20
    assert max(Counter(drawn).values()) == 2
    with pytest.raises(InputError, match="none of the training split"):
        draws_of(source, Foreground("mask", 0.5, above=2), 50)


def test_foreground_from_the_statistics_of_ingest(source: Source, tmp_path: Path) -> None:
    path = write(tmp_path / "store")
    rows = np.zeros((RECORDS, 1, 5))
    rows[10:20, :, 4] = 5.0  # what the mask does not say
    zarr.open_group(path, mode="a").create_array(".gpuops/stats/mask", data=rows)
    drawn = draws_of(open(path), Foreground("mask", 0.5), 40)
    assert sum(10 <= i < 20 for i in drawn) == 20


def test_the_step_of_a_window_that_decides(source: Source) -> None:
    windows = SampleSpec({"x": [Field("x", at=(0, 1))]}, {"y": [Field("x", at=(2,), name="next")]}, Window("time", 3))
    ids = Runs.up_to(RECORDS - 2)
    drawn = draws_of(source, Weighted("weight", at=2), 60, spec=windows, ids=ids)
    assert all(WEIGHTS[i + 2] > 0 for i in drawn)
    inside = SampleSpec({"x": [Field("year", at=(0,))]}, {}, Window("month", 2, cyclic=True))
    drawn = draws_of(source, Stratified("monthly", {"0": 1, "1": 0, "2": 0, "3": 0, "4": 0}, at=1), 40, spec=inside)
    monthly = np.arange(RECORDS * 4).reshape(RECORDS, 4) % 5
    assert {int(monthly[i // 4, (i % 4 + 1) % 4]) for i in drawn} == {0}
    assert len(drawn) == 40
    by_record = draws_of(source, Stratified("region", {"3": 1, "7": 0, "9": 0}), 80, spec=inside)
    assert sorted(by_record) == [r * 4 + m for r in np.flatnonzero(REGIONS == 3) for m in range(4)]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Weighted("nothing"), "no variable 'nothing'"),
        (Weighted("short"), "it must be .60."),
        (Weighted("x"), "it must be .60."),
        (Weighted("weight", at=1), "step 1 lies outside a window of 1"),
        (Weighted("weight", draws=0), "give at least 1"),
        (Stratified("region", {"3": 1, "7": 1}), "has .'3', '7', '9'."),
        (Stratified("region", {"3": 1, "7": 1, "9": -1}), "0 or more"),
        (Stratified("region", {"3": 0, "7": 0, "9": 0}), "nothing in the training split"),
        (Foreground("mask", 1.0), "between 0 and 1"),
        (Foreground("short"), "name a variable on the sample axis"),
    ],
)
def test_impossible_samplings(source: Source, sampling: Sampling, words: str) -> None:
    with pytest.raises(InputError, match=words):
        draws_of(source, sampling, 10)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_weight_that_is_none_is_named(tmp_path: Path, bad: float) -> None:
    weights = WEIGHTS.copy()
    weights[23] = bad
    with pytest.raises(InputError, match="record 23 has no usable value"):
        draws_of(open(write(tmp_path / "store", weight=(weights, ("time",)))), Weighted("weight"), 10)


# in the data module


@contextmanager
def data_module(url: str, **changes: Any) -> Iterator[ZarrDataModule]:
    options: dict[str, Any] = {"inputs": dict(PLAIN.inputs), "targets": {}, "global_batch": 12, **changes}
    module = ZarrDataModule(url, **options)
    module.setup()
    try:
        yield module
    finally:
        module.teardown()


def epoch_of(batches: Any) -> list[int]:
    return [sample for batch in batches for sample in batch["id"].tolist()]


SAMPLINGS = [
    Weighted("weight"),
    Stratified("region", {"3": 2, "7": 1, "9": 1}),
    Foreground("mask", 0.5, draws=96),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_sampled_epoch_is_resumed_exactly(url: str, sampling: Any) -> None:
    with data_module(url, sampling=sampling) as module:
        loader = module.train_dataloader()
        whole = [epoch_of(loader), epoch_of(loader)]
        assert len(whole[0]) == (96 if sampling.draws else 60)
        assert whole[0] != whole[1]
        with data_module(url, sampling=sampling) as other:
            begun = other.train_dataloader()
            epoch_of(begun)
            iterator = iter(begun)
            seen = [next(iterator)["id"].tolist() for _ in range(2)]
            state = other.state_dict()
        with data_module(url, sampling=sampling) as resumed:
            resumed.load_state_dict(state)
            assert [*seen[0], *seen[1], *epoch_of(resumed.train_dataloader())] == whole[1]


def test_weights_are_part_of_the_identity(url: str, tmp_path: Path) -> None:
    with data_module(url, sampling=Weighted("weight")) as module:
        module.train_dataloader()
        state, fingerprint = module.state_dict(), module.fingerprint
    # The bytes of a foreign store have the same names and sizes: its own fingerprint may see nothing.
    weights = WEIGHTS.copy()
    weights[[1, 2]] = weights[[2, 1]]
    for changed, sampling in (
        (write(tmp_path / "store", weight=(weights, ("time",))), Weighted("weight")),
        (url, None),
        (url, Stratified("region")),
    ):
        with data_module(changed, sampling=sampling) as other:
            assert other.fingerprint != fingerprint
            other.load_state_dict(state)
            with pytest.raises(IntegrityError, match=f"{fingerprint}, here it is {other.fingerprint}.*sampling: "):
                other.train_dataloader()


def test_only_the_training_split_is_sampled(url: str) -> None:
    with data_module(url, sampling=Weighted("weight"), holdout=Holdout("region", values=(9,))) as module:
        assert not set(epoch_of(module.train_dataloader())) & set(range(40, 50))
        loader = module.val_dataloader()
        assert [s for batch in loader for s in batch["id"][batch["valid"]].tolist()] == list(range(40, 50))


def test_lanes_and_sampling_are_refused_together(url: str) -> None:
    with pytest.raises(InputError, match="no lanes"):
        ZarrDataModule(url, dict(PLAIN.inputs), {}, sampling=Weighted("weight"), lanes=Lanes(2, 2, 2))
