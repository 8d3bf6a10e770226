"""Folders of a model repository, written whole: what a version folder holds, and how it gets there.

Everything is written under a temporary name and renamed. What a killed deployment leaves has a name by which the next
one knows it, and is removed then; a Triton that meets it first leaves it alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpuops.atomic import remove_unless_locked
from gpuops.bundle import GOLDEN, MANIFEST, Bundle, file_sha256
from gpuops.errors import InputError, IntegrityError
from gpuops.signing import SIGNATURE
from gpuops_serving.config import BACKENDS, CONFIG, ENSEMBLE, Options

SHIM = Path(__file__).with_name("shim") / "model.py"
_SERVED_BY = ("version_id", "signature", "sample", "tolerance", ENSEMBLE)
_VERSION = re.compile(r"[1-9][0-9]*")
_UNFINISHED = re.compile(r"\.([0-9]+)\.(?:(new)-.*|replaced)")  # as gpuops.atomic.new_directory names them


def versions_in(model: Path) -> list[int]:
    """Version numbers in a model's folder, ascending; empty if there is none."""
    if not model.is_dir():
        return []
    return sorted(int(p.name) for p in model.iterdir() if _VERSION.fullmatch(p.name))


def named(path: str | Path) -> Path:
    """A path that was given; InputError if it is empty, which `Path` would take for the working directory."""
    if not str(path):
        raise InputError("the path of a folder is empty: name it, or write . for the one you are in")
    return Path(path)


def require_layout(model: Path) -> None:
    """Raise InputError if a file lies where a model's folders belong, or a folder where its configuration does."""
    for path in (*reversed(model.parents), model, *(model / str(number) for number in versions_in(model))):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file, where a model repository has a folder: move it, or name another place")
    if (model / CONFIG).is_dir():
        raise InputError(f"{model / CONFIG} is a folder, where a model has its configuration: move it away")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a version folder; IntegrityError if it is missing or none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{folder} is incomplete ({error}): deploy its bundle again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise IntegrityError(f"{folder / MANIFEST} lists no files: deploy its bundle again")
    return manifest


def sources(bundle: Bundle, options: Options, plan: Path | None) -> dict[str, Path]:
    """Where each file of a version folder comes from, by its name there.

    Raises:
        InputError: the bundle has not the format that the backend runs, or a TensorRT engine is missing.
    """
    how = BACKENDS[options.backend]
    if (options.backend == ENSEMBLE) != (ENSEMBLE in bundle.manifest):
        raise InputError(f"{bundle.path} and backend {options.backend!r} do not fit: an ensemble's bundle makes one")
    files = {GOLDEN: bundle.path / GOLDEN, MANIFEST: bundle.path / MANIFEST}
    if how.format is not None:
        files[how.file] = bundle.model_file(how.format)
    elif how.file:
        if plan is None or not plan.is_file():
            raise InputError(
                f"backend {options.backend} needs an engine for this GPU: build it (trtexec), give it as plan"
            )
        files[how.file] = plan
    if (bundle.path / SIGNATURE).is_file():
        files[SIGNATURE] = bundle.path / SIGNATURE
    if options.runs_shim:
        files[SHIM.name] = SHIM
    return files


def fill(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy what a version needs, and compare the copies with the manifest.

    Raises:
        IntegrityError: a file changed while it was copied.
    """
    for file, source in files.items():
        shutil.copyfile(source, folder / file)
    seals = read_manifest(folder)["files"]
    for file, source in files.items():
        if source.name in seals and file_sha256(folder / file) != seals[source.name]:
            raise IntegrityError(f"{source} changed while it was copied: deploy a bundle at rest")


def holds(folder: Path, files: Mapping[str, Path], bundle: Bundle) -> bool:
    """Whether a version folder is what `fill` would write.

    The manifest of a bundle that was exported again may differ, where nobody signed it: it holds times. What is served
    by it may not.
    """
    if names_in(folder) != set(files):
        return False
    manifest = read_manifest(folder)
    if any(manifest.get(key) != bundle.manifest.get(key) for key in _SERVED_BY):
        return False
    free = () if SIGNATURE in files else (MANIFEST,)
    return all(file_sha256(folder / file) == file_sha256(source) for file, source in files.items() if file not in free)


def names_in(folder: Path) -> set[str]:
    """What lies in a version folder, but for the bytecode that Triton's stub leaves there."""
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def intact(folder: Path, sealed: Mapping[str, str]) -> bool:
    """Whether a version folder is as its own manifest seals it.

    Args:
        folder: Version folder.
        sealed: Name in the manifest by name of each file that must be there; what it does not seal may be anything.
    """
    try:
        seals: dict[str, str] = read_manifest(folder)["files"]
    except IntegrityError:
        return False
    return all(
        (folder / file).is_file() and (name not in seals or file_sha256(folder / file) == seals[name])
        for file, name in sealed.items()
    )


@contextmanager
def staged(model: Path) -> Iterator[Path]:
    """A temporary directory beside the repository that becomes the folder of a new model when the block ends.

    It may not lie in the repository: Triton takes every folder there for a model, hidden ones too, and would not start.
    The repository must be locked: so what has such a name already was left by a process that was killed.

    Raises:
        InputError: the repository is a file system of its own, or nothing can be written beside it.
    """
    repository = model.parent.absolute()
    prefix = f".{repository.name}.staged-"

    def refusal(error: OSError) -> InputError:
        return InputError(
            f"{model} cannot be published in one step ({error.strerror}): use a repository inside a folder of the same "
            f"file system that can be written to, such as {repository / 'models'}"
        )

    for left in repository.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=repository.parent))
    except OSError as error:
        raise refusal(error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        try:
            temporary.rename(model)
        except OSError as error:  # the repository is a mount point, for example
            raise refusal(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; on a full disk the file is as it was."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_unfinished(model: Path) -> None:
    """Remove what killed deployments left in a model's folder, whose repository must be locked."""
    for left in model.glob(".*"):
        if left.name.startswith((f".{CONFIG}-", "..served-")):  # half a text, by `write_text`
            left.unlink(missing_ok=True)
        elif (found := _UNFINISHED.fullmatch(left.name)) and (found[2] or (model / found[1]).exists()):
            remove_unless_locked(left)
