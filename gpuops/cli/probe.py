"""`gpuops probe`: golden requests to a live server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.cli.connection import Connection
from gpuops.cli.output import print_json, say
from gpuops.errors import InputError


def probe(
    folder: str | None,
    connection: Connection,
    record: bool,
    repository: str | None,
    only: list[str],
    inputs: list[str],
    overwrite: bool,
    json: bool,
) -> None:
    """Record golden requests, or ask them again; exit code 1 if one is not answered as recorded."""
    if (folder is None) == (repository is None) or (record and folder is None):
        raise InputError("which ones? gpuops probe FOLDER [--record], or gpuops probe --repository REPOSITORY")
    with connection.triton() as triton:
        if record:
            for warning in triton.warnings():
                say(f"warning: {warning}")
            given = {model: _inputs(file) for model, _, file in (text.partition("=") for text in inputs)}
            made = triton.record(folder, inputs=given, only=only, overwrite=overwrite, say=say)
            if json:
                print_json(made.to_json())
            else:
                count = len(made.recorded)
                sys.stdout.write(f"{count} golden request{'s' if count != 1 else ''} recorded in {folder}\n")
            return
        if inputs or overwrite:
            raise InputError("--inputs and --overwrite are for --record")
        health = triton.probe(folder, only) if folder is not None else triton.probe_repository(repository, only)
    if json:
        print_json(health.to_json())
    else:
        _print(health)
    if not health.ok:
        raise SystemExit(1)


def _print(health: Any) -> None:
    for finding in health.findings:
        state = f"ok    {finding.ms:8.1f} ms" if finding.ok else "WRONG            "
        said = " (its own health says ready)" if finding.says_ready and not finding.ok else ""
        reason = "" if finding.reason is None else f"  {finding.reason}"
        sys.stdout.write(f"{state}  {finding.model}:{finding.version}{said}{reason}\n")
    for target in health.unknown:
        sys.stdout.write(f"unknown            {target}  has no golden request: record it\n")


def _inputs(file: str) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(Path(file), allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError) as error:
        raise InputError(f"--inputs {file}: {error}: write MODEL=FILE.npz with arrays by input name") from error
