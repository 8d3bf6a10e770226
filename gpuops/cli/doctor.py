"""`gpuops doctor`."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from gpuops.cli.output import print_json
from gpuops.doctor import machine, store


def doctor(url: str | None, json: bool) -> None:
    """Print every finding; exit code 1 if something that commands need is missing."""
    findings = machine() if url is None else store(url)
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        console = Console()
        marks = {"ok": "[green]ok  [/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad [/red]"}
        for finding in findings:
            console.print(f"{marks[finding.level]} {finding.what}: {finding.detail}", highlight=False, soft_wrap=True)
    if any(finding.level == "bad" for finding in findings):
        raise SystemExit(1)
