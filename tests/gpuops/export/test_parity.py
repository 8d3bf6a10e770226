"""The sweep finds every way in which a model can answer wrongly, and says how much its "equal" is worth."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.bundle import Golden
from gpuops.errors import InputError, IntegrityError
from gpuops.export.parity import NOT_COMPARED, RTOL, checked, sweep
from gpuops.export.patterns import answered, with_missing
from gpuops.spec import Arrays, Signature, TensorSpec

Infer = Callable[[Arrays], dict[str, npt.NDArray[Any]]]
SIGNATURE = Signature(
    (TensorSpec("a", "uint8", (2, 3, 4), missing=255), TensorSpec("m", "int32", (2,))),
    (TensorSpec("y", "float32", (2, 3, 4)),),
    max_batch=5,
)


def network(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    """0 where a is missing."""
    known = np.where(inputs["a"] == 255, 0, inputs["a"]).astype(np.float32)
    return {"y": known + inputs["m"][:, :, None, None].astype(np.float32)}


def right(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    SIGNATURE.check(inputs)
    return network(inputs)


def _golden() -> Golden:
    generator = np.random.default_rng(0)
    inputs = {
        "a": generator.integers(0, 255, (8, 2, 3, 4), dtype=np.uint8),
        "m": generator.integers(0, 12, (8, 2)).astype(np.int32),
    }
    return Golden(inputs, network(inputs))


GOLDEN = _golden()
MISSING = with_missing(GOLDEN, SIGNATURE)
assert MISSING is not None
PATTERNS = answered(MISSING, network, 5)


def swept(infer: Infer, **options: Any) -> Any:
    return sweep(infer, GOLDEN, SIGNATURE, options.pop("tolerance", 0.0), **{"patterns": PATTERNS, **options})


def test_a_right_model_passes() -> None:
    parity = swept(right)
    assert (parity.max_abs_diff, parity.batches, parity.tolerance) == (0.0, 5, 0.0)
    assert parity.refused == (
        *("batch 0", "dtype", "shape", "layout (channels last)", "missing input", "batch sizes that differ"),
        *("extra input", "batch 6"),
    )
    assert parity.answered == ("strided views", "column-major arrays", "read-only arrays")
    assert parity.missing == dict.fromkeys(("all missing", "checkerboard missing", "first sample missing"), 0.0)
    assert parity.warnings == ()
    assert parity.sqnr_db == {"y": None}
    assert parity.to_json()["refused"] == list(parity.refused)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_model_wrong_at_one_batch_size_is_found(size: int) -> None:
    def wrong(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        answer = right(inputs)["y"]
        return {"y": answer + np.float32(0.5 * (len(answer) == size))}

    with pytest.raises(IntegrityError, match=rf"by 0\.5 at batch {size}, allowed is 1e-05"):
        swept(wrong, tolerance=1e-5)


def test_the_batch_that_is_named_is_one_that_is_beyond_the_tolerance() -> None:
    """A larger difference may be allowed where the answer is large."""

    def wrong(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        SIGNATURE.check(inputs)
        answer = np.full((len(inputs["a"]), 2, 3, 4), 1e6, np.float32)
        answer += np.float32(5.0)
        answer[..., 0] = 0.001 * (len(answer) == 3)
        return {"y": answer}

    outputs = np.full((8, 2, 3, 4), 1e6, np.float32)
    outputs[..., 0] = 0.0
    with pytest.raises(IntegrityError, match="at batch 3"):
        sweep(wrong, Golden(GOLDEN.inputs, {"y": outputs}), SIGNATURE, 1e-5)


ACCEPTS: dict[str, Callable[[Arrays], Any]] = {
    "batch 0": lambda inputs: len(inputs.get("a", [1])) == 0,
    "dtype .*a as int8": lambda inputs: "a" in inputs and inputs["a"].dtype == np.int8,
    "dtype .*a as float32": lambda inputs: "a" in inputs and inputs["a"].dtype == np.float32,
    "dtype .*m as int64": lambda inputs: "m" in inputs and inputs["m"].dtype == np.int64,
    "shape .*a as": lambda inputs: "a" in inputs and inputs["a"].shape[1:] == (4, 3, 4),
    "shape .*m as": lambda inputs: "m" in inputs and inputs["m"].shape[1:] == (4,),
    r"layout \(channels last\) .*a as": lambda inputs: "a" in inputs and inputs["a"].shape[1:] == (3, 4, 2),
    "missing input .*no a": lambda inputs: set(inputs) == {"m"},
    "missing input .*no m": lambda inputs: set(inputs) == {"a"},
    "batch sizes that differ .*m": lambda inputs: len(inputs.get("m", ())) == len(inputs.get("a", ())) + 1,
    "extra input": lambda inputs: len(inputs) == 3,
    "batch 6": lambda inputs: len(inputs.get("a", ())) == 6,
}


@pytest.mark.parametrize("kind", ACCEPTS)
def test_a_model_that_answers_one_kind_of_bad_input_is_found(kind: str) -> None:
    def careless(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        return {} if ACCEPTS[kind](inputs) else right(inputs)

    with pytest.raises(IntegrityError, match=f"wrong {kind}.* was answered instead of refused"):
        swept(careless)


def test_a_client_must_answer_more_than_the_largest_batch_in_parts() -> None:
    def client(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        if len(inputs.get("a", ())) <= 5:
            return right(inputs)
        parts = [right({name: v[at : at + 5] for name, v in inputs.items()}) for at in (0, 5)]
        return {"y": np.concatenate([part["y"] for part in parts])}

    parity = swept(client, splits=True)
    assert "batch 6 in parts" in parity.answered
    assert "batch 6" not in parity.refused
    with pytest.raises(InputError, match="takes 1 to 5"):
        swept(right, splits=True)


@pytest.mark.parametrize("what", ["strided views", "column-major arrays", "read-only arrays"])
def test_a_model_that_reads_memory_as_it_lies_is_found(what: str) -> None:
    def raw(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        a = inputs.get("a")
        if a is not None and a.ndim == 4 and len(a) == 5:
            strided = not a.flags.c_contiguous and not a.flags.f_contiguous
            lies = {
                "strided views": strided,
                "column-major arrays": a.flags.f_contiguous,
                "read-only arrays": not a.flags.writeable,
            }
            if lies[what]:
                return {"y": right(inputs)["y"] + np.float32(1.0)}
        return right(inputs)

    with pytest.raises(IntegrityError, match=f"{what}: answers differ"):
        swept(raw)


@given(exponent=st.integers(-3, 6), sign=st.sampled_from([-1, 1]), side=st.sampled_from([0.5, 1.5]))
def test_what_passes_is_the_tolerance_and_a_share_of_the_answer(exponent: int, sign: int, side: float) -> None:
    value = np.float32(sign * 10.0**exponent)
    allowed = 0.01 + RTOL["float32"] * abs(float(value))
    want = Golden({"x": np.zeros((1, 1), np.uint8)}, {"y": np.array([[value]])})
    got = (np.float64(value) + side * allowed).astype(np.float32)

    def infer(_: Arrays) -> dict[str, npt.NDArray[Any]]:
        return {"y": np.array([[got]])}

    if side < 1:
        assert checked("it", want, infer, 0.01) == pytest.approx(side * allowed, rel=0.1)
    else:
        with pytest.raises(IntegrityError, match="it: answers differ"):
            checked("it", want, infer, 0.01)


@pytest.mark.parametrize(
    ("want", "got", "passes"),
    [
        ([1.0, np.nan], [1.0, np.nan], True),
        ([1.0, np.nan], [1.0, 1.0], False),
        ([1.0, 2.0], [1.0, np.nan], False),
        ([np.inf, -np.inf], [np.inf, -np.inf], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.inf, 1.0], [np.nan, 1.0], False),
        ([np.inf, 1.0], [3e38, 1.0], False),
    ],
)
def test_nan_and_infinity_must_stand_on_both_sides(want: list[float], got: list[float], passes: bool) -> None:
    golden = Golden({"x": np.zeros((1, 1), np.uint8)}, {"y": np.array([want], np.float32)})

    def infer(_: Arrays) -> dict[str, npt.NDArray[Any]]:
        return {"y": np.array([got], np.float32)}

    if passes:
        assert checked("it", golden, infer, 1e30) == 0.0
    else:
        with pytest.raises(IntegrityError, match="inf"):
            checked("it", golden, infer, 1e30)


@pytest.mark.parametrize("answer", [{}, {"y": np.zeros((1, 3), np.float32)}, {"y": np.zeros((1, 2), np.float64)}])
def test_an_absent_output_another_shape_or_dtype_is_no_answer(answer: dict[str, npt.NDArray[Any]]) -> None:
    golden = Golden({"x": np.zeros((1, 1), np.uint8)}, {"y": np.zeros((1, 2), np.float32)})
    with pytest.raises(IntegrityError, match="inf"):
        checked("it", golden, lambda _: answer, 1.0)


def test_noise_is_measured_against_what_varies_and_not_against_the_offset() -> None:
    """At 300 K, 1 K of noise is 50 dB below the answers, and a tenth of what a forecast is about."""
    generator = np.random.default_rng(0)
    want = generator.normal(300, 10, (8, 2, 3, 4)).astype(np.float32)
    noise = generator.normal(0, 1, want.shape).astype(np.float32)
    table = dict(zip((array.tobytes() for array in GOLDEN.inputs["a"]), want + noise, strict=True))

    def noisy(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        SIGNATURE.check(inputs)
        return {"y": np.stack([table[array.tobytes()] for array in inputs["a"]])}

    parity = sweep(noisy, Golden(GOLDEN.inputs, {"y": want}), _without_missing(), 10.0)
    assert parity.sqnr_db["y"] == pytest.approx(20.0, abs=1.5)
    assert parity.diversity["y"] == pytest.approx(10.0, rel=0.2)
    assert parity.warnings == ("y: answers differ by more than 10% of what differs between samples",)
    assert parity.missing is None


def test_golden_answers_that_are_all_the_same_carry_a_warning() -> None:
    same = Golden(GOLDEN.inputs, {"y": np.ones((8, 2, 3, 4), np.float32)})

    def constant(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        SIGNATURE.check(inputs)
        return {"y": np.ones((len(inputs["a"]), 2, 3, 4), np.float32)}

    parity = sweep(constant, same, _without_missing(), 0.0)
    assert parity.warnings == ("y: all golden answers are the same, so equal answers prove little",)
    assert parity.diversity == {"y": 0.0}


def test_missing_values_that_are_answered_wrongly_are_found() -> None:
    def forgets(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        SIGNATURE.check(inputs)
        return {"y": inputs["a"].astype(np.float32) + inputs["m"][:, :, None, None].astype(np.float32)}

    with pytest.raises(IntegrityError, match="all missing: answers differ from the training graph's by 255"):
        swept(forgets)
    assert swept(forgets, missing_tolerance=255.0).missing["all missing"] == 255.0


def test_a_missing_sample_must_not_spill_over_to_the_next() -> None:
    def spills(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        answer = right(inputs)["y"]
        lost = (inputs["a"] == 255).all(axis=(1, 2, 3))
        if lost.any() and not lost.all():
            answer = answer + np.float32(1.0)
        return {"y": answer}

    with pytest.raises(IntegrityError, match="first sample missing"):
        swept(spills)


def test_nan_that_nobody_declared_is_a_warning() -> None:
    signature = Signature((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),), max_batch=3)
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    golden = Golden({"x": x}, {"y": x})
    lacking = with_missing(golden, signature)
    assert lacking is not None
    patterns = answered(lacking, lambda inputs: {"y": inputs["x"]}, 3)

    def infer(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        signature.check(inputs)
        return {"y": np.nan_to_num(inputs["x"])}

    parity = sweep(infer, golden, signature, 0.0, patterns=patterns)
    assert parity.missing == dict.fromkeys(("all missing", "checkerboard missing", "first sample missing"))
    assert len(parity.warnings) == 3
    assert "fill NaN in `preprocess` if it can occur" in parity.warnings[0]


def test_without_recorded_answers_missing_values_are_only_tried() -> None:
    assert swept(right, patterns=None).missing == NOT_COMPARED

    def fails(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        if "a" in inputs and (inputs["a"] == 255).all():
            raise IntegrityError("an index out of range")
        return right(inputs)

    with pytest.raises(IntegrityError, match="out of range"):
        swept(fails, patterns=None)


def test_progress_is_told_of_every_batch_size() -> None:
    told: list[tuple[int, int]] = []
    swept(right, progress=lambda done, whole: told.append((done, whole)))
    assert told == [(size, 5) for size in range(1, 6)]


def _without_missing() -> Signature:
    a, m = SIGNATURE.inputs
    return Signature((TensorSpec(a.name, a.dtype, a.shape), m), SIGNATURE.outputs, SIGNATURE.max_batch)
