"""Golden samples with values taken out of them, in every way in which an input can say "no data"."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.bundle import Golden
from gpuops.export.patterns import NAMES, SAMPLES, answered, by_name, declared, with_missing
from gpuops.spec import Signature, TensorSpec


def signature(*inputs: TensorSpec) -> Signature:
    return Signature(inputs, (TensorSpec("y", "float32", (1,)),))


def golden(spec: TensorSpec, count: int = 3) -> Golden:
    values = np.arange(1, 1 + count * int(np.prod(spec.shape)))
    x = values.reshape(count, *spec.shape).astype(spec.dtype)
    return Golden({spec.name: x}, {"y": np.zeros((count, 1), np.float32)})


@given(shape=st.lists(st.integers(1, 5), max_size=3).map(tuple), count=st.integers(1, 4))
def test_values_are_lost_where_the_pattern_says_and_nowhere_else(shape: tuple[int, ...], count: int) -> None:
    spec = TensorSpec("x", "int16", shape, missing=-1)
    given_samples = golden(spec, count)
    made = with_missing(given_samples, signature(spec))
    assert made is not None
    whole, checkers, first = np.split(made["x"], len(NAMES))
    kept = given_samples.batch(SAMPLES).inputs["x"]
    assert made["x"].dtype == np.int16
    assert (whole == -1).all()
    odd = np.indices(shape).sum(axis=0) % 2 == 1 if shape else np.array(False)
    assert (checkers == np.where(odd, -1, kept)).all()
    assert (first[0] == -1).all()
    assert (first[1] == kept[1]).all()


def test_a_float_input_lacks_both_nan_and_its_declared_value() -> None:
    spec = TensorSpec("x", "float32", (2, 4), missing=-999.0)
    made = with_missing(golden(spec), signature(spec))
    assert made is not None
    for lost in (made["x"][:SAMPLES].ravel(), made["x"][4]):
        assert np.isnan(lost).any()
        assert (lost == -999.0).any()
        assert (np.isnan(lost) | (lost == -999.0)).all()


def test_a_float_input_that_declares_nothing_lacks_nan() -> None:
    spec = TensorSpec("x", "float32", (4,))
    made = with_missing(golden(spec), signature(spec))
    assert made is not None
    assert np.isnan(made["x"][:SAMPLES]).all()
    assert not declared(signature(spec))
    assert declared(signature(spec, TensorSpec("z", "uint8", (1,), missing=0)))


@pytest.mark.parametrize("missing", [None, -1, 256, 1.5, float("nan"), float("inf")])
def test_what_the_dtype_cannot_hold_cannot_be_missing(missing: float | None) -> None:
    spec = TensorSpec("x", "uint8", (4,), missing=missing)
    assert with_missing(golden(spec), signature(spec)) is None


def test_inputs_without_missing_values_stay_as_they_are() -> None:
    lacking, whole = TensorSpec("x", "uint8", (4,), missing=255), TensorSpec("month", "int32", (1,))
    both = Golden({**golden(lacking).inputs, **golden(whole).inputs}, {})
    made = with_missing(both, signature(lacking, whole))
    assert made is not None
    assert made["month"].ravel().tolist() == [1, 2] * len(NAMES)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_answers_come_in_batches_and_in_order(size: int) -> None:
    asked = []

    def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        asked.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2.0}

    x = np.arange(6.0)[:, None]
    found = answered({"x": x}, infer, size)
    assert max(asked) <= size
    assert (found.outputs["y"] == 2 * x).all()
    assert [name for name, _ in by_name(found)] == list(NAMES)
    assert [part.outputs["y"].ravel().tolist() for _, part in by_name(found)] == [[0, 2], [4, 6], [8, 10]]
