"""Declared rules that data must keep; a broken rule blocks the commit and names variable, index and value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import QualityError


@dataclass(frozen=True)  # no slots: jsonargparse reads a default instance through vars()
class Rules:
    """Rules of one variable, in physical units (valid_min and valid_max as in the CF conventions)."""

    valid_min: float | None = None
    """Smallest value allowed."""
    valid_max: float | None = None
    """Largest value allowed."""
    max_missing: float = 1.0
    """Largest share of missing values allowed, over the whole variable."""
    allow_constant: bool = True
    """Whether a record may hold one value only."""


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
        flat = stored.reshape(len(stored), -1)
        report((flat == flat[:, :1]).all(axis=1), "allow_constant false")
    return found


def gate(violations: Iterable[Violation], missing_share: dict[str, float], rules: dict[str, Rules]) -> None:
    """Raise QualityError if any rule is broken; the message names the first violations.

    Args:
        violations: of all blocks.
        missing_share: share of missing values over the whole of each variable.
        rules: by variable.
    """
    broken = [str(violation) for violation in violations]
    for variable, share in missing_share.items():
        allowed = rules[variable].max_missing
        if share > allowed:
            broken.append(f"{variable}: {share:.2%} of the values are missing, max_missing allows {allowed:.2%}")
    if broken:
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise QualityError(f"nothing was committed: {'; '.join(broken[:3])}{more}. Mend the data or the rule")
