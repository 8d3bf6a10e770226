"""Where a URL points: a local path or an object store, and what lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from gpuops.errors import InputError

if TYPE_CHECKING:
    import zarr.abc.store


class Entry(NamedTuple):
    """One object of a store."""

    key: str
    """Key below the root of the store."""
    size: int
    """Bytes."""
    etag: str | None
    """What the object store says its content is; None for files."""


def local_path(url: str | Path) -> Path | None:
    """The path behind a path or a `file://` URL; None for an object store."""
    text = str(url)
    if "://" not in text:
        return Path(text)
    parts = urlsplit(text)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def object_store(url: str) -> Any:
    """The obstore store behind `s3://`, `gs://`, `az://` or `http(s)://`, with the environment's settings (AWS_*, ...).

    Raises:
        InputError: a scheme that obstore does not know, or settings that do not fit.
    """
    import obstore.exceptions
    import obstore.store

    try:
        if url.startswith("http://"):
            return obstore.store.from_url(url, client_options={"allow_http": True})
        return obstore.store.from_url(url)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise cannot_open(url, error) from error


def cannot_open(url: str, error: Exception) -> InputError:
    """The one line for a URL that does not open."""
    reason = " ".join(str(error).splitlines()[:1]).strip() or type(error).__name__
    return InputError(
        f"{url} cannot be opened ({reason}): check the URL (a path, file://, s3://, gs://, az://, https://) and the "
        "access (AWS_ENDPOINT_URL, AWS_REGION, credentials)"
    )


def is_icechunk(url: str | Path) -> bool:
    """Whether an Icechunk repository lies there; one list request on an object store, none on what cannot list."""
    path = local_path(url)
    if path is not None:
        return (path / "snapshots").is_dir()
    if str(url).startswith("http"):
        return False
    import obstore
    import obstore.exceptions

    try:
        found = obstore.list_with_delimiter(object_store(str(url)))
    except obstore.exceptions.BaseError:  # no right to list, or no such bucket: opening as plain Zarr says which
        return False
    prefixes = {str(prefix).rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}
    objects = {str(entry["path"]).rpartition("/")[2] for entry in found["objects"]}
    return "snapshots" in prefixes and not objects & {"zarr.json", ".zgroup", ".zarray"}


def can_list(store: zarr.abc.store.Store) -> bool:
    """Whether a store tells its keys: a web server does not."""
    import obstore.store
    from zarr.storage import ObjectStore

    from gpuops.data.view import View

    if isinstance(store, View):
        return all(map(can_list, store.members.values()))
    return not (isinstance(store, ObjectStore) and isinstance(store.store, obstore.store.HTTPStore))


def entries(store: zarr.abc.store.Store, prefix: str = "") -> Iterator[Entry] | None:
    """Objects of a store, in no order, sizes without a request each; None where a store cannot list with sizes."""
    from zarr.storage import LocalStore, ObjectStore

    if isinstance(store, LocalStore):
        return _files(str(store.root), prefix)
    if isinstance(store, ObjectStore) and can_list(store):
        return _objects(store.store, prefix)
    return None


def _files(root: str, prefix: str) -> Iterator[Entry]:
    pending = [os.path.join(root, prefix)]
    while pending:
        try:
            with os.scandir(pending.pop()) as listed:
                for entry in listed:
                    if entry.is_dir():
                        pending.append(entry.path)
                    else:
                        yield Entry(os.path.relpath(entry.path, root), entry.stat().st_size, None)
        except FileNotFoundError:  # an array without a single chunk has no folder
            continue


def _objects(store: Any, prefix: str) -> Iterator[Entry]:
    import obstore

    for page in obstore.list(store, prefix or None):
        for found in page:
            yield Entry(str(found["path"]), int(found["size"]), found["e_tag"])
