"""Which variables of a file, store or data set are ingested without a recipe, and which of them are static fields."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpuops.errors import InputError

_log = logging.getLogger(__name__)

Form = tuple[tuple[str, ...], tuple[int, ...]]
"""Dimensions and shape."""


def chosen(
    where: str, arrays: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], np.dtype[Any]]]
) -> tuple[list[str], list[str]]:
    """Names of the variables to ingest and of the static fields, out of (dimensions, shape, dtype) of all there are.

    Raises:
        InputError: there is no variable of numbers.
    """
    usable = {
        name: (dims, shape)
        for name, (dims, shape, dtype) in arrays.items()
        if dims and dtype.kind in "iufb" and dims != (name,) and 0 not in shape
    }
    if not usable:
        raise InputError(f"{where} has no variable of numbers to ingest: write a recipe (`gpuops demo --recipe DIR`)")
    moving, static, axis = divide(usable)
    if left_out := sorted(usable.keys() - {*moving, *static}):
        _log.warning("left out, because they lie neither on %r nor inside its records: %s", axis, ", ".join(left_out))
    if odd := [f"{n} ({d})" for n, (dims, _, d) in sorted(arrays.items()) if n not in usable and dims != (n,)]:
        _log.warning("left out, because they hold no array of numbers: %s", ", ".join(odd))
    return moving, static


def divide(forms: Mapping[str, Form]) -> tuple[list[str], list[str], str]:
    """Names of the variables with the sample axis, names of the static ones, and the sample axis.

    The sample axis is the first one of the largest variable; static is what has only dimensions behind it. A variable
    that is neither is in no list.
    """
    axis = max(forms.values(), key=lambda form: int(np.prod(form[1])))[0][0]
    moving = {name: form for name, form in forms.items() if form[0][0] == axis}
    inner = {pair for dims, shape in moving.values() for pair in zip(dims[1:], shape[1:], strict=True)}
    static = [n for n, form in forms.items() if n not in moving and set(zip(*form, strict=True)) <= inner]
    return list(moving), static, axis
