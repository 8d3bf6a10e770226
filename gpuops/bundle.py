"""A bundle: the directory in which training, export and serving meet.

    manifest.json   what it is, what it is made of, how it was proved, sha256 of every other file
    golden.npz      8 raw samples and the training pipeline's own answers to them
    patterns.npz    samples with missing values in them and the eager graph's answers, if an input can lack any
    model.<format>  one file a format

A bundle is written into a new directory and renamed (gpuops.atomic), so a killed export leaves
no half bundle; it is read only after every byte has been compared with the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuops.errors import InputError, IntegrityError
from gpuops.lineage.version import canonical_json
from gpuops.spec import Arrays, Signature

SCHEMA = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
PATTERNS = "patterns.npz"
FORMAT_FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "aoti": "model_aoti.pt2", "int8": "model_int8.onnx"}
"""File of each format. A .pt2 file's stem is the root of its archive: renaming it changes its bytes."""


RTOL = {"float32": 1e-5}
"""What an answer may differ by, as a share of its size and on top of the bundle's tolerance, by the output's dtype:
about 84 roundings of float32, which is what sums of some thousand terms in another order come to. 0 for others."""


@dataclass(frozen=True, slots=True)
class Golden:
    """Raw samples and the training pipeline's own answers, used for health, warm-up and parity."""

    inputs: dict[str, npt.NDArray[Any]]
    """Stored samples by input name, each [n, *shape]."""
    outputs: dict[str, npt.NDArray[np.float32]]
    """Answers in physical units by output name, each [n, *shape]."""

    def batch(self, size: int) -> Golden:
        """`size` samples and answers, starting again at the first when they run out."""
        return self.take(np.arange(size) % len(next(iter(self.inputs.values()))))

    def take(self, index: npt.NDArray[np.int64]) -> Golden:
        """The samples and answers at these places."""
        return Golden({k: v[index] for k, v in self.inputs.items()}, {k: v[index] for k, v in self.outputs.items()})

    def rows(self) -> list[Arrays]:
        """The samples one by one, each a batch of one, as requests."""
        count = len(next(iter(self.inputs.values())))
        return [{name: array[k : k + 1] for name, array in self.inputs.items()} for k in range(count)]

    def max_abs_diff(self, outputs: Arrays) -> float:
        """Largest absolute difference of `outputs` from these answers; NaN or a missing output is infinite."""
        worst = 0.0
        for name, want in self.outputs.items():
            got = outputs.get(name)
            if got is None or got.shape != want.shape:
                return float("inf")
            difference = np.abs(got.astype(np.float64) - want)
            difference[np.isnan(got) & np.isnan(want)] = 0.0
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        return worst

    def agrees(self, outputs: Arrays, tolerance: float) -> bool:
        """Whether `outputs` differ by at most `tolerance` + `RTOL` x |answer|, and are NaN where these answers are."""
        for name, want in self.outputs.items():
            got = outputs.get(name)
            if got is None or got.shape != want.shape:
                return False
            if not np.allclose(got, want, rtol=RTOL.get(want.dtype.name, 0.0), atol=tolerance, equal_nan=True):
                return False
        return True

    def save(self, path: Path) -> None:
        """Write as npz, with keys `input/<name>` and `output/<name>`."""
        sides = {"input": self.inputs, "output": self.outputs}
        np.savez(path, **{f"{side}/{k}": v for side, arrays in sides.items() for k, v in arrays.items()})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Inverse of `save`."""
        with np.load(path, allow_pickle=False) as stored:
            sides: dict[str, dict[str, Any]] = {"input": {}, "output": {}}
            for key in stored.files:
                side, name = key.split("/", 1)
                sides[side][name] = stored[key]
        return cls(sides["input"], sides["output"])


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose every byte agrees with its manifest."""

    path: Path
    """Directory."""
    manifest: dict[str, Any]
    """The manifest, as `write` documents it."""

    @property
    def version_id(self) -> str:
        """sha256 over data, code, config, kernels, environment and weights (lineage.version)."""
        return str(self.manifest["version_id"])

    @property
    def name(self) -> str:
        """Name under which the model is served by default."""
        return str(self.manifest["name"])

    @property
    def signature(self) -> Signature:
        """What crosses the wire."""
        return Signature.from_json(self.manifest["signature"])

    @property
    def tolerance(self) -> float:
        """Largest absolute difference from the golden answers that passes, in physical units."""
        return float(self.manifest["tolerance"])

    def tolerance_of(self, format: str) -> float:
        """As `tolerance`, for the answers of one format: int8 has its own."""
        return float(self.manifest["int8"]["tolerance"]) if format == "int8" else self.tolerance

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats present, as in `FORMAT_FILES`."""
        return tuple(name for name, file in FORMAT_FILES.items() if file in self.manifest["files"])

    def model_file(self, format: str) -> Path:
        """File of one format; InputError names those there are."""
        if format not in self.formats:
            raise InputError(
                f"{self.path} holds {', '.join(self.formats)}, not {format}: export it with --formats {format}"
            )
        return self.path / FORMAT_FILES[format]

    def golden(self) -> Golden:
        """Golden samples and answers."""
        return Golden.load(self.path / GOLDEN)

    def patterns(self) -> Golden | None:
        """Samples with missing values and their answers; None where no input has such a value, or in older bundles."""
        return Golden.load(self.path / PATTERNS) if PATTERNS in self.manifest["files"] else None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Seal the files of `directory` with a manifest and return it.

    `document` holds name, version_id, run_id, identity, signature, sample, preprocess, tolerance, served_batches,
    parity and environment; "aoti" (architecture, torch, isa, cuda_arch) beside a compiled package, and "int8" (bound,
    rmse, tolerance, ...) beside a quantised graph. `schema`, `files` (sha256 by file name) and `sha256` (of the
    manifest itself, canonical, without that field) are added here.
    """
    files = {p.name: file_sha256(p) for p in sorted(directory.iterdir()) if p.name != MANIFEST}
    manifest = {**document, "schema": SCHEMA, "files": files}
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def read_bundle(path: str | Path) -> Bundle:
    """Open a bundle after comparing every byte with its manifest.

    Raises:
        InputError: no bundle there, or one of a newer schema.
        IntegrityError: a file that the manifest lists is missing or changed, or the manifest itself was. Files that it
            does not list are nobody's: a signature, what a server leaves.
    """
    directory = Path(path)
    file = directory / MANIFEST
    if not file.is_file():
        raise InputError(f"{directory} is not a bundle (no {MANIFEST}): make one with `gpuops export RUN {directory}`")
    advice = "do not serve it; export it again from its run"
    try:
        manifest = json.loads(file.read_text())
        recorded = manifest.pop("sha256")
        intact = recorded == hashlib.sha256(canonical_json(manifest)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise IntegrityError(f"{file} was changed after export: {advice}")
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{file} has schema {manifest.get('schema')}, this gpuops reads {SCHEMA}: use the gpuops that wrote it"
        )
    if not isinstance(manifest.get("files"), dict):
        raise IntegrityError(f"{file} lists no files: {advice}")
    for name, digest in manifest["files"].items():
        member = directory / name
        if not member.is_file() or file_sha256(member) != digest:
            raise IntegrityError(f"{member} is missing or differs from its manifest: {advice}")
    return Bundle(directory, {**manifest, "sha256": recorded})
