"""What must hold of a repository where keys are trusted: nothing in it can run or answer but what one of them signed.

A signature covers a bundle's files. Beside them a server reads config.pbtxt, which can name other code, and it runs
whatever lies where it looks: a stub or a backend's library in a model's folder, a module in a version's, and the
bytecode there, which Python takes instead of model.py and which no setting of the environment keeps Triton's stub from.
So every file is accounted for. What is changed after the check is not seen: mount the repository read-only.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpuops.bundle import FORMAT_FILES, GOLDEN, MANIFEST, file_sha256
from gpuops.errors import IntegrityError
from gpuops.signing import SIGNATURE, signed_files
from gpuops_serving.config import BACKENDS, CONFIG, FORMAT, WARMUP, Backend, read_config, served_version_ids

_SHIM = Path(__file__).with_name("shim") / "model.py"
_CODE = ("default_model_filename", "cc_model_filenames", "model_operations", "model_repository_agents", "runtime")
"""Fields of a configuration that name code or models elsewhere; `deploy` writes none of them."""


def check_repository(repository: Path, keys: Sequence[Path]) -> None:
    """Check every model of a repository, as a server without model control loads them all.

    Args:
        repository: Model repository.
        keys: Public keys that are trusted, at least one.

    Raises:
        IntegrityError: something in it is not signed by one of them, or not what was signed.
        InputError: a key's file holds no Ed25519 public key.
        UnavailableError: `cryptography` is not installed.
    """
    for entry in sorted(repository.iterdir()):
        if entry.is_dir():
            check_model(entry, keys)


def check_model(model: Path, keys: Sequence[Path]) -> None:
    """As `check_repository`, for one model's folder; bytecode in it is removed, as Triton's stub leaves it there."""
    if model.is_symlink():
        _refuse(model, "is a link, to what may be changed at any time")
    for entry in sorted(model.iterdir()):
        if entry.is_symlink():
            _refuse(entry, "is a link, to what may be changed at any time")
        # Hidden ones are what a killed deployment left: no server looks at them.
        if not (entry.name in (CONFIG, WARMUP) or entry.name.isdecimal() or entry.name.startswith(".")):
            _refuse(entry, "was not deployed, and a server may run it")
    if not (model / CONFIG).is_file():
        _refuse(model / CONFIG, "is missing, so a server would guess what to run")
    config = read_config(model / CONFIG)
    how = _backend(model, config)
    versions = served_version_ids(config)
    if not versions:
        _refuse(model / CONFIG, "was not written by `gpuops deploy`")
    for number in versions:
        _check_version(model / str(number), how, keys)


def _check_version(folder: Path, how: Backend, keys: Sequence[Path]) -> None:
    _remove_bytecode(folder)
    _, digests = signed_files(folder, keys)
    signed = {**digests, SIGNATURE: None}
    if how.format is not None and how.file != FORMAT_FILES[how.format]:  # deployed under the name the backend expects
        signed[how.file] = digests.get(FORMAT_FILES[how.format], "")
    if how.backend == "python":
        signed[_SHIM.name] = file_sha256(_SHIM)
    found = {entry.name: entry for entry in folder.iterdir()}
    for name in (MANIFEST, GOLDEN, how.file):
        if name and name not in found:
            _refuse(folder / name, "is missing")
    for name, entry in sorted(found.items()):
        if entry.is_symlink() or not entry.is_file():
            _refuse(entry, "is no plain file")
        if name not in signed:
            _refuse(entry, "is not among what was signed, and a server may run it")
        if name != SIGNATURE and file_sha256(entry) != signed[name]:
            _refuse(
                entry,
                "is not this gpuops' shim, and it is code" if name == _SHIM.name else "differs from what was signed",
            )


def _backend(model: Path, config: Any) -> Backend:
    """How a configuration runs the model; refused if that may be with other code."""
    given = {descriptor.name for descriptor, _ in config.ListFields()}
    for field in _CODE:
        if field in given:
            _refuse(model / CONFIG, f"names other code ({field})")
    if config.optimization.HasField("execution_accelerators"):
        _refuse(model / CONFIG, "names other code (execution_accelerators)")
    for how in BACKENDS.values():
        named = config.parameters[FORMAT].string_value if FORMAT in config.parameters else None
        if (config.backend, config.platform) == (how.backend, how.platform) and named in (None, how.format):
            for key in sorted(config.parameters):  # a backend may take code from one, as python from EXECUTION_ENV_PATH
                if not key.startswith("gpuops.") and key != how.threads:
                    _refuse(model / CONFIG, f"has a parameter that may name other code ({key})")
            return how
    _refuse(model / CONFIG, f"runs backend {config.backend or config.platform!r}, which `deploy` does not write")


def _remove_bytecode(folder: Path) -> None:
    cache = folder / "__pycache__"
    if cache.is_symlink():
        _refuse(cache, "is a link")
    if cache.is_dir():
        try:
            shutil.rmtree(cache)
        except OSError as error:
            _refuse(cache, f"holds bytecode that Python would run instead of what was signed ({error.strerror})")


def _refuse(path: Path, why: str) -> NoReturn:
    raise IntegrityError(f"{path} {why}: do not serve it; deploy the signed bundle again, in a new repository")
