"""Where a sample's values are taken from: crops, mirrors and turns, as rows of the table that the window kernel reads.

A resize is a step of its own behind them.

Random steps are drawn on the host, from the sample's id and nothing else that varies (see `gpuops.preprocess.philox`),
so that inputs and targets of a sample are cut alike. Every random step has a twin that evaluation and serving use.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError
from gpuops.preprocess.philox import below, draw

AXES = ("x", "y", "z")
"""Names of the spatial axes, the last one first."""


@dataclass(frozen=True, slots=True)
class CenterCrop:
    """The middle of the last axes; an odd element that is left over lies behind."""

    step: ClassVar[str] = "center_crop"
    size: tuple[int, ...]
    """Elements along each of the last two or three axes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))


@dataclass(frozen=True, slots=True)
class RandomCrop:
    """A part of the last axes that lies anywhere inside; its twin is `CenterCrop`."""

    step: ClassVar[str] = "random_crop"
    size: tuple[int, ...]
    """Elements along each of the last two or three axes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))


@dataclass(frozen=True, slots=True)
class RandomFlip:
    """Each axis is mirrored with probability p, independently; its twin changes nothing."""

    step: ClassVar[str] = "random_flip"
    axes: tuple[str, ...] = ("x",)
    """Names from `AXES`: "x" is the last axis."""
    p: float = 0.5
    """Probability."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        if not self.axes or not set(self.axes) <= set(AXES) or not 0 <= self.p <= 1:
            raise InputError(f"flip {self.axes} with probability {self.p}: name axes of x, y, z, and 0 <= p <= 1")


@dataclass(frozen=True, slots=True)
class RandomTurn:
    """0, 1, 2 or 3 quarter turns of the last two axes, which must be equally long; its twin changes nothing."""

    step: ClassVar[str] = "random_turn"


@dataclass(frozen=True, slots=True)
class Resize:
    """Resample the last two axes, after everything else; evaluation does as well."""

    step: ClassVar[str] = "resize"
    size: tuple[int, int]
    """Height and width."""
    method: Literal["bilinear", "bicubic", "area"] = "bilinear"
    """The first two antialiased as in torch, or the exact share of each cell."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))
        if len(self.size) != 2 or self.method not in ("bilinear", "bicubic", "area"):
            raise InputError(f"resize to {self.size} by {self.method!r}: give two sizes; bilinear, bicubic or area")


GeometryStep = CenterCrop | RandomCrop | RandomFlip | RandomTurn | Resize
STEPS: dict[str, type[GeometryStep]] = {k.step: k for k in (CenterCrop, RandomCrop, RandomFlip, RandomTurn, Resize)}
_ORDER: tuple[type[GeometryStep], ...] = (CenterCrop, RandomCrop, RandomFlip, RandomTurn, Resize)


@dataclass(frozen=True, slots=True)
class Augment:
    """What training does to a sample at random, alike to its inputs and targets."""

    crop: tuple[int, ...] | None = None
    """Elements along the last two or three axes, anywhere in the sample; evaluation takes the middle."""
    flip: tuple[str, ...] = ()
    """Axes that are mirrored, each every other time: "x" is the last one, "y" that before it, "z" before that."""
    turn: bool = False
    """Turn the last two axes by a random number of quarter turns."""

    def steps(self) -> tuple[GeometryStep, ...]:
        """The steps, in the order in which the kernel takes them."""
        crop = () if self.crop is None else (RandomCrop(tuple(self.crop)),)
        flip = (RandomFlip(tuple(self.flip)),) if self.flip else ()
        return (*crop, *flip, *((RandomTurn(),) if self.turn else ()))


def check_order(steps: Sequence[GeometryStep]) -> None:
    """Raise InputError unless the steps are a crop, a flip, a turn and a resize, each at most once, in that order."""
    ranks = [max(_ORDER.index(type(step)), 1) for step in steps]
    if ranks != sorted(set(ranks)):
        names = ", ".join(step.step for step in steps)
        raise InputError(f"geometry {names}: declare at most one crop, flip, turn and resize each, in that order")


def twins(steps: Sequence[GeometryStep]) -> tuple[GeometryStep, ...]:
    """What evaluation does in place of random steps."""
    kept = (CenterCrop(step.size) if isinstance(step, RandomCrop) else step for step in steps)
    return tuple(step for step in kept if isinstance(step, CenterCrop | Resize))


def out_shape(steps: Sequence[GeometryStep], spatial: Sequence[int]) -> tuple[int, ...]:
    """Spatial shape after all steps; errors as `window_shape`."""
    shape = window_shape(steps, spatial)
    last = steps[-1] if steps else None
    return (*shape[:-2], *last.size) if isinstance(last, Resize) else shape


def window_shape(steps: Sequence[GeometryStep], spatial: Sequence[int]) -> tuple[int, ...]:
    """Spatial shape of what is gathered: after all steps but a resize.

    Raises:
        InputError: a crop that does not fit, or a turn of unequal axes.
    """
    shape = tuple(spatial)
    for step in steps:
        if isinstance(step, CenterCrop | RandomCrop):
            whole = shape[len(shape) - len(step.size) :]
            if len(step.size) > len(shape) or any(s > w for s, w in zip(step.size, whole, strict=True)):
                raise InputError(f"a crop of {step.size} does not fit in samples of {shape}: make it smaller")
            shape = (*shape[: len(shape) - len(step.size)], *step.size)
        elif isinstance(step, RandomFlip) and len(shape) < 3 and "z" in step.axes:
            raise InputError(f"samples of {shape} have no axis z to mirror: leave it out")
        elif isinstance(step, RandomTurn) and shape[-1] != shape[-2]:
            raise InputError(f"samples of {shape} cannot be turned by 90 degrees: crop them to a square first")
    return shape


def table(
    steps: Sequence[GeometryStep], ids: npt.NDArray[np.int64], seed: int, epoch: int, spatial: Sequence[int]
) -> npt.NDArray[np.int32]:
    """What the window kernel reads, one row a sample.

    Args:
        steps: the steps, see `check_order`.
        ids: sample ids, int64 [n].
        seed: the run's seed.
        epoch: epoch, from 0.
        spatial: spatial shape of a sample, two or three axes.

    Returns:
        int32 [n, axes + 3]: the sample's place in the batch, first element along each axis, flip, rot.

    Raises:
        InputError: see `window_shape`.
    """
    out = window_shape(steps, spatial)
    axes = len(spatial)
    rows = np.zeros((len(ids), axes + 3), np.int64)
    rows[:, 0] = np.arange(len(ids))
    room = [whole - length for whole, length in zip(spatial, out, strict=True)]
    if not steps:
        return rows.astype(np.int32)
    # All steps in one go: a call costs as much for three steps as for one.
    drawn = draw(np.tile(ids, len(steps)), seed, epoch, np.repeat(np.arange(len(steps)), len(ids)))
    for step, words in zip(steps, np.split(drawn, len(steps), axis=1), strict=True):
        match step:
            case CenterCrop():
                rows[:, 1 : axes + 1] = [left // 2 for left in room]
            case RandomCrop():
                for axis, left in enumerate(room):
                    rows[:, 1 + axis] = below(words[axis], left + 1)
            case RandomFlip():
                for name in step.axes:
                    place = AXES.index(name)
                    rows[:, -2] |= (words[place] < np.uint64(round(step.p * 2**32))).astype(np.int64) << place
            case RandomTurn():
                rows[:, -1] = below(words[0], 4)
    return rows.astype(np.int32)


def _size(size: Sequence[int]) -> tuple[int, ...]:
    """A size as a tuple of Python integers, checked."""
    try:
        found = tuple(operator.index(length) for length in size)
    except TypeError:
        found = ()
    if len(found) not in (2, 3) or min(found) < 1:
        raise InputError(f"a crop or resize to {size}: give two or three sizes, each at least 1")
    return found
