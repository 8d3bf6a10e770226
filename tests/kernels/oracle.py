"""What the epilogue of every op must compute, in numpy float64, with an error bound counted in roundings.

numpy only on purpose: an oracle that shared torch's or Triton's arithmetic would share their mistakes.
"""

from dataclasses import dataclass

import numpy as np
import torch

# Significand bits, smallest normal exponent, and the magnitude from which round-to-nearest gives infinity.
FORMATS = {
    torch.float32: (24, -126, 2.0**128 - 2.0**103),
    torch.bfloat16: (8, -126, 2.0**128 - 2.0**119),
    torch.float16: (11, -14, 65520.0),
}

# One bit pattern a format that no computation here produces (a NaN with a payload): finds elements never written.
POISON = {torch.float32: 0x7FABCDEF, torch.bfloat16: 0x7FAB, torch.float16: 0x7EAB}


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of one call, on the CPU."""

    x: torch.Tensor
    coefficients: torch.Tensor
    missing: torch.Tensor
    functions: str = ""

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.coefficients, self.missing


def make_case(shape: tuple[int, ...], dtype: torch.dtype, seed: int, functions: str = "") -> Case:
    """Random numbers of every size, the extremes of `dtype`, missing values, open and closed clips, wild fills."""
    rng = np.random.default_rng(seed)
    channels = shape[1]
    numpy_dtype = np.dtype(str(dtype).removeprefix("torch."))
    if dtype == torch.float32:
        x = rng.normal(size=shape) * 10.0 ** rng.integers(-40, 36, size=shape)
        extremes = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4028235e38, -3.4028235e38])
        value = rng.integers(-5, 5, size=channels)
    else:
        info = np.iinfo(numpy_dtype)
        low, high = int(info.min), int(info.max)
        x = rng.integers(low, high, size=shape, endpoint=True)
        # Neighbours of the extremes and of 2**24: equal to them in float32, not missing.
        extremes = np.array([low, low + 1, high, high - 1, 0, min(high, 2**24), min(high, 2**24 + 1)])
        # -1 and 65536 do not fit every dtype: then nothing is missing.
        value = rng.choice([low, high, 0, min(high, 2**24), -1, 65536], size=channels)
    x = np.where(rng.random(shape) < 0.4, rng.choice(extremes, size=shape), x)
    with np.errstate(over="ignore"):
        x = x.astype(numpy_dtype)
    missing = np.stack([value, rng.integers(0, 2, size=channels) * rng.choice([1, -7], size=channels)])
    rows = []
    for stage in range(len(functions.split(",")) + 1 if functions else 1):
        sizes = ((-12, 4), (-3, 5)) if stage == 0 else ((-2, 3), (-2, 2))
        a, b = (rng.normal(size=channels) * 10.0 ** rng.integers(*size, size=channels) for size in sizes)
        lo = np.where(rng.random(channels) < 0.5, -np.inf, rng.normal(size=channels) - 3.0)
        hi = np.where(rng.random(channels) < 0.5, np.inf, rng.normal(size=channels) + 3.0)
        kind = [] if stage == 0 else [rng.integers(0, 3, size=channels)]
        rows += [*kind, a, b, np.minimum(lo, hi), np.maximum(lo, hi)]
    fill = rng.choice([0.0, -9.25, 1e30, np.nan, np.inf], size=channels)
    absent = rng.choice([np.nan, 0.0, np.inf, 3.4028235e38, 1e-45], size=channels)
    return Case(
        torch.from_numpy(x).reshape(shape),
        torch.from_numpy(np.stack([*rows, fill, absent]).astype(np.float32)),
        torch.from_numpy(missing.astype(np.int32)),
        functions,
    )


def unit(magnitude: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The unit in the last place of `dtype` at `magnitude`."""
    bits, smallest, _ = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(magnitude))
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - (bits - 1))


FUNCTION_ERROR = 2.0**-21
"""What a logarithm or asinh may be wrong by: absolute up to 1, relative above."""


def is_missing_in(case: Case) -> np.ndarray:
    """Where the stored numbers are missing."""
    x = case.x.numpy()
    per_channel = (x.shape[1],) + (1,) * (x.ndim - 2)
    value, flag = (row.reshape(per_channel).astype(np.int64) for row in case.missing.numpy())
    absent = case.coefficients[-1].numpy().reshape(per_channel)
    return (np.isnan(x) | (x == absent) if x.dtype == np.float32 else x.astype(np.int64) == value) & (flag != 0)


def expected(case: Case, *, exact_fma: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(result before it is rounded to its dtype, what it may be wrong by, where it may be anything), float64.

    An error goes on as it is stretched by a slope and a scale; anything is right where a logarithm is taken of what
    may be negative or positive.
    """
    x = case.x.numpy()
    per_channel = (x.shape[1],) + (1,) * (x.ndim - 2)
    rows = [row.reshape(per_channel).astype(np.float64) for row in case.coefficients.numpy()]
    is_missing = is_missing_in(case)
    with np.errstate(all="ignore"):
        v, error, anything = x.astype(np.float32).astype(np.float64), np.zeros(x.shape), np.zeros(x.shape, bool)
        for stage, name in enumerate(["", *case.functions.split(",")] if case.functions else [""]):
            if name:
                kind = {"log": np.ones(1), "asinh": np.full(1, 2), "each": rows[5 * stage - 1]}[name]
                anything |= (kind == 1) & (np.abs(v) <= error) & (error > 0)
                slope = np.select([kind == 1], [np.where(v > error, 1 / (v - error), 0.0)], 1.0)
                v = np.select([kind == 1, kind == 2], [np.log(v), np.arcsinh(v)], v)
                own = FUNCTION_ERROR * np.fmax(1.0, np.abs(np.where(np.isinf(v), 0.0, v)))
                error = error * slope + np.where(kind > 0, own, 0.0)
            a, b, lo, hi = rows[5 * stage : 5 * stage + 4]
            product = a * v  # exact in the first stage: 48 bits
            total = product + b
            total = np.where(np.abs(total) >= FORMATS[torch.float32][2], np.copysign(np.inf, total), total)
            error = np.abs(a) * error
            error = error + unit(np.abs(np.where(np.isfinite(total), total, 0.0)) + error, torch.float32) / 2
            if not exact_fma:
                error = error + unit(product, torch.float32) / 2
            v = np.clip(total, lo, hi)
    want = np.where(is_missing, rows[-2], v)
    return want, np.where(is_missing, 0.0, error), anything & ~is_missing


def roundings(got: torch.Tensor, case: Case, *, exact_fma: bool) -> float:
    """The largest error of `got` as a share of what the op's roundings can add up to: right if at most 1.

    Half a unit of a * x (unless the multiply-add rounds once), half a unit of the sum, half a unit of a 16-bit result.
    NaN and infinity must be in the right places; AssertionError if not.
    """
    want, allowed, anything = expected(case, exact_fma=exact_fma)
    return worst(got, want, allowed, anything)


def worst(got: torch.Tensor, want: np.ndarray, allowed: np.ndarray, anything: np.ndarray) -> float:
    """The largest error of `got` as a share of what is allowed before it is rounded to its dtype."""
    overflow = FORMATS[got.dtype][2]
    result = got.to(torch.float64).numpy()
    assert result.shape == want.shape
    result, want = (np.where(anything, 0.0, values) for values in (result, want))
    with np.errstate(all="ignore"):
        error = np.abs(np.clip(result, -overflow, overflow) - np.clip(want, -overflow, overflow))
        # A result may be rounded up into the next binade, whose unit is then the one that counts.
        if got.dtype != torch.float32:
            allowed = allowed + unit(np.fmax(np.abs(want), np.abs(result)), got.dtype) / 2

    np.testing.assert_array_equal(np.isnan(result), np.isnan(want), err_msg="NaN where none belongs, or the reverse")
    must_overflow = np.isinf(want) | (np.abs(want) >= overflow + allowed)
    np.testing.assert_array_equal(result[must_overflow], np.copysign(np.inf, want[must_overflow]), err_msg="overflow")
    wrong = ~np.isnan(want) & ~must_overflow & (error > 0)
    with np.errstate(over="ignore"):
        ratio = error[wrong] / np.maximum(allowed[wrong], 5e-324)
    return float(ratio.max(initial=0.0)) * (1 - 2.0**-26)  # float64 rounds the exact sum once itself


def assert_nearest_even(narrow: torch.Tensor, wide: torch.Tensor) -> None:
    """`narrow` (bfloat16) is `wide` (float32) rounded to nearest, ties to even; NaN is NaN whatever its payload.

    By comparing distances, not by the carry trick that the kernel uses in the interpreter.
    """
    bits = wide.view(torch.int32).numpy().view(np.uint32).astype(np.int64)
    below, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (below % 2 == 1))
    nan = wide.isnan().numpy()
    np.testing.assert_array_equal(narrow.isnan().numpy(), nan)
    np.testing.assert_array_equal(narrow.view(torch.int16).numpy().view(np.uint16)[~nan], (below + up)[~nan])


def integers(values: torch.Tensor) -> torch.Tensor:
    """The bits of a floating-point tensor, for comparisons in which NaN equals NaN."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A tensor of POISON, for a kernel to write on."""
    return torch.full(shape, POISON[dtype], dtype=integers(torch.empty(0, dtype=dtype)).dtype, device=device).view(
        dtype
    )


def unwritten(values: torch.Tensor) -> int:
    """How many elements still hold POISON."""
    return int((integers(values) == POISON[values.dtype]).sum())
