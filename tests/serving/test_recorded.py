"""Golden requests of foreign models: kept whole, and the laws of holding later answers against them."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gpuops.errors import InputError
from gpuops_serving.recorded import (
    Recorded,
    differences,
    example_inputs,
    recorded_in,
    rounding,
    rows,
    says_something,
)
from gpuops_serving.wire import ModelConfig, Tensor

SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
NUMBERS = st.one_of(
    *(
        arrays.arrays(dtype, SHAPES)
        for dtype in (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint64, np.bool_)
    ),
    arrays.arrays(np.float32, SHAPES).map(lambda array: array.astype(ml_dtypes.bfloat16)),
)
TEXT = SHAPES.flatmap(lambda shape: arrays.arrays(object, shape, elements=st.binary(max_size=5)))


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return bool(a.tolist() == b.tolist()) if a.dtype == object else a.tobytes() == b.tobytes()


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text("ab/ ", min_size=1), NUMBERS | TEXT, max_size=3), NUMBERS | TEXT)
def test_what_is_saved_comes_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Any], output: Any
) -> None:
    folder = tmp_path_factory.mktemp("recorded")
    Recorded("a model/..", "12", inputs, {"y": output}, {"y": 0.5}).save(folder)
    (found,) = recorded_in(folder)
    assert (found.model, found.version, found.tolerance) == ("a model/..", "12", {"y": 0.5})
    assert found.inputs.keys() == inputs.keys()
    assert all(same(found.inputs[name], array) for name, array in inputs.items())
    assert same(found.outputs["y"], output)


def test_no_two_models_share_a_folder() -> None:
    names = ["a b", "a_b", "a%20b", "a/b", "..", ".", "a-1"]
    folders = [Recorded(name, version, {}, {}, {}).folder for name in names for version in ("1", "11")]
    assert len(set(folders)) == len(folders)
    assert not any("/" in folder or folder in (".", "..") for folder in folders)


@settings(deadline=None)
@given(NUMBERS | TEXT)
def test_an_answer_differs_from_itself_by_nothing_and_from_no_answer_infinitely(answer: Any) -> None:
    assert differences({"y": answer}, {"y": answer.copy()}) == {"y": 0.0}
    assert differences({"y": answer}, {}) == {"y": float("inf")}
    assert differences({"y": answer}, {"y": answer[None]}) == {"y": float("inf")}
    assert Recorded("m", "1", {}, {"y": answer}, {"y": 0.0}).wrong({"y": answer}) is None


@settings(deadline=None)
@given(NUMBERS, st.data())
def test_one_changed_number_is_a_difference_and_the_same_both_ways(answer: Any, data: st.DataObject) -> None:
    if not answer.size:
        return
    other = answer.copy().reshape(-1)
    place = data.draw(st.integers(0, other.size - 1))
    value = data.draw(st.sampled_from([0, 1, 7]))
    before = other[place]
    other[place] = value
    value = other[place]
    if before == other[place]:
        return
    other = other.reshape(answer.shape)
    (there,), (back,) = (differences({"y": a}, {"y": b}).values() for a, b in ((answer, other), (other, answer)))
    assert there == back
    want = abs(float(before) - float(value)) if np.isfinite(float(before)) else float("inf")
    assert there == pytest.approx(want)


def test_another_type_or_another_word_is_another_answer() -> None:
    large = np.array([2**60], np.int64)
    assert differences({"y": large}, {"y": large + 1}) == {"y": 1.0}
    ones, words = np.ones(2, np.float32), np.array([b"a", b"b"], object)
    assert differences({"y": ones}, {"y": ones.astype(np.float64)}) == {"y": float("inf")}
    assert differences({"y": words}, {"y": np.array([b"a", b"c"], object)}) == {"y": float("inf")}
    assert "y by inf (tolerance 0)" in str(Recorded("m", "1", {}, {"y": words}, {"y": 0.0}).wrong({"y": words[::-1]}))
    nan = np.array([np.nan, 1.0], np.float32)
    assert differences({"y": nan}, {"y": ones}) == differences({"y": ones}, {"y": nan}) == {"y": float("inf")}


def test_tolerance_is_each_outputs_own() -> None:
    outputs = {"large": np.array([1e9], np.float32), "index": np.array([3]), "t": np.array([b"a"], object)}
    found = rounding(outputs)
    assert found["large"] == pytest.approx(1e9 * 2**-23)
    assert found["index"] == found["t"] == 0.0
    recorded = Recorded("m", "1", {}, outputs, {name: 4 * value for name, value in found.items()})
    assert recorded.wrong({**outputs, "large": np.array([1e9 + 64], np.float32)}) is None
    assert "index by 1" in str(recorded.wrong({**outputs, "index": np.array([4])}))
    half = {"h": np.array([100.0, np.inf], np.float16), "b": np.array([100.0], ml_dtypes.bfloat16)}
    assert rounding(half) == {"h": 100 * 2**-10, "b": 100 * 2**-7}


def test_an_answer_without_a_number_says_nothing() -> None:
    assert not says_something({"y": np.array([np.nan, np.inf])})
    assert not says_something({"y": np.zeros((0, 3))})
    assert not says_something({})
    for array in (np.array([np.nan, 0.0]), np.array([0]), np.array([b""], object), np.ones(1, ml_dtypes.bfloat16)):
        assert says_something({"n": np.array([np.nan]), "y": array})


def config(batch: int, *tensors: Tensor) -> ModelConfig:
    return ModelConfig(name="m", max_batch_size=batch, inputs=list(tensors), outputs=[], parameters={}, stateful=False)


def test_made_up_inputs_fit_and_are_the_same_for_the_same_seed() -> None:
    asked = config(
        8,
        Tensor(name="x", dtype="float32", shape=[-1, 3]),
        Tensor(name="i", dtype="int64", shape=[2]),
        Tensor(name="b", dtype="bool", shape=[5]),
        Tensor(name="h", dtype="bfloat16", shape=[2]),
    )
    made, again, other = example_inputs(asked, 4), example_inputs(asked, 4), example_inputs(asked, 4, seed=1)
    assert {name: (a.dtype.name, a.shape) for name, a in made.items()} == {
        "x": ("float32", (4, 1, 3)),
        "i": ("int64", (4, 2)),
        "b": ("bool", (4, 5)),
        "h": ("bfloat16", (4, 2)),
    }
    assert all(same(made[name], again[name]) for name in made)
    assert not same(made["x"], other["x"])
    assert made["i"].min() >= 0
    assert made["i"].max() <= 9
    assert example_inputs({**asked, "max_batch_size": 0}, 4)["x"].shape == (1, 3)
    with pytest.raises(InputError, match="input 's' is TYPE_STRING: give inputs for 'm'"):
        example_inputs(config(1, Tensor(name="s", dtype="TYPE_STRING", shape=[1])), 1)


def test_rows_are_batches_of_one() -> None:
    batch = {"x": np.arange(6).reshape(3, 2), "y": np.arange(3)}
    found = rows(batch)
    assert len(found) == 3
    assert [row["x"].tolist() for row in found] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(row["y"].shape == (1,) for row in found)


def test_a_folder_without_golden_requests_says_how_to_get_them(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match="--record"):
            recorded_in(folder)
