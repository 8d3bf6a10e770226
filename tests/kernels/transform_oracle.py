"""What `gpuops::transform` must compute, in numpy float64, with an error bound counted in roundings.

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

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.coefficients, self.missing


def make_case(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Case:
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
    a = rng.normal(size=channels) * 10.0 ** rng.integers(-12, 4, size=channels)
    b = rng.normal(size=channels) * 10.0 ** rng.integers(-3, 5, size=channels)
    lo = np.where(rng.random(channels) < 0.5, -np.inf, rng.normal(size=channels) - 3.0)
    hi = np.where(rng.random(channels) < 0.5, np.inf, rng.normal(size=channels) + 3.0)
    lo, hi = np.minimum(lo, hi), np.maximum(lo, hi)
    fill = rng.choice([0.0, -9.25, 1e30, np.nan, np.inf], size=channels)
    absent = rng.choice([np.nan, 0.0, np.inf, 3.4028235e38, 1e-45], size=channels)
    return Case(
        torch.from_numpy(x).reshape(shape),
        torch.from_numpy(np.stack([a, b, lo, hi, fill, absent]).astype(np.float32)),
        torch.from_numpy(missing.astype(np.int32)),
    )


def unit(magnitude: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The unit in the last place of `dtype` at `magnitude`."""
    bits, smallest, _ = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(magnitude))
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - (bits - 1))


def roundings(got: torch.Tensor, case: Case, *, exact_fma: bool) -> float:
    """The largest error of `got` as a share of what the op's roundings can add up to: right if at most 1.

    Half a unit of a * x (unless the multiply-add rounds once), half a unit of the sum, half a unit of a 16-bit result.
    NaN and infinity must be in the right places; AssertionError if not.
    """
    x = case.x.numpy()
    per_channel = (x.shape[1],) + (1,) * (x.ndim - 2)
    a, b, lo, hi, fill, absent = (row.reshape(per_channel).astype(np.float64) for row in case.coefficients.numpy())
    value, flag = (row.reshape(per_channel).astype(np.int64) for row in case.missing.numpy())
    is_missing = np.isnan(x) | (x == absent) if x.dtype == np.float32 else x.astype(np.int64) == value
    is_missing &= flag != 0
    overflow = FORMATS[got.dtype][2]
    with np.errstate(all="ignore"):
        product = a * x.astype(np.float32).astype(np.float64)  # exact: 48 bits
        total = product + b
        total = np.where(np.abs(total) >= FORMATS[torch.float32][2], np.copysign(np.inf, total), total)
        want = np.where(is_missing, fill, np.clip(total, lo, hi))
        result = got.to(torch.float64).numpy()
        assert result.shape == want.shape
        error = np.abs(np.clip(result, -overflow, overflow) - np.clip(want, -overflow, overflow))
        # A result may be rounded up into the next binade, whose unit is then the one that counts.
        allowed = unit(np.fmax(np.abs(total), np.abs(result)), torch.float32) / 2
        if not exact_fma:
            allowed = allowed + unit(product, torch.float32) / 2
        allowed = np.where(is_missing, 0.0, allowed)
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
