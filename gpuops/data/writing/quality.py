"""Declared rules that data must keep; a broken rule blocks the commit and names variable, index and value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import QualityError

NAMED = 3
"""Broken rules that a message names; the rest is counted."""


@dataclass(frozen=True)  # no slots: jsonargparse reads a default instance through vars()
class Rules:
    """Rules of one variable, in physical units (valid_min and valid_max as in the CF conventions)."""

    valid_min: float | None = None
    """Smallest value allowed."""
    valid_max: float | None = None
    """Largest value allowed."""
    max_missing: float = 1.0
    """Largest share of missing values allowed, over the whole variable; NaN is missing too."""
    max_nan: float = 1.0
    """Largest share of NaN allowed in the source, over the whole variable; declared missing values do not count."""
    allow_constant: bool = True
    """Whether a record may hold one value only."""
    allow_duplicates: bool = True
    """Whether a record may be equal to another, bit for bit."""
    allow_missing_chunks: bool | None = None
    """Whether a Zarr source may lack chunks; None allows it where its fill value means "no data"."""


@dataclass(frozen=True)
class AxisRules:
    """Rules of a coordinate, in its own unit."""

    monotonic: bool = False
    """Whether each value must be greater than the one before."""
    step: float | None = None
    """The one difference between neighbours that is allowed."""
    max_gap: float | None = None
    """Largest difference between neighbours."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One value that breaks a rule."""

    variable: str
    """Name of the variable."""
    index: tuple[int, ...]
    """Index of the first such value in the stored array."""
    value: float
    """Physical value there."""
    rule: str
    """The rule, in words."""
    count: int
    """How many values (or records) of the checked block break it."""

    def __str__(self) -> str:
        return f"{self.variable}{list(self.index)} = {self.value:g} breaks '{self.rule}' ({self.count:,} like it there)"


def check(
    variable: str,
    stored: npt.NDArray[Any],
    first_record: int,
    rules: Rules,
    packing: tuple[float, float, int | None],
) -> list[Violation]:
    """Violations in a block of packed records.

    Args:
        variable: name, for the message.
        stored: packed records, [records, *record].
        first_record: index of the block's first record in the stored array.
        rules: what must hold.
        packing: (scale, offset, missing) of the variable.
    """
    scale, offset, missing = packing
    physical = stored.astype(np.float64) * scale + offset
    data = np.ones(stored.shape, bool) if missing is None else stored != missing
    data &= ~np.isnan(physical)
    found = []

    def report(broken: npt.NDArray[np.bool_], rule: str) -> None:
        if broken.any():
            index = np.unravel_index(int(broken.argmax()), broken.shape)
            value = float(physical[index].flat[0])
            place = (int(index[0]) + first_record, *map(int, index[1:]))
            found.append(Violation(variable, place, value, rule, int(broken.sum())))

    report(data & np.isinf(physical), "finite")
    if rules.valid_min is not None:
        report(data & (physical < rules.valid_min), f"valid_min {rules.valid_min:g}")
    if rules.valid_max is not None:
        report(data & (physical > rules.valid_max), f"valid_max {rules.valid_max:g}")
    if not rules.allow_constant:
        report(constant(stored), "allow_constant false")
    return found


def constant(stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which records hold one value only (NaN throughout counts as one): [records] of [records, *record]."""
    flat = stored.reshape(len(stored), -1)
    same: npt.NDArray[np.bool_] = (flat == flat[:, :1]).all(axis=1)
    return same | np.isnan(flat).all(axis=1) if flat.dtype.kind == "f" else same


def duplicates(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Records that equal an earlier one, in order: positions in `digests` [records, bytes]."""
    whole = np.ascontiguousarray(digests).view(np.dtype((np.void, digests.shape[1])))[:, 0]
    _, first = np.unique(whole, return_index=True)
    repeated = np.ones(len(digests), bool)
    repeated[first] = False
    return np.flatnonzero(repeated)


def check_axis(
    name: str, values: npt.NDArray[Any], rules: AxisRules
) -> tuple[dict[str, int | float | None], list[Violation]]:
    """What a coordinate's neighbours say, and the rules that they break.

    Args:
        name: of the coordinate.
        values: [points], in the coordinate's unit.
        rules: what must hold.

    Returns:
        (`{"step": median difference, "repeated", "disordered", "gaps"}`, violations). A gap is a difference of more
        than one and a half steps; disorder is a difference whose sign is not the median's.
    """
    exact = values.astype(np.int64) if values.dtype.kind in "iu" else values.astype(np.float64)
    step = np.diff(exact)
    usual = float(np.median(step)) if step.size else math.nan
    counts: dict[str, int | float | None] = {
        "step": usual if step.size else None,
        "repeated": int((step == 0).sum()),
        "disordered": int((np.sign(step) == -np.sign(usual)).sum()) if step.size and usual else 0,
        "gaps": int((np.abs(step) > 1.5 * abs(usual)).sum()) if step.size and usual else 0,
    }
    found: list[Violation] = []

    def report(broken: npt.NDArray[np.bool_], rule: str) -> None:
        if broken.any():
            place = int(broken.argmax()) + 1
            found.append(Violation(name, (place,), float(values[place]), rule, int(broken.sum())))

    if rules.monotonic:
        report(~(step > 0), "monotonic")
    if rules.step is not None:
        report(~np.isclose(step, rules.step, rtol=1e-6, atol=0), f"step {rules.step:g}")
    if rules.max_gap is not None:
        report(~(np.abs(step) <= rules.max_gap), f"max_gap {rules.max_gap:g}")
    return counts, found


def gate(
    violations: Iterable[Violation],
    missing_share: Mapping[str, float],
    rules: Mapping[str, Rules],
    *,
    nan_share: Mapping[str, float] | None = None,
    others: Sequence[str] = (),
) -> None:
    """Raise QualityError if any rule is broken; the message names the first of them.

    Of one rule of one variable the first place is named, with the number of values in all blocks.

    Args:
        violations: of all blocks.
        missing_share: share of missing values over the whole of each variable.
        rules: by variable.
        nan_share: share of NaN in the source over the whole of each variable.
        others: broken rules in words.
    """
    merged: dict[tuple[str, str], Violation] = {}
    for one in violations:
        before = merged.get((one.variable, one.rule))
        if before is None:
            merged[one.variable, one.rule] = one
        else:
            first = min(before, one, key=lambda violation: violation.index)
            count = before.count + one.count
            merged[one.variable, one.rule] = Violation(one.variable, first.index, first.value, one.rule, count)
    broken = [str(violation) for violation in merged.values()] + list(others)
    for variable, share in missing_share.items():
        allowed = rules[variable].max_missing
        if share > allowed:
            broken.append(f"{variable}: {share:.2%} of the values are missing, max_missing allows {allowed:.2%}")
    for variable, share in (nan_share or {}).items():
        allowed = rules[variable].max_nan
        if share > allowed:
            broken.append(f"{variable}: {share:.2%} of the source's values are NaN, max_nan allows {allowed:.2%}")
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise QualityError(f"nothing was committed: {'; '.join(broken[:NAMED])}{more}. Mend the data or the rule")
