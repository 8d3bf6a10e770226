"""Runs as sets and sequences against plain sets; splits that share no record and keep their gap."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpuops.data.runs import Runs
from gpuops.data.sample import BoundSample, SampleSpec
from gpuops.data.split import Holdout, Period, Split, make_split, sample_runs
from gpuops.data.variable import Variable
from gpuops.errors import InputError

SIZE = 40
SETS = st.sets(st.integers(0, SIZE - 1))


def runs(numbers: Any) -> Runs:
    mask = np.zeros(SIZE, bool)
    mask[sorted(numbers)] = True
    return Runs.of_masks([mask[:7], mask[7:25], mask[25:]])


# runs


@settings(max_examples=150, deadline=None)
@given(SETS, SETS, st.integers(0, 5), st.integers(1, 6), st.integers(1, 4))
def test_runs_are_sets(a: set[int], b: set[int], steps: int, length: int, factor: int) -> None:
    one, other = runs(a), runs(b)
    assert one.tolist() == one[:].tolist() == np.asarray(one).tolist() == sorted(a)
    assert len(one) == len(a)
    assert Runs.from_json(json.loads(json.dumps(one.to_json()))).tolist() == sorted(a)
    assert one.contains(np.arange(SIZE)).tolist() == [n in a for n in range(SIZE)]
    assert (one | other).tolist() == sorted(a | b)
    assert (one & other).tolist() == sorted(a & b)
    assert (one - other).tolist() == sorted(a - b)
    near = {n for n in range(SIZE) if any(abs(n - m) <= steps for m in a)}
    assert one.widened(steps, SIZE).tolist() == sorted(near)
    assert one.windows(length).tolist() == sorted(n for n in a if {*range(n, n + length)} <= a)
    assert one.scaled(factor).tolist() == [n * factor + k for n in sorted(a) for k in range(factor)]
    for made in (one | other, one - other, one.widened(steps, SIZE)):
        assert (made.starts[1:] > made.stops[:-1]).all(), "runs that touch are one run"


@settings(max_examples=100, deadline=None)
@given(SETS, st.integers(1, 7))
def test_aligned_runs_begin_with_whole_blocks(numbers: set[int], block: int) -> None:
    made = runs(numbers).aligned(block)
    assert sorted(made) == sorted(numbers)
    whole = [b for b in range(SIZE // block + 1) if {*range(b * block, (b + 1) * block)} <= numbers]
    head = made[: len(whole) * block].tolist()
    assert head == [n for b in whole for n in range(b * block, (b + 1) * block)]
    assert [made[p] for p in range(len(made))] == made.tolist()


def test_a_million_million_numbers_are_a_few_runs() -> None:
    many = Runs.up_to(10**12) - Runs.of(np.array([5, 10**11]), np.array([9, 10**11 + 3]))
    assert len(many) == 10**12 - 7
    assert many.starts.nbytes + many.before.nbytes < 100
    assert many[np.array([0, 5, 10**11, -1])].tolist() == [0, 9, 10**11 + 7, 10**12 - 1]
    assert many[-1] == 10**12 - 1
    assert len(many.aligned(64)) == len(many)
    with pytest.raises(IndexError, match="outside"):
        many[10**12]


# splits


@dataclass
class Records:
    """A source that has labels and a coordinate only."""

    labels: Any
    times: Any = None
    reads: list[slice] = field(default_factory=list)

    def variable(self, name: str) -> Any:
        dims = ("time",)
        array: Any = np.asarray(self.labels)
        return Variable(name, array, dims, 1.0, 0.0, None, None, "1")

    def coordinate(self, dim: str) -> Any:
        assert dim in ("time", "level")
        return np.asarray(self.times)


def bound(records: int, length: int = 1, starts: int = 1, absent: Any = (), steps: Any = None) -> BoundSample:
    return BoundSample(
        SampleSpec({}, {}),
        records,
        starts,
        length,
        {},
        {},
        "time",
        tuple(steps or range(length)),
        np.array(absent, int),
    )


def split(source: Any, **options: Any) -> Split:
    return make_split(source, bound(len(source.labels)), **options)


DAYS = np.datetime64("2020-01-01", "ns") + np.arange(40) * np.timedelta64(1, "D")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=3, max_size=12),
    st.sets(st.integers(0, 5), min_size=1, max_size=2),
    st.sets(st.integers(0, 5), max_size=2),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_no_sample_shares_a_record_with_another_split(
    groups: list[tuple[int, int]], val: set[int], test: set[int], gap: int, length: int, starts: int
) -> None:
    labels = [label for label, length in groups for _ in range(length)]
    source = Records(labels)
    held = {
        "val": Holdout("year", values=tuple(val)),
        "test": Holdout("year", values=tuple(test - val)) if test - val else None,
    }
    try:
        made = split(source, gap=gap, **held)
    except InputError as error:
        assume("to train on" not in str(error))
        raise
    sample = bound(len(labels), length, starts)
    read: dict[str, set[int]] = {}
    for name in ("train", "val", "test"):
        records: Runs = getattr(made, name)
        ids = sample_runs(sample, records)
        assert ids.tolist() == sample.samples(records[:]).tolist()
        first = sample.split_id(ids[:])[0]
        read[name] = {int(r) + step for r in first for step in range(length)}
        assert read[name] <= set(records)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        apart = [abs(a - b) for a in read[one] for b in read[other]]
        assert min(apart, default=gap + 1) > gap
    # Nothing is left out without a reason.
    away = [i for i, label in enumerate(labels) if label in val | (test - val)]
    free = {i for i in range(len(labels)) if all(abs(i - j) > gap for j in away)}
    assert set(made.train) == free


def test_a_share_of_groups_for_validation_and_another_for_test() -> None:
    labels = np.repeat(np.arange(8), 5)
    for seed in range(10):
        alone = split(Records(labels), val=Holdout("g", 0.25), seed=seed)
        made = split(Records(labels), val=Holdout("g", 0.25), test=Holdout("g", 0.25), seed=seed)
        assert made.val.tolist() == alone.val.tolist(), "a test split must not change the validation split"
        groups = [set(labels[part[:]].tolist()) for part in (made.train, made.val, made.test)]
        assert [len(group) for group in groups] == [4, 2, 2]
        assert set.union(*groups) == set(range(8))


def test_periods() -> None:
    source = Records(np.zeros(40), DAYS)
    made = split(source, val=Period("2020-01-21", "2020-01-26"), test=Period("2020-02-01"), gap="3D")
    assert made.val.tolist() == list(range(20, 25))
    assert made.test.tolist() == list(range(31, 40))
    assert made.train.tolist() == [*range(18), 27, 28], "3 days lie between the end of one and the start of the other"
    early = split(source, val=Period("2020-01-21", "2020-01-26"), train=Period(None, "2020-01-11"))
    assert early.train.tolist() == list(range(10))
    assert split(source, val=Period(None, "2020-01-02T00:00:01")).val.tolist() == [0, 1]


def test_periods_of_numbers_in_any_order() -> None:
    depth = np.array([9, 1, 5, 3, 7, 0, 8, 2, 6, 4], np.uint16)
    source = Records(np.zeros(10), depth)
    made = split(source, val=Period(3, 5, by="level"), gap="1.5")
    assert depth[made.val[:]].tolist() == [3, 4]
    assert sorted(depth[made.train[:]].tolist()) == [0, 1, 6, 7, 8, 9]
    year = Records(np.zeros(3), np.array(["2018-06-01", "2019-06-01", "2020-06-01"], "datetime64[ns]"))
    assert split(year, val=Period(2019, 2020)).val.tolist() == [1], "a year in YAML is a number"


def test_absent_records_are_in_no_sample() -> None:
    sample = bound(20, length=3, steps=(0, 2), absent=(4, 11), starts=2)
    made = sample_runs(sample, Runs.up_to(20))
    assert made.tolist() == sample.samples(np.arange(20)).tolist()
    assert {int(i) // 2 for i in made} == set(range(18)) - {4, 2, 11, 9}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val": Holdout("g", values=(9,))}, "leaves 40 to train on, 0 to validate, of 40 records"),
        ({"val": Holdout("g", values=(1,)), "test": Holdout("g", values=(1, 2))}, "both claim record 5"),
        ({"val": Period("2020-01-05", "2020-01-09"), "test": Period("2020-01-08")}, "both claim record 7"),
        ({"val": Period("2020-01-05", "2020-01-09"), "gap": 40}, "leaves 0 to train on"),
        ({"val": Period("2020-01-05"), "gap": -1}, "give 0 or more"),
        ({"val": Period("2020-01-05"), "gap": "10"}, "give records as an int"),
        ({"val": Period("2020-01-05"), "gap": "ten days"}, "give records as an int"),
        ({"val": Period("soon")}, "needs a date such as"),
        ({"val": Period("2030")}, "0 to validate"),
    ],
)
def test_impossible_splits(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        split(Records(np.repeat(np.arange(8), 5), DAYS), **options)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (np.array(["a"] * 5), "no time and no number"),
        (np.array([0, 1, np.nan, 3, 4]), "no time and no number"),
        (np.array(["2020", "NaT", "2021", "2022", "2023"], "datetime64[ns]"), "no time and no number"),
        (np.arange(4.0), "one a record"),
    ],
)
def test_coordinates_that_make_no_periods(times: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        split(Records(np.zeros(5), times), val=Period(1))
