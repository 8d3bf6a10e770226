"""A model repository in an object store: published whole, fetched whole, every byte checked.

    URL/snapshots/<id>/...        the files that the repository serves; <id> is the sha256 of their listing
    URL/listings/<id>.json        the listing: size and sha256 by path
    URL/pointers/00000003.json    which snapshot was current as of the third publication; each is written once

The current snapshot is what the pointer of the highest number names, and a pointer is written only if none of its
number is there: the one conditional write that every store knows (S3, Google, Azure, a file system). So of two who
publish at once one wins and the other is told, a publication that is killed leaves the pointers as they were, and
going back is one more pointer. A server that reads object stores itself can be given URL/snapshots/<id>.

obstore, the extra `data`, speaks to the store; its credentials come from the environment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from gpuops.atomic import locked, new_directory
from gpuops.bundle import FORMAT_FILES, GOLDEN, MANIFEST, file_sha256
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.lineage.version import canonical_json
from gpuops_serving.config import BACKENDS, CONFIG, WARMUP, backend_of, read_config
from gpuops_serving.folders import intact, named
from gpuops_serving.repository import ServedVersion, served_versions

SCHEMA = 1
_CHUNK = 8 << 20
_POINTER = re.compile(r"pointers/([0-9]{8})\.json")
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Pointer:
    """What an object store says is current, and since which publication."""

    number: int
    """Publications counted from 1; going back counts too."""
    snapshot: str
    """Id of the snapshot: sha256 of its listing."""
    models: Mapping[str, Mapping[str, str]]
    """Version id by model name and version number."""


def publish_repository(
    repository: str | Path,
    store: Any,
    *,
    expected: int | None = None,
    keys: Sequence[Path] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Pointer:
    """Upload what a repository serves, and make it current.

    Args:
        repository: Model repository that `deploy` wrote; nothing is deployed to it meanwhile.
        store: URL of the place (`s3://BUCKET/PREFIX`, `gs://`, `az://`, `file:///...`), or an obstore store.
        expected: Number of the pointer that this is meant to follow, 0 for the first; by default the one found now.
        keys: Public keys of which one must have signed each version; by default those of $GPUOPS_TRUSTED_KEYS.
        say: Told what is uploaded.

    Returns:
        The pointer that names it; the one that was there if it did already.

    Raises:
        InputError: nothing is deployed there, the place cannot be used, or someone else published meanwhile.
        IntegrityError: a version is not what its manifest says, or not signed.
        UnavailableError: obstore is not installed, or the store cannot be reached.
    """
    if not named(repository).is_dir():
        raise InputError(f"{repository} is not a model repository: make one with `gpuops deploy BUNDLE {repository}`")
    opened = _open(store, create=True)
    with _translated(store):
        before = _current(opened)
        found = 0 if before is None else before.number
        if expected is not None and expected != found:
            raise InputError(f"{store} is at publication {found}, not {expected}: fetch it, look, and publish again")
        with locked(Path(repository)):
            served = served_versions(repository, keys=keys)
            files = dict(_served_files(Path(repository), served))
            listing = {path: {"size": file.stat().st_size, "sha256": file_sha256(file)} for path, file in files.items()}
            text = canonical_json({"schema": SCHEMA, "files": listing})
            snapshot = hashlib.sha256(text).hexdigest()
            if before is not None and before.snapshot == snapshot:
                return before
            for path, file in files.items():
                say(f"{path} ({listing[path]['size']} bytes)")
                opened.put(f"snapshots/{snapshot}/{path}", file)
        opened.put(f"listings/{snapshot}.json", text)
        models: dict[str, dict[str, str]] = {}
        for version in served:
            models.setdefault(version.name, {})[str(version.version)] = version.version_id
        return _point(opened, store, Pointer(found + 1, snapshot, models))


def fetch_repository(
    store: Any,
    destination: str | Path,
    *,
    number: int | None = None,
    overwrite: bool = False,
    keys: Sequence[Path] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Pointer:
    """Download a repository for serving; every byte is compared with its listing, and the listing with its id.

    Args:
        store: As for `publish_repository`.
        destination: Folder for the repository; it appears whole or not at all.
        number: Publication to fetch; the current one if None.
        overwrite: Replace a folder that is there.
        keys: Public keys of which one must have signed each version; by default those of $GPUOPS_TRUSTED_KEYS.
        say: Told what is downloaded.

    Returns:
        The pointer that was followed.

    Raises:
        InputError: nothing was published there, or the destination exists.
        IntegrityError: an object is missing or changed, or a version is not what its manifest says.
        UnavailableError: obstore is not installed, the store cannot be reached, or the disk is full.
    """
    folder, opened = named(destination), _open(store)
    with _translated(store):
        pointer = _current(opened) if number is None else _read(opened, number)
        if pointer is None:
            raise InputError(f"{store} has no publication {number or ''}: publish a repository there first")
        listing = _listing(opened, pointer.snapshot)
        with new_directory(folder, overwrite=overwrite) as temporary:
            for path, about in listing.items():
                say(f"{path} ({about['size']} bytes)")
                _download(opened, f"snapshots/{pointer.snapshot}/{path}", temporary / path, about)
            served_versions(temporary, keys=keys)
        return pointer


def repoint(store: Any, number: int, *, expected: int | None = None) -> Pointer:
    """Make the snapshot of an earlier publication current again; returns the new pointer.

    Args:
        store: As for `publish_repository`.
        number: The earlier publication.
        expected: Number of the pointer that this is meant to follow; by default the one found now.

    Raises:
        InputError: no such publication, or someone else published meanwhile.
        UnavailableError: as `publish_repository`.
    """
    opened = _open(store)
    with _translated(store):
        earlier, now = _read(opened, number), _current(opened)
        if earlier is None or now is None:
            raise InputError(f"{store} has no publication {number}: name one that there is")
        if expected is not None and expected != now.number:
            raise InputError(f"{store} is at publication {now.number}, not {expected}: look, and decide again")
        return _point(opened, store, Pointer(now.number + 1, earlier.snapshot, earlier.models))


def current(store: Any) -> Pointer | None:
    """The current pointer of a place; None if nothing was published there.

    Raises:
        InputError, UnavailableError: as `publish_repository`.
    """
    opened = _open(store)
    with _translated(store):
        return _current(opened)


class _Place:
    """An obstore store, reduced to what is needed here."""

    def __init__(self, store: Any, obstore: Any) -> None:
        self.store, self.obstore = store, obstore

    def put(self, path: str, content: bytes | Path) -> None:
        self.obstore.put(self.store, path, content)

    def create(self, path: str, content: bytes) -> bool:
        """Write an object unless there is one of that name; whether it was written."""
        try:
            self.obstore.put(self.store, path, content, mode="create")
        except self.obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def get(self, path: str) -> bytes | None:
        """An object's bytes; None if there is none."""
        try:
            return bytes(self.obstore.get(self.store, path).bytes())
        except FileNotFoundError:
            return None

    def chunks(self, path: str) -> Iterator[bytes]:
        try:
            found = self.obstore.get(self.store, path)
        except FileNotFoundError as error:
            raise IntegrityError(f"object {path} is missing: publish the repository again") from error
        for chunk in found.stream(min_chunk_size=_CHUNK):
            yield bytes(chunk)

    def names(self, prefix: str) -> Iterator[str]:
        for chunk in self.obstore.list(self.store, prefix=prefix):
            for entry in chunk:
                yield entry["path"]


def _open(store: Any, *, create: bool = False) -> _Place:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UnavailableError("obstore is not installed: pip install 'gpuops[data]'") from error
    if not isinstance(store, str):
        return _Place(store, obstore)
    try:
        if store.startswith("file:"):
            folder = Path(unquote(urlsplit(store).path))
            if not folder.name:
                raise InputError(f"{store!r} names no folder: write file:///FOLDER")
            if create:
                return _Place(obstore.store.LocalStore.from_url(store, mkdir=True), obstore)
            if not folder.is_dir():
                raise InputError(f"{store} is no folder, so nothing was published there: publish a repository first")
        return _Place(obstore.store.from_url(store), obstore)
    except InputError:
        raise
    except OSError as error:
        raise UnavailableError(f"{store} cannot be used ({error}): name a folder that can be written to") from error
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise InputError(f"{store!r} is no object store: write s3://BUCKET/PREFIX or file:///FOLDER") from error


@contextmanager
def _translated(store: Any) -> Iterator[None]:
    """Turn what obstore and the file system raise into our error."""
    import obstore.exceptions

    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UnavailableError(
            f"{store} cannot be used ({reason}): see its address, your credentials, and the room on this disk"
        ) from error


def _current(place: _Place) -> Pointer | None:
    numbers = [int(found[1]) for name in place.names("pointers/") if (found := _POINTER.fullmatch(name))]
    return _read(place, max(numbers)) if numbers else None


def _read(place: _Place, number: int) -> Pointer | None:
    content = place.get(_pointer_name(number))
    if content is None:
        return None
    try:
        document = json.loads(content)
        newer = document.pop("schema") != SCHEMA
        pointer = None if newer else Pointer(**document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _stray(number, str(error)) from error
    if pointer is None:
        raise InputError(f"publication {number} is of a newer gpuops: use that one")
    if pointer.number != number or not _ID.fullmatch(str(pointer.snapshot)):
        raise _stray(number, "it names another")
    return pointer


def _stray(number: int, why: str) -> IntegrityError:
    return IntegrityError(
        f"publication {number} is not one of ours ({why}): fetch an earlier one by its number; to publish, remove "
        f"{_pointer_name(number)} first"
    )


def _pointer_name(number: int) -> str:
    return f"pointers/{number:08d}.json"


def _point(place: _Place, store: Any, pointer: Pointer) -> Pointer:
    """Write a pointer, or raise InputError if one of that number is there."""
    content = canonical_json({"schema": SCHEMA, **asdict(pointer)})
    if not _POINTER.fullmatch(_pointer_name(pointer.number)):
        raise InputError(f"{store} has the last publication there can be: remove {_pointer_name(pointer.number - 1)}")
    if not place.create(_pointer_name(pointer.number), content):
        other = _current(place)
        raise InputError(
            f"someone else published to {store} meanwhile (publication {other.number if other else pointer.number}): "
            "fetch that, look, and publish again"
        )
    return pointer


def _listing(place: _Place, snapshot: str) -> dict[str, dict[str, Any]]:
    """Size and sha256 by path, once it is known to be what the snapshot's id says."""
    text = place.get(f"listings/{snapshot}.json")
    if text is None or hashlib.sha256(text).hexdigest() != snapshot:
        raise IntegrityError(f"the listing of snapshot {snapshot[:12]} is missing or changed: publish it again")
    files: dict[str, dict[str, Any]] = json.loads(text)["files"]
    for path in files:
        parts = PurePosixPath(path).parts
        if not parts or PurePosixPath(path).is_absolute() or ".." in parts:
            raise IntegrityError(f"snapshot {snapshot[:12]} lists {path!r}, which leads elsewhere: do not use it")
    return files


def _download(place: _Place, name: str, file: Path, about: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for chunk in place.chunks(name):
            digest.update(chunk)
            size += len(chunk)
            stream.write(chunk)
    if (size, digest.hexdigest()) != (about["size"], about["sha256"]):
        raise IntegrityError(f"object {name} differs from its listing: publish the repository again")


def _served_files(repository: Path, served: Sequence[ServedVersion]) -> Iterator[tuple[str, Path]]:
    """(path in the repository, file) of all that a server needs, each version as its manifest seals it."""
    for name in sorted({version.name for version in served}):
        model = repository / name
        config = read_config(model / CONFIG)
        yield f"{name}/{CONFIG}", model / CONFIG
        samples = {str(tensor.input_data_file) for entry in config.model_warmup for tensor in entry.inputs.values()}
        for sample in sorted(samples - {""}):
            if not (model / WARMUP / sample).is_file():
                raise IntegrityError(f"{model / WARMUP / sample} is missing: deploy the newest bundle again")
            yield f"{name}/{WARMUP}/{sample}", model / WARMUP / sample
        how = BACKENDS[backend_of(config)]
        sealed = {GOLDEN: GOLDEN, MANIFEST: MANIFEST}
        if how.format is not None:
            sealed[how.file] = FORMAT_FILES[how.format]
        for number in [version.version for version in served if version.name == name]:
            folder = model / str(number)
            if not intact(folder, sealed):
                raise IntegrityError(f"{folder} differs from its manifest: deploy its bundle again")
            for file in sorted(path for path in folder.iterdir() if path.is_file()):
                yield f"{name}/{number}/{file.name}", file
