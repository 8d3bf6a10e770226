"""What every part of the doctor answers with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: str
    """"ok", "note" (works, but know it) or "bad" (a command will fail)."""
    what: str
    """What was looked at."""
    detail: str
    """What was found, and the remedy if there is one."""
