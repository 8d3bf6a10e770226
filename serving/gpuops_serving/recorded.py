"""Golden requests of models that we did not build: what a live model answers now is what it must answer later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from gpuops.errors import InputError
from gpuops.spec import Arrays
from gpuops_serving.wire import ModelConfig

_ARRAYS, _ABOUT = "recorded.npz", "recorded.json"
_INTEGERS = 10
"""Random integers are below this, so that they may be indices."""
_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Rounding of an answer's type; float32's for every other float, as float64 is often widened float32."""
_FLOAT32_EPSILON = 2.0**-23


@dataclass(frozen=True, slots=True)
class Recorded:
    """A golden request recorded from a live model."""

    model: str
    """Model name."""
    version: str
    """Version number."""
    inputs: dict[str, npt.NDArray[Any]]
    """What is asked; text as object arrays of bytes."""
    outputs: dict[str, npt.NDArray[Any]]
    """What was answered."""
    tolerance: dict[str, float]
    """Largest absolute difference that passes, by output; 0 for integers and text that did not vary."""

    @property
    def folder(self) -> str:
        """Name of its folder, of no other model's."""
        return f"{quote(self.model, safe='')}-{self.version}"

    def wrong(self, answers: Arrays) -> str | None:
        """What is wrong with later answers, or None."""
        found = differences(self.outputs, answers)
        bad = [
            f"{name} by {found[name]:g} (tolerance {self.tolerance[name]:g})"
            for name in found
            if not found[name] <= self.tolerance[name]
        ]
        return f"answers otherwise than recorded: {', '.join(bad)}" if bad else None

    def save(self, parent: Path) -> None:
        """Write a folder of its own."""
        folder = parent / self.folder
        folder.mkdir()
        stored = {
            f"{side}/{name}": _packed(array)
            for side, arrays in (("input", self.inputs), ("output", self.outputs))
            for name, array in arrays.items()
        }
        np.savez(folder / _ARRAYS, **stored)  # type: ignore[arg-type]
        about = {
            "model": self.model,
            "version": self.version,
            "tolerance": self.tolerance,
            "types": {
                f"{side}/{name}": [array.dtype.name, list(array.shape)]
                for side, arrays in (("input", self.inputs), ("output", self.outputs))
                for name, array in arrays.items()
            },
        }
        (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Recorded:
        """Inverse of `save`; InputError if it is not there or not whole."""
        try:
            about = json.loads((folder / _ABOUT).read_text())
            sides: dict[str, dict[str, Any]] = {"input": {}, "output": {}}
            with (folder / _ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                for key, (dtype, shape) in about["types"].items():
                    side, name = key.split("/", 1)
                    sides[side][name] = _unpacked(stored[key], dtype, shape)
            return cls(about["model"], about["version"], sides["input"], sides["output"], about["tolerance"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise InputError(f"{folder} holds no golden request ({error}): record it again") from error


def recorded_in(folder: Path) -> list[Recorded]:
    """All golden requests of a folder, by model and version.

    Raises:
        InputError: there is none, or one is not whole.
    """
    places = sorted(folder.glob(f"*/{_ABOUT}"))
    if not places:
        raise InputError(f"{folder} holds no golden request: record them while the answers are trusted (--record)")
    return sorted((Recorded.load(place.parent) for place in places), key=lambda r: (r.model, int(r.version)))


def differences(want: Arrays, got: Arrays) -> dict[str, float]:
    """Largest absolute difference by output; infinite where one is missing, of another shape or type, or no number."""
    return {name: _difference(array, got.get(name)) for name, array in want.items()}


def rounding(outputs: Arrays) -> dict[str, float]:
    """One rounding at the largest number of each output; 0 for integers and text."""
    found = {}
    for name, array in outputs.items():
        numbers = np.abs(array.astype(np.float64)) if _is_float(array) else np.zeros(0)
        largest = float(numbers[np.isfinite(numbers)].max(initial=0.0))
        found[name] = largest * _EPSILON.get(array.dtype.name, _FLOAT32_EPSILON)
    return found


def says_something(outputs: Arrays) -> bool:
    """Whether an answer holds anything that a later one can be held against: a number, or text."""
    return any(
        array.size and (not _is_float(array) or np.isfinite(array.astype(np.float64)).any())
        for array in outputs.values()
    )


def example_inputs(config: ModelConfig, count: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random inputs that fit a model's configuration, the same for the same seed.

    Integers are 0 to 9, so that they may be indices; floats are standard normal; a free dimension is 1.

    Args:
        config: The model's configuration.
        count: Samples, for a model with a batch axis.
        seed: Of the random numbers.

    Raises:
        InputError: an input is text, which nothing can be made up for.
    """
    draw = np.random.default_rng(seed)
    made: dict[str, npt.NDArray[Any]] = {}
    for tensor in config["inputs"]:
        if tensor["dtype"].startswith("TYPE_"):
            raise InputError(f"input {tensor['name']!r} is {tensor['dtype']}: give inputs for {config['name']!r}")
        shape = [max(d, 1) for d in tensor["shape"]]
        shape = [count, *shape] if config["max_batch_size"] else shape
        dtype = np.dtype(tensor["dtype"])
        if dtype.kind in "iub":
            made[tensor["name"]] = draw.integers(0, 2 if dtype.kind == "b" else _INTEGERS, shape).astype(dtype)
        else:
            made[tensor["name"]] = draw.standard_normal(shape).astype(dtype)
    return made


def read_inputs(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a model from an .npz of arrays by input name; text becomes UTF-8.

    Raises:
        InputError: it is no such file.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no arrays ({error}): write numpy.savez(file, <input name>=array)") from error
    return {name: np.strings.encode(a, "utf-8") if a.dtype.kind == "U" else a for name, a in found.items()}


def rows(inputs: Mapping[str, npt.NDArray[Any]]) -> list[Arrays]:
    """The samples of a batch, each a batch of one."""
    count = len(next(iter(inputs.values())))
    return [{name: array[k : k + 1] for name, array in inputs.items()} for k in range(count)]


def _difference(want: npt.NDArray[Any], got: npt.NDArray[Any] | None) -> float:
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.dtype == np.object_:
        return 0.0 if np.array_equal(want, got) else float("inf")
    a, b = want.astype(np.float64), got.astype(np.float64)
    same = (want == got) | (np.isnan(a) & np.isnan(b))  # infinities too
    least = 1.0 if want.dtype.kind in "iu" else 0.0  # beyond 2^53 float64 does not tell neighbours apart
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.maximum(np.abs(a - b), least))
    return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _is_float(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _packed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array as npz can hold it without pickling: text and bfloat16 as their bytes."""
    if array.dtype == np.object_:
        text = serialize_byte_tensor(array)
        return np.frombuffer(text.item() if text.size else b"", np.uint8)
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _unpacked(stored: npt.NDArray[Any], dtype: str, shape: list[int]) -> npt.NDArray[Any]:
    """Inverse of `_packed`."""
    if dtype == "object":
        return np.asarray(deserialize_bytes_tensor(stored.tobytes()).reshape(shape))
    return stored.view(np.dtype(dtype)) if dtype == "bfloat16" else stored
