"""Publish a bundle as a model version in a Triton model repository.

    REPOSITORY/<name>/config.pbtxt     the pointer: which versions are served, and their wire format
    REPOSITORY/<name>/<version>/       immutable: model, golden.npz, manifest.json, signature; model.py is the shim
    REPOSITORY/<name>/warmup/          first golden sample, for backends that Triton warms up

A version folder is written under a temporary name and renamed; only then is config.pbtxt replaced, in one step, and it
names the versions to serve: the new one and the one before it. So whoever reads the repository sees the old versions or
the new ones, never a mixture. Triton's stub may leave a `__pycache__` in a version folder: only listed files are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuops.atomic import locked, new_directory
from gpuops.bundle import GOLDEN, MANIFEST, Bundle, Golden, file_sha256, read_bundle
from gpuops.errors import InputError, IntegrityError
from gpuops.signing import SIGNATURE, trusted_keys, verify, verify_deployed
from gpuops.spec import Signature
from gpuops_serving.config import (
    BACKENDS,
    CONFIG,
    SAMPLE,
    VERSION_ID,
    WARMUP,
    Options,
    config_text,
    model_config,
    read_config,
    served_version_ids,
)
from gpuops_serving.tuning import Tuning

SHIM = Path(__file__).with_name("shim") / "model.py"
CANDIDATE = ".candidate"
"""End of the name under which a version is tried before it is promoted (gpuops_serving.rollout)."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A version of a model in a repository."""

    name: str
    """Model name, as clients ask for it."""
    version: int
    """Version number, counted from 1 in this repository."""
    path: Path
    """Version folder."""
    version_id: str
    """Version id of the bundle."""
    new: bool
    """False if the repository served exactly this already and nothing was written."""
    kept: tuple[int, ...] = ()
    """Versions before it that are served on, for who names them and for rolling back."""


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """What a repository says about one version of a model that is to be served."""

    name: str
    """Model name."""
    version: int
    """Version number."""
    version_id: str
    """Version id of the bundle it was made from."""
    golden: Golden
    """Golden samples and answers."""
    tolerance: float
    """Largest absolute difference that passes, in physical units."""


def deploy(
    bundle_path: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    options: Options | None = None,
    tuning: Tuning | None = None,
    plan: Path | None = None,
    keys: Sequence[Path] | None = None,
) -> Deployment:
    """Publish a bundle in a model repository as the next version of a model.

    The version before stays served beside it if both take and answer the same tensors.

    Args:
        bundle_path: Bundle directory; every byte is compared with its manifest first.
        repository: Model repository; made if it is not there.
        name: Model name; by default the bundle's.
        options: How it is served.
        tuning: The measurement that `options` came from, kept in the configuration.
        plan: TensorRT engine, for that backend; a bundle holds none, as it belongs to one GPU and one TensorRT.
        keys: Public keys of which one must have signed the bundle; by default those of $GPUOPS_TRUSTED_KEYS. None at
            all accepts unsigned bundles.

    Returns:
        The version that is now to be served. A running server takes it up when it loads the model or starts again.

    Raises:
        InputError: no bundle there, not this format in it, or an unusable name.
        IntegrityError: the bundle differs from its manifest or no trusted key signed it; the repository is as it was.
    """
    bundle = read_bundle(bundle_path)
    name = bundle.name if name is None else name
    if name.endswith(CANDIDATE):
        raise InputError(f"model name {name!r}: {CANDIDATE!r} at the end is for versions on trial; name another")
    return publish(bundle, Path(repository), name, options or Options(), tuning=tuning, plan=plan, keys=keys)


def publish(
    bundle: Bundle,
    repository: Path,
    name: str,
    options: Options,
    *,
    number: int | None = None,
    tuning: Tuning | None = None,
    plan: Path | None = None,
    keys: Sequence[Path] | None = None,
) -> Deployment:
    """As `deploy`, for an open bundle and, with `number`, as that very version."""
    if not _NAME.fullmatch(name):
        raise InputError(f"model name {name!r}: use letters, digits, '_', '-' and '.' (it is put in URLs)")
    if trusted := trusted_keys() if keys is None else keys:
        verify(bundle.path, trusted)
    files = _files(bundle, options, plan)
    repository.mkdir(parents=True, exist_ok=True)
    model = repository / name
    with locked(repository):  # one deployment at a time chooses a version number
        versions = versions_in(model)
        newest = max(versions, default=0)
        if (
            newest
            and number in (None, newest)
            and _names(model, newest, options, tuning)
            and _holds(model / str(newest), files, bundle)
        ):
            before = sorted(served_version_ids(read_config(model / CONFIG)).keys() - {newest})
            folder = model / str(newest)
            return Deployment(name, newest, folder, bundle.version_id, new=False, kept=tuple(before))
        version = newest + 1 if number is None else number
        folder = model / str(version)
        kept = _kept(model, version, bundle, files)
        if model.is_dir():
            with new_directory(folder, overwrite=number is not None) as temporary:
                _fill(temporary, files)
            point(model, [*kept, version], options, tuning)
        else:
            with _staged(model) as temporary:
                (temporary / str(version)).mkdir()
                _fill(temporary / str(version), files)
                point(temporary, [version], options, tuning, name=name)
    return Deployment(name, version, folder, bundle.version_id, new=True, kept=tuple(kept))


def point(
    model: Path, versions: Sequence[int], options: Options, tuning: Tuning | None = None, *, name: str | None = None
) -> None:
    """Replace a model's configuration, in one step, by one that serves these of its versions, the highest by default.

    Args:
        model: The model's folder in the repository.
        versions: Version numbers whose folders are there.
        options: How they are served.
        tuning: The measurement behind `options`.
        name: Model name; the folder's if None.
    """
    write_text(model / CONFIG, _pointer(model, versions, options, tuning, name or model.name, write=True))


def withdraw(model: Path, version: int) -> list[int]:
    """Serve a model without one of its versions; returns those that are served on.

    Raises:
        InputError: no other version is there to fall back on.
    """
    config = read_config(model / CONFIG)
    left = [number for number in served_version_ids(config) if number != version] or [
        number for number in versions_in(model) if number < version
    ][-1:]
    if not left:
        raise InputError(
            f"{model} has no version but {version} to fall back on: deploy another bundle, or stop serving"
        )
    manifest = _manifest(model / str(max(left)))
    for key in [key for key in config.parameters if key.startswith(f"{VERSION_ID}.")]:
        del config.parameters[key]
    for number in left:
        config.parameters[f"{VERSION_ID}.{number}"].string_value = _manifest(model / str(number))["version_id"]
    config.parameters[VERSION_ID].string_value = manifest["version_id"]
    config.parameters[SAMPLE].string_value = json.dumps(manifest["sample"], sort_keys=True)
    config.version_policy.specific.versions[:] = sorted(left)
    write_text(model / CONFIG, config_text(config))
    return sorted(left)


def served_versions(repository: str | Path, *, keys: Sequence[Path] | None = None) -> list[ServedVersion]:
    """What a repository asks a server to serve, by model name and version; versions on trial are left out.

    Args:
        repository: Model repository.
        keys: Public keys of which one must have signed each version; by default those of $GPUOPS_TRUSTED_KEYS.

    Raises:
        InputError: no repository there, nothing deployed in it, or a model that `deploy` did not write.
        IntegrityError: a version's manifest has another version id than the model's configuration, or no trusted
            signature.
    """
    repository = Path(repository)
    if not repository.is_dir():
        raise InputError(f"{repository} is not a model repository: make one with `gpuops deploy BUNDLE {repository}`")
    trusted = trusted_keys() if keys is None else keys
    models = [folder for folder in sorted(repository.iterdir()) if folder.is_dir() and folder.suffix != CANDIDATE]
    if not models:
        raise InputError(f"{repository} holds no model: put one there with `gpuops deploy BUNDLE {repository}`")
    return [served for model in models for served in served_versions_of(model, trusted)]


def served_versions_of(model: Path, keys: Sequence[Path] = ()) -> list[ServedVersion]:
    """As `served_versions`, for one model's folder."""
    found = served_version_ids(read_config(model / CONFIG)) if (model / CONFIG).is_file() else {}
    if not found:
        raise InputError(
            f"{model} was not written by `gpuops deploy`, so nothing proves its answers: move it to another repository"
        )
    return [_served(model, number, version_id, keys) for number, version_id in sorted(found.items())]


def versions_in(model: Path) -> list[int]:
    """Version numbers in a model's folder, ascending; empty if there is none."""
    return sorted(int(p.name) for p in model.iterdir() if p.name.isdigit()) if model.is_dir() else []


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


def _served(model: Path, number: int, version_id: str, keys: Sequence[Path]) -> ServedVersion:
    folder = model / str(number)
    manifest = _manifest(folder)
    try:
        seal, tolerance, found = manifest["files"][GOLDEN], float(manifest["tolerance"]), manifest["version_id"]
        if file_sha256(folder / GOLDEN) != seal:
            raise IntegrityError(f"{folder / GOLDEN} differs from its manifest: deploy its bundle again")
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{folder} is incomplete ({error}): deploy its bundle again") from error
    if found != version_id:
        raise IntegrityError(f"{folder} holds another version id than {model / CONFIG}: deploy its bundle again")
    if keys:
        verify_deployed(folder, keys)
        if (folder / SHIM.name).is_file() and file_sha256(folder / SHIM.name) != file_sha256(SHIM):
            raise IntegrityError(f"{folder / SHIM.name} is not this gpuops' shim, and it is code: deploy again")
    return ServedVersion(model.name, number, version_id, Golden.load(folder / GOLDEN), tolerance)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder} is incomplete ({error}): deploy its bundle again") from error
    return manifest


def _pointer(
    model: Path, versions: Sequence[int], options: Options, tuning: Tuning | None, name: str, *, write: bool
) -> str:
    """Text of the configuration that serves some versions; writes the warm-up data that it names if asked to."""
    manifests = {number: _manifest(model / str(number)) for number in versions}
    newest = manifests[max(versions)]
    signature = Signature.from_json(newest["signature"])
    warmup = None
    if not options.runs_shim:
        warmup = {spec.name: f"{newest['version_id'][:16]}-{spec.name}" for spec in signature.inputs}
        if write:
            golden = Golden.load(model / str(max(versions)) / GOLDEN)
            (model / WARMUP).mkdir(exist_ok=True)
            for tensor, file in warmup.items():
                (model / WARMUP / file).write_bytes(golden.inputs[tensor][:1].tobytes())
    config = model_config(
        name,
        {number: manifest["version_id"] for number, manifest in manifests.items()},
        signature,
        sample=newest["sample"],
        options=options,
        warmup=warmup,
        tuning=None if tuning is None else tuning.to_json(),
    )
    return config_text(config)


def _names(model: Path, newest: int, options: Options, tuning: Tuning | None) -> bool:
    """Whether the configuration there is the one that would be written for the newest version."""
    if not (model / CONFIG).is_file():
        return False
    try:
        text = (model / CONFIG).read_text()
        served = served_version_ids(read_config(model / CONFIG))
        return newest in served and text == _pointer(model, list(served), options, tuning, model.name, write=False)
    except (IntegrityError, KeyError):
        return False


def _kept(model: Path, version: int, bundle: Bundle, files: Mapping[str, Path]) -> list[int]:
    """The version before, if one configuration can describe both."""
    if not (model / CONFIG).is_file():
        return []
    served = [number for number in served_version_ids(read_config(model / CONFIG)) if number < version]
    if not served:
        return []
    before = model / str(max(served))
    same = _manifest(before).get("signature") == bundle.manifest["signature"]
    runs = all((before / file).is_file() for file in files if file != SIGNATURE)
    return [max(served)] if same and runs else []


def _files(bundle: Bundle, options: Options, plan: Path | None) -> dict[str, Path]:
    """Where each file of a version folder comes from."""
    how = BACKENDS[options.backend]
    if how.format is None and (plan is None or not plan.is_file()):
        raise InputError(f"backend {options.backend} needs an engine for this GPU: build it (trtexec), give it as plan")
    model = plan if how.format is None else bundle.model_file(how.format)
    assert model is not None
    files = {how.file: model, GOLDEN: bundle.path / GOLDEN, MANIFEST: bundle.path / MANIFEST}
    if (bundle.path / SIGNATURE).is_file():
        files[SIGNATURE] = bundle.path / SIGNATURE
    if options.runs_shim:
        files[SHIM.name] = SHIM
    return files


def _holds(folder: Path, files: Mapping[str, Path], bundle: Bundle) -> bool:
    """Whether a version folder is what `_fill` would write (a re-export may differ in its manifest alone)."""
    if not (folder / MANIFEST).is_file() or _manifest(folder).get("version_id") != bundle.version_id:
        return False
    return all(
        (folder / file).is_file() and file_sha256(folder / file) == file_sha256(source)
        for file, source in files.items()
        if file not in (MANIFEST, SIGNATURE)
    )


def _fill(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy what a version needs, and compare the copies with the manifest."""
    for file, source in files.items():
        shutil.copyfile(source, folder / file)
    seals = _manifest(folder)["files"]
    for file, source in files.items():
        if source.name in seals and file_sha256(folder / file) != seals[source.name]:
            raise IntegrityError(f"{source} changed while it was copied: deploy a bundle at rest")


@contextmanager
def _staged(model: Path) -> Iterator[Path]:
    """A temporary directory beside the repository that becomes the folder of a new model when the block ends.

    It may not lie in the repository: Triton takes every folder there for a model, hidden ones too, and would not start.
    """
    repository = model.parent.absolute()

    def refusal(error: OSError) -> InputError:
        return InputError(
            f"{model} cannot be published in one step ({error.strerror}): use a repository inside a folder of the same "
            f"file system that can be written to, such as {repository / 'models'}"
        )

    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{repository.name}-", dir=repository.parent))
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
