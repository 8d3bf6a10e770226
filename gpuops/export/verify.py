"""`verify`: prove a bundle in a fresh process, one a format.

python -m gpuops.export.verify BUNDLE FORMAT      prints the parity as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpuops.bundle import Bundle, Golden, read_bundle
from gpuops.errors import GpuopsError, IntegrityError, UnavailableError
from gpuops.lineage.version import version_id


def verify(path: str | Path) -> dict[str, dict[str, Any]]:
    """Parity by format, each swept in a fresh process over every served batch size and bad inputs.

    Raises:
        InputError: no bundle there.
        IntegrityError: bytes, identity or answers differ from what was recorded.
        UnavailableError: a format cannot run here: another kind of machine, or its runtime is not installed.
    """
    bundle = read_bundle(path)
    check_identity(bundle)
    return {format: verify_format(bundle.path, format) for format in bundle.formats}


def verify_format(path: Path, format: str) -> dict[str, Any]:
    """Parity of one format, swept in a fresh process that has only the bundle.

    Raises:
        IntegrityError: it answers differently, with the reason that the process gave.
        UnavailableError: it cannot run here.
    """
    command = [sys.executable, "-m", "gpuops.export.verify", str(path), format]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        kind = UnavailableError if done.returncode == UnavailableError.exit_code else IntegrityError
        raise kind(f"{format}: {reason}")
    parity: dict[str, Any] = json.loads(done.stdout)
    return parity


def check_identity(bundle: Bundle) -> None:
    """Raise IntegrityError unless the version id is that of the recorded identity."""
    identity = dict(bundle.manifest["identity"])
    weights = identity.pop("weights", "")
    if version_id(identity, weights) != bundle.version_id:
        raise IntegrityError(f"{bundle.path}: the version id is not that of the recorded identity: export it again")


def _patterns(bundle: Bundle, format: str) -> Golden | None:
    """Samples with missing values and their answers: the bundle's; for an older bundle, what its pt2 file answers."""
    from gpuops.export.formats import runner
    from gpuops.export.patterns import answered, with_missing

    kept = bundle.patterns()
    inputs = with_missing(bundle.golden(), bundle.signature)
    if kept is not None or inputs is None or format == "pt2" or "pt2" not in bundle.formats:
        return kept
    return answered(inputs, runner(bundle, "pt2"), bundle.signature.max_batch)


def main() -> None:
    """Sweep one format in this process."""
    from gpuops.export.formats import runner
    from gpuops.export.parity import sweep

    path, format = sys.argv[1:]
    try:
        bundle = read_bundle(path)
        compiled = bundle.manifest.get("aoti", {}) if format == "aoti" else {}
        infer = runner(bundle, format, "cuda" if compiled.get("cuda_arch") else "cpu")
        own = bundle.manifest.get(format, {})
        parity = sweep(
            infer,
            bundle.golden(),
            bundle.signature,
            bundle.tolerance_of(format),
            patterns=_patterns(bundle, format),
            missing_tolerance=own.get("missing_tolerance"),
        )
    except GpuopsError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None
    recorded = {key: own[key] for key in ("bound", "rmse", "bytes", "latency_ms") if key in own}  # of int8, at export
    sys.stdout.write(json.dumps({**parity.to_json(), **recorded}) + "\n")


if __name__ == "__main__":
    main()
