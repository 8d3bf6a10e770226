"""Drawing samples more or less often: by weight, by stratum, or by whether they contain foreground.

Each is brought to the same form: strata of samples that are drawn alike, and a whole number of draws for each stratum
and epoch (`gpuops.data.order.Strata`). Any draw is found by arithmetic, so that a sampled epoch is resumed and divided
among ranks as any other. What is held in memory is one entry (16 bytes) for each run of neighbours that are drawn
alike; a checkpoint holds none of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpuops.data.foreground import foreground
from gpuops.data.order import Strata
from gpuops.data.runs import Ids, Runs
from gpuops.data.sample import BoundSample
from gpuops.data.source import Source
from gpuops.errors import InputError

BLOCK = 1 << 20
"""Samples labelled at one time."""

Labels = npt.NDArray[np.float64]


@dataclass(frozen=True)  # no slots: jsonargparse reads a default instance through vars()
class Weighted:
    """Samples drawn in proportion to a stored weight."""

    weight: str
    """Variable [records], or [records, positions of the window's dimension]; 0 is never drawn. Weights are rounded to
    8 significant bits (0.4 %), and samples of equal weight are one stratum."""
    at: int = 0
    """Step of the window whose weight counts."""
    draws: int | None = None
    """Draws an epoch; as many as the training split has samples if None."""


@dataclass(frozen=True)
class Stratified:
    """Strata that get declared shares of the draws, whatever their size."""

    stratum: str
    """Variable of labels, shaped as a weight (see `Weighted`)."""
    shares: dict[str, float] | None = None
    """Relative share of each label, written as in "3" or "0.5"; 0 is never drawn. None gives all the same."""
    at: int = 0
    """Step of the window whose label counts."""
    draws: int | None = None
    """Draws an epoch; as many as the training split has samples if None."""


@dataclass(frozen=True)
class Foreground:
    """A declared share of samples that contain foreground."""

    foreground: str
    """Variable on the sample axis (a mask, a label image, rain) whose largest value in a sample's record, or in its
    patch, decides: from the statistics of ingest where they are enough, else it is read once."""
    share: float = 0.5
    """Share of draws that contain foreground, in (0, 1)."""
    above: float = 0.0
    """Physical value that foreground exceeds."""
    at: int = 0
    """Step of a window along the sample axis whose record counts."""
    draws: int | None = None
    """Draws an epoch; as many as the training split has samples if None."""


Sampling = Weighted | Stratified | Foreground


def stratify(source: Source, bound: BoundSample, ids: Runs, sampling: Sampling) -> tuple[Runs, Strata]:
    """Put samples into the order of their strata.

    Args:
        source: an opened source.
        bound: the sample bound to it.
        ids: samples of the training split, ascending.
        sampling: what is declared.

    Returns:
        The ids, stratum after stratum, without those that are never drawn; and the strata.

    Raises:
        InputError: the variable does not fit, holds no usable weights or labels, or a share has no samples.
    """
    if sampling.draws is not None and sampling.draws < 1:
        raise InputError(f"{sampling} draws nothing: give at least 1, or leave `draws` out")
    label = (
        _foreground(source, bound, sampling) if isinstance(sampling, Foreground) else _stored(source, bound, sampling)
    )
    starts, lengths, values = _label_runs(ids, label)
    distinct, which = np.unique(values, return_inverse=True)
    counts = np.bincount(which, weights=lengths, minlength=len(distinct)).astype(np.int64)
    if isinstance(sampling, Weighted):
        shares = distinct * counts
    elif isinstance(sampling, Stratified):
        shares = _declared_shares(sampling, distinct)
    else:
        if len(distinct) < 2:
            found = "all" if len(distinct) and distinct[0] else "none"
            raise InputError(f"{sampling}: {found} of the training split contains foreground: change `above`")
        shares = np.array([1 - sampling.share, sampling.share])
    drawn = shares > 0
    if not drawn.any():
        raise InputError(f"{sampling}: nothing in the training split has a share above 0")
    order = np.argsort(which, kind="stable")
    order = order[drawn[which[order]]]
    members = Runs.joined(starts[order], (starts + lengths)[order])
    shares = shares[drawn] / shares[drawn].sum()
    digest = hashlib.sha256()
    for part in (counts[drawn], shares, members.starts, members.before):
        digest.update(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<")).tobytes())
    return members, Strata(counts[drawn], shares, digest.hexdigest())


def _label_runs(ids: Runs, label: Callable[[Ids], Labels]) -> tuple[Ids, Ids, Labels]:
    """First id, length and label of each run of neighbours with one label."""
    starts, lengths, labels = [], [], []
    for low in range(0, len(ids), BLOCK):
        block = ids[low : low + BLOCK]
        values = label(block)
        first = np.flatnonzero(np.concatenate([[True], (np.diff(values) != 0) | (np.diff(block) != 1)]))
        starts.append(block[first])
        lengths.append(np.diff(np.append(first, len(block))))
        labels.append(values[first])
    return np.concatenate(starts), np.concatenate(lengths), np.concatenate(labels)


def _stored(source: Source, bound: BoundSample, sampling: Weighted | Stratified) -> Callable[[Ids], Labels]:
    name = sampling.weight if isinstance(sampling, Weighted) else sampling.stratum
    variable = source.variable(name)
    window = bound.spec.window
    _check_step(bound, sampling.at)
    inside = bound.length == 1 and window is not None and len(variable.dims) == 2 and variable.dims[1] == window.dim
    if variable.array.ndim != 1 + inside or variable.records != bound.records:
        wanted = f"[{bound.records}]" + (f" or [{bound.records}, {window.dim}]" if window is not None else "")
        raise InputError(f"sampling by {name!r}, which is {variable.dims} {variable.array.shape}: it must be {wanted}")

    def label(ids: Ids) -> Labels:
        record, start = bound.split_id(ids)
        record = record + (sampling.at if bound.length > 1 else 0)
        low = int(record.min())
        stored = variable.read(low, int(record.max()) + 1)
        at = (record - low, (start + sampling.at) % stored.shape[1]) if inside else (record - low,)
        values: Labels = stored[at].astype(np.float64)
        if variable.missing is not None:
            values[stored[at] == variable.missing] = np.nan
        if isinstance(sampling, Weighted):
            values = values * variable.scale + variable.offset
            wrong = ~(np.isfinite(values) & (values >= 0))
            mantissa, exponent = np.frexp(values)
            values = np.ldexp(np.round(mantissa * 256), exponent - 8)
        else:
            wrong = ~np.isfinite(values)
        if wrong.any():
            place = record[np.argmax(wrong)]
            raise InputError(f"sampling by {name!r}: record {place} has no usable value: give numbers of 0 or more")
        return values

    return label


def _foreground(source: Source, bound: BoundSample, sampling: Foreground) -> Callable[[Ids], Labels]:
    _check_step(bound, sampling.at)
    if not 0 < sampling.share < 1:
        raise InputError(f"{sampling}: a share must lie between 0 and 1")
    found = foreground(source, bound, sampling.foreground, sampling.above, sampling.at)
    return lambda ids: found(ids).astype(np.float64)


def _declared_shares(sampling: Stratified, distinct: Labels) -> Labels:
    names = [f"{value:.15g}" for value in distinct]
    if sampling.shares is None:
        return np.ones(len(distinct))
    if set(sampling.shares) != set(names) or min(sampling.shares.values()) < 0:
        raise InputError(
            f"shares name {sorted(sampling.shares)}; {sampling.stratum!r} has {sorted(names)} in the training split: "
            "give each a share of 0 or more"
        )
    return np.array([sampling.shares[name] for name in names], np.float64)


def _check_step(bound: BoundSample, at: int) -> None:
    length = 1 if bound.spec.window is None else bound.spec.window.length
    if not 0 <= at < length:
        raise InputError(f"sampling at step {at} lies outside a window of {length}")
