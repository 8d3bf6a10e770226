import json

import numpy as np
import pytest

from gpuops.errors import InputError
from gpuops.spec import DTYPES, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec("a", "uint8", (3, 4), "m", 28.0, -450.0, 255), TensorSpec("m", "int32", (1,))),
    outputs=(TensorSpec("y", "float32", (1, 4)),),
    max_batch=4,
)


def batch(size: int) -> dict[str, np.ndarray]:
    return {"a": np.zeros((size, 3, 4), np.uint8), "m": np.zeros((size, 1), np.int32)}


def test_json_round_trip() -> None:
    assert Signature.from_json(json.loads(json.dumps(SIGNATURE.to_json()))) == SIGNATURE


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_served_batch_is_accepted(size: int) -> None:
    assert SIGNATURE.check(batch(size)) == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros((2, 3, 4), np.float32)}, "send stored values"),
        ({"a": np.zeros((2, 3, 5), np.uint8)}, r"the model takes \[n, 3, 4\]"),
        ({"a": np.zeros((3, 4), np.uint8)}, r"the model takes \[n, 3, 4\]"),
        ({"m": np.zeros((3, 1), np.int32)}, "differ in batch size"),
        ({"other": np.zeros(2)}, "the model takes inputs"),
    ],
)
def test_bad_inputs_are_named(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SIGNATURE.check({**batch(2), **change})


@pytest.mark.parametrize("size", [0, 5])
def test_batches_outside_the_served_range_are_refused(size: int) -> None:
    with pytest.raises(InputError, match="takes 1 to 4"):
        SIGNATURE.check(batch(size))


def test_a_dtype_that_cannot_cross_the_wire_is_refused() -> None:
    assert "float64" not in DTYPES
    with pytest.raises(InputError, match="float64"):
        TensorSpec("x", "float64", (1,))
