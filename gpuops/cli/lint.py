"""`gpuops lint`: errors and traps in a model repository."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gpuops.cli.output import print_json


def lint(repository: str, server_version: str, gpus: int, server_flag: list[str], json: bool) -> None:
    """Print every finding; exit code 1 if one is an error."""
    from gpuops_serving.lint import lint as run_lint

    found = run_lint(Path(repository), server_version, gpus=gpus, flags=server_flag or None)
    errors = sum(finding.severity == "error" for finding in found)
    if json:
        print_json([finding.to_json() for finding in found])
    else:
        console = Console(soft_wrap=True, highlight=False)
        for finding in found:
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(f"{finding.place}: [{colour}]{finding.severity} {finding.code}[/{colour}] {finding.message}")
        console.print(f"{errors} errors, {len(found) - errors} warnings for Triton {server_version}")
    if errors:
        raise SystemExit(1)
