"""Publish a bundle as a model version in a Triton model repository.

    REPOSITORY/<name>/config.pbtxt     the pointer: which versions are served, and their wire format
    REPOSITORY/<name>/<version>/       immutable: model, golden.npz, manifest.json, signature; model.py is the shim
    REPOSITORY/<name>/warmup/          first golden sample, for backends that Triton warms up

A version folder is written under a temporary name and renamed; only then is config.pbtxt replaced, in one step, and it
names the versions to serve: the new one, the one before it, and those that ensembles name. So whoever reads the
repository sees the old versions or the new ones, never a mixture, also when a deployment is killed or the disk is full;
the next deployment removes what the killed one left. Triton's stub may leave a `__pycache__` in a version folder: only
listed files are read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuops.atomic import locked, new_directory
from gpuops.bundle import GOLDEN, Bundle, Golden, file_sha256, read_bundle
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.signing import SIGNATURE, trusted_keys, verify, verify_deployed
from gpuops.spec import Signature
from gpuops_serving.config import (
    CONFIG,
    ENSEMBLE,
    FORMAT,
    SAMPLE,
    VERSION_ID,
    WARMUP,
    Options,
    backend_dtype,
    config_text,
    model_config,
    read_config,
    served_version_ids,
)
from gpuops_serving.folders import (
    SHIM,
    fill,
    holds,
    intact,
    named,
    names_in,
    read_manifest,
    remove_unfinished,
    require_layout,
    sources,
    staged,
    versions_in,
    write_text,
)
from gpuops_serving.scheduling import Step
from gpuops_serving.trust import check_repository
from gpuops_serving.tuning import Tuning

__all__ = [
    "CANDIDATE",
    "SHIM",
    "Deployment",
    "ServedVersion",
    "deploy",
    "point",
    "publish",
    "require_name",
    "served_versions",
    "served_versions_of",
    "versions_in",
    "withdraw",
    "write_text",
]

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

    The version before stays served beside it if both take and answer the same tensors. A version folder is never
    changed: with other options, or after a roll-back, the newest one's own bundle is served from where it is.

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
        InputError: no bundle there, not this format in it, an unusable name, or an ensemble of what is not served.
        IntegrityError: the bundle differs from its manifest or no trusted key signed it.
        UnavailableError: the disk is full, or the repository cannot be written. After any error it is as it was.
    """
    bundle = read_bundle(bundle_path)
    name = require_name(bundle.name if name is None else name)
    return publish(bundle, named(repository), name, options or Options(), tuning=tuning, plan=plan, keys=keys)


def require_name(name: str) -> str:
    """The name, unless a model may not have it: InputError."""
    if not _NAME.fullmatch(name):
        raise InputError(f"model name {name!r}: use letters, digits, '_', '-' and '.' (it is put in URLs)")
    if name.endswith(CANDIDATE):
        raise InputError(f"model name {name!r}: {CANDIDATE!r} at the end is for versions on trial; name another")
    return name


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
    require_name(name.removesuffix(CANDIDATE))
    trusted = trusted_keys() if keys is None else keys
    if trusted:
        verify(bundle.path, trusted)
    if ENSEMBLE in bundle.manifest:
        options = replace(options, backend=ENSEMBLE)
    files = sources(bundle, options, plan)
    model = repository / name
    with _writing(model):
        require_layout(model)
        repository.mkdir(parents=True, exist_ok=True)
        with locked(repository):  # one deployment at a time chooses a version number
            _require_steps(bundle, repository)
            return _publish(bundle, model, options, files, number, tuning, trusted)


@contextmanager
def _writing(model: Path) -> Iterator[None]:
    """Turn what a file system refuses into our error."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            f"{model} could not be written ({error.strerror or error}), and serves what it did: make room or get leave "
            "to write, and try again"
        ) from error


def _publish(
    bundle: Bundle,
    model: Path,
    options: Options,
    files: Mapping[str, Path],
    number: int | None,
    tuning: Tuning | None,
    keys: Sequence[Path],
) -> Deployment:
    """As `publish`, for a locked repository."""
    remove_unfinished(model)
    newest = max(versions_in(model), default=0)
    written = newest > 0 and number in (None, newest) and holds(model / str(newest), files, bundle)
    if written and _names(model, newest, options, tuning):
        kept = sorted(served_version_ids(read_config(model / CONFIG)).keys() - {newest})
        return Deployment(model.name, newest, model / str(newest), bundle.version_id, new=False, kept=tuple(kept))
    version = newest if written else newest + 1 if number is None else number
    folder = model / str(version)
    kept = _kept(model, version, bundle, files, keys)

    def write(temporary: Path) -> None:
        fill(temporary, files)
        if keys:
            verify_deployed(temporary, keys)  # the copy, whatever the bundle has become meanwhile

    if not model.is_dir():
        with staged(model) as temporary:
            (temporary / str(version)).mkdir()
            write(temporary / str(version))
            point(temporary, [version], options, tuning, name=model.name)
    else:
        if not written:  # else a killed deployment wrote it, or the options are others
            with new_directory(folder, overwrite=number is not None) as temporary:
                write(temporary)
        try:
            _keep_configuration(model, kept, version)
            point(model, [*kept, version], options, tuning)
        except BaseException:
            if not written:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return Deployment(model.name, version, folder, bundle.version_id, new=True, kept=tuple(kept))


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
    text, samples = _pointer(model, versions, options, tuning, name or model.name)
    folder, begun = model / WARMUP, []
    try:
        for file, sample in samples.items():
            folder.mkdir(exist_ok=True)
            if not (folder / file).is_file() or (folder / file).read_bytes() != sample:  # half a one, left by a kill
                begun.append(folder / file)
                (folder / file).write_bytes(sample)
        write_text(model / CONFIG, text)
    except BaseException:
        for path in begun:
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def withdraw(model: Path, version: int) -> list[int]:
    """Serve a model without one of its versions; returns those that are served on.

    Raises:
        InputError: no other version is there to fall back on.
        UnavailableError: the disk is full, or the repository cannot be written; it is as it was.
    """
    with _writing(model), locked(model.parent):
        remove_unfinished(model)
        config = read_config(model / CONFIG)
        left = [number for number in served_version_ids(config) if number != version]
        if not left:
            left = [number for number in versions_in(model) if number < version][-1:]
            if not left:
                raise InputError(
                    f"{model} has no version but {version} to fall back on: deploy another bundle, or stop serving"
                )
            if (before := model / _served_as(left[0])).is_file():  # perhaps by another backend
                config = read_config(before)
        manifest = read_manifest(model / str(max(left)))
        for key in [key for key in config.parameters if key.startswith(f"{VERSION_ID}.")]:
            del config.parameters[key]
        for number in left:
            config.parameters[f"{VERSION_ID}.{number}"].string_value = read_manifest(model / str(number))["version_id"]
        config.parameters[VERSION_ID].string_value = manifest["version_id"]
        config.parameters[SAMPLE].string_value = json.dumps(manifest["sample"], sort_keys=True)
        config.version_policy.specific.versions[:] = sorted(left)
        if ENSEMBLE in manifest:
            del config.ensemble_scheduling.step[:]
            for step in _steps(manifest):
                step.write(config.ensemble_scheduling)
        write_text(model / CONFIG, config_text(config))
    return sorted(left)


def _served_as(version: int) -> str:
    """Name under which a model keeps the configuration that served a version, where the next one cannot describe it."""
    return f".served-{version}.pbtxt"


def _keep_configuration(model: Path, kept: Sequence[int], version: int) -> None:
    """Keep the pointer for `withdraw` where no version stays beside the new one, as when that has another backend."""
    if not kept and (model / CONFIG).is_file():
        before = [number for number in served_version_ids(read_config(model / CONFIG)) if number < version]
        if before:
            write_text(model / _served_as(max(before)), (model / CONFIG).read_text())


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
    if trusted := trusted_keys() if keys is None else keys:
        check_repository(repository, trusted)
    models = [folder for folder in sorted(repository.iterdir()) if folder.is_dir() and folder.suffix != CANDIDATE]
    if not models:
        raise InputError(f"{repository} holds no model: put one there with `gpuops deploy BUNDLE {repository}`")
    return [served for model in models for served in served_versions_of(model, trusted)]


def served_versions_of(model: Path, keys: Sequence[Path] = ()) -> list[ServedVersion]:
    """As `served_versions`, for one model's folder."""
    config = read_config(model / CONFIG) if (model / CONFIG).is_file() else None
    found = {} if config is None else served_version_ids(config)
    if config is None or not found:
        raise InputError(
            f"{model} was not written by `gpuops deploy`, so nothing proves its answers: move it to another repository"
        )
    format = config.parameters[FORMAT].string_value
    return [_served(model, number, version_id, format, keys) for number, version_id in sorted(found.items())]


def _served(model: Path, number: int, version_id: str, format: str, keys: Sequence[Path]) -> ServedVersion:
    folder = model / str(number)
    manifest = read_manifest(folder)
    try:
        seal, found = manifest["files"][GOLDEN], manifest["version_id"]
        tolerance = float((manifest["int8"] if format == "int8" else manifest)["tolerance"])
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


def _pointer(
    model: Path, versions: Sequence[int], options: Options, tuning: Tuning | None, name: str
) -> tuple[str, dict[str, bytes]]:
    """Text of the configuration that serves some versions, and the warm-up data that it names, by file."""
    manifests = {number: read_manifest(model / str(number)) for number in versions}
    newest = manifests[max(versions)]
    signature = Signature.from_json(newest["signature"])
    warmup: dict[str, str] = {}
    samples: dict[str, bytes] = {}
    if not options.runs_shim and options.backend != ENSEMBLE:
        golden = Golden.load(model / str(max(versions)) / GOLDEN)
        for spec in signature.inputs:
            warmup[spec.name] = f"{newest['version_id'][:16]}-{spec.name}"
            sample = golden.inputs[spec.name][:1].astype(backend_dtype(options.backend, spec.dtype))
            samples[warmup[spec.name]] = sample.tobytes()
    config = model_config(
        name,
        {number: manifest["version_id"] for number, manifest in manifests.items()},
        signature,
        sample=newest["sample"],
        options=options,
        warmup=warmup,
        tuning=None if tuning is None else tuning.to_json(),
        steps=_steps(newest),
    )
    return config_text(config), samples


def _names(model: Path, newest: int, options: Options, tuning: Tuning | None) -> bool:
    """Whether the configuration there is the one that would be written for the newest version."""
    if not (model / CONFIG).is_file():
        return False
    try:
        text = (model / CONFIG).read_text()
        served = served_version_ids(read_config(model / CONFIG))
        return newest in served and text == _pointer(model, list(served), options, tuning, model.name)[0]
    except (IntegrityError, KeyError):
        return False


def _kept(model: Path, version: int, bundle: Bundle, files: Mapping[str, Path], keys: Sequence[Path]) -> list[int]:
    """Versions before it that are served on: the last one, and what ensembles name.

    One configuration must be able to describe them all, and they must be as they were written, and signed if any key
    is trusted: else nothing of this model could be served.
    """
    if not (model / CONFIG).is_file():
        return []
    served = [number for number in served_version_ids(read_config(model / CONFIG)) if number < version]
    wanted = {max(served, default=0)} | (_named_by_ensembles(model) & set(served))
    return sorted(number for number in wanted if number and _alike(model / str(number), bundle, files, keys))


def _alike(folder: Path, bundle: Bundle, files: Mapping[str, Path], keys: Sequence[Path]) -> bool:
    sealed = {file: source.name for file, source in files.items() if file != SIGNATURE}
    # A file too many may be code that another backend runs: a server that trusts only signed files refuses it.
    if not folder.is_dir() or names_in(folder) - {SIGNATURE} != set(sealed) or not intact(folder, sealed):
        return False
    if keys:
        try:
            verify_deployed(folder, keys)
        except IntegrityError:
            return False
    manifest = read_manifest(folder)
    return all(manifest.get(key) == bundle.manifest.get(key) for key in ("signature", ENSEMBLE))


def _named_by_ensembles(model: Path) -> set[int]:
    """Versions of a model that ensembles of its repository name."""
    found: set[int] = set()
    for path in model.parent.glob(f"*/{CONFIG}"):
        try:
            steps = read_config(path).ensemble_scheduling.step
        except InputError:
            continue  # someone else's, which serves nothing
        found |= {step.model_version for step in steps if step.model_name == model.name}
    return found


def _steps(manifest: Mapping[str, Any]) -> list[Step]:
    """The steps of an ensemble's manifest; empty if it is none."""
    return [
        Step(step["model"], step["inputs"], step["outputs"], step["version"]) for step in manifest.get(ENSEMBLE, [])
    ]


def _require_steps(bundle: Bundle, repository: Path) -> None:
    """Raise InputError unless a repository serves what an ensemble joins."""
    for step in bundle.manifest.get(ENSEMBLE, []):
        path = repository / step["model"] / CONFIG
        served = served_version_ids(read_config(path)) if path.is_file() else {}
        if served.get(step["version"]) != step["version_id"]:
            raise InputError(
                f"{repository} does not serve version {step['version']} ({step['version_id'][:12]}) of "
                f"{step['model']!r}, which {bundle.name!r} joins: deploy that first, or make the ensemble again"
            )
