"""Which samples calibrate and judge: the training split and the held-out one, as far as the run's record tells."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.data.runs import Runs
from gpuops.errors import InputError
from gpuops.export.graph import Run, load_run
from gpuops.export.samples import batches, drawn, held_out, trained_on
from tests.conftest import Job

MONTHS = 12


@pytest.fixture(scope="module")
def run(trained: Job) -> Run:
    return load_run(trained.run)


def recorded(run: Run, **data: Any) -> Run:
    """The run with another record of its data; a value of None leaves that key out."""
    changed = {key: value for key, value in {**run.record["data"], **data}.items() if value is not None}
    return dataclasses.replace(run, record={**run.record, "data": changed})


def test_the_two_splits_share_no_record_and_leave_none_out(run: Run) -> None:
    held, trained = set(held_out(run)), set(trained_on(run))
    assert held | trained == set(range(run.sample.records * MONTHS))
    assert not held & trained
    assert {sample // MONTHS for sample in held} == set(Runs.from_json(run.record["data"]["held_out_records"]))
    assert len(trained) == run.record["data"]["train_records"] * MONTHS


@given(size=st.integers(1, 10**12), count=st.integers(1, 300))
def test_samples_are_drawn_once_each_and_always_the_same(size: int, count: int) -> None:
    every = Runs.joined(np.array([7]), np.array([7 + size]))
    ids = drawn(every, count)
    assert len(ids) == min(size, count)
    assert (np.diff(ids) > 0).all()
    assert every.contains(ids).all()
    assert np.array_equal(ids, drawn(every, count))


@pytest.mark.parametrize("period", [7, 12, 24, 365])
def test_samples_that_are_drawn_come_from_every_hour_and_month(period: int) -> None:
    ids = drawn(Runs.up_to(255 * period * 10 + 1), 256)
    assert len(np.unique(ids % period)) > period / 3


def test_a_record_that_names_its_training_split_is_believed(run: Run) -> None:
    named = recorded(run, trained_records=[[3, 5]])
    assert trained_on(named).tolist() == list(range(3 * MONTHS, 5 * MONTHS))


def test_a_split_that_the_record_does_not_tell_is_not_guessed(run: Run) -> None:
    """Here a test split took two of the records that were not held out."""
    unknown = recorded(run, trained_records=None, train_records=run.record["data"]["train_records"] - 2)
    with pytest.raises(InputError, match="train it again"):
        trained_on(unknown)


def test_without_a_holdout_every_sample_may_be_golden(run: Run) -> None:
    assert len(held_out(recorded(run, held_out_records=[]))) == run.sample.records * MONTHS


def test_batches_hold_the_samples_in_order(run: Run) -> None:
    ids = held_out(run)[:10]
    slots = list(batches(run, ids, 4))
    assert [len(slot.ids) for slot in slots] == [4, 4, 2]
    assert np.concatenate([slot.ids for slot in slots]).tolist() == ids.tolist()
