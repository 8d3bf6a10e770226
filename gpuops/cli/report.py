"""`gpuops report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpuops.errors import InputError
from gpuops.report import write_report


def report(
    run: str, bundle: str | None, infer: list[str], out: str | None, carbon: float | None, price: float | None
) -> None:
    """Write the page and print where it is."""
    destination = Path(out) if out is not None else Path(run) / "report.html"
    served = []
    for file in infer:
        try:
            served.append(json.loads(Path(file).read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not the output of `gpuops infer --json` ({error})") from error
    proved = None if bundle is None else Path(bundle)
    write_report(Path(run), destination, bundle=proved, served=served, carbon=carbon, price=price)
    sys.stdout.write(f"{destination}\n")
