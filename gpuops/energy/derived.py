"""Carbon and cost from a user's own figures: arithmetic on a reading, and never a measurement."""

from __future__ import annotations

from typing import Any

from gpuops.errors import InputError

_JOULES_PER_KWH = 3_600_000


def derive(joules: float | None, *, carbon: float | None, price: float | None) -> dict[str, Any] | None:
    """What some joules come to; None if nothing was asked for.

    Args:
        joules: measured energy; None if unknown, and so is what is derived.
        carbon: grams of CO2 equivalent per kWh, the user's figure.
        price: price per kWh in the user's currency.

    Raises:
        InputError: a figure that is negative or not finite.
    """
    asked = {"carbon_g": carbon, "cost": price}
    given = {name: figure for name, figure in asked.items() if figure is not None}
    if not given:
        return None
    for name, figure in given.items():
        if not 0 <= figure < float("inf"):
            raise InputError(f"{name.partition('_')[0]} of {figure} per kWh: give a figure of at least 0")
    kwh = None if joules is None else joules / _JOULES_PER_KWH
    return {
        "kwh": kwh,
        **{name: None if kwh is None else kwh * figure for name, figure in given.items()},
        "per_kwh": given,
        "method": "derived from measured joules and figures that the user gave",
    }
