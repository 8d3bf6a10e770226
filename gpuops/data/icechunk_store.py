"""Icechunk repositories on any storage: opening one at a snapshot, tag, branch or time, and its history."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gpuops.data.place import local_path
from gpuops.errors import InputError

if TYPE_CHECKING:
    import icechunk
    import zarr.abc.store


def storage(url: str | Path) -> icechunk.Storage:
    """Icechunk storage behind a path or URL; on object stores with the environment's settings.

    S3 reads AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, AWS_REGION (or AWS_DEFAULT_REGION) and AWS_SKIP_SIGNATURE (no
    credentials), as obstore does; credentials come from the usual AWS_* variables and profiles. Google and Azure
    (AZURE_STORAGE_ACCOUNT_NAME) likewise.

    Raises:
        InputError: a scheme that Icechunk has no storage for.
    """
    import icechunk

    path = local_path(url)
    if path is not None:
        return local_storage(path)
    parts = urlsplit(str(url))
    prefix, environ = parts.path.strip("/"), os.environ
    match parts.scheme:
        case "s3" | "s3a":
            endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
            anonymous = _true(environ.get("AWS_SKIP_SIGNATURE"))
            return icechunk.s3_storage(
                bucket=parts.netloc,
                prefix=prefix,
                region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION"),
                endpoint_url=endpoint,
                allow_http=_true(environ.get("AWS_ALLOW_HTTP")) or str(endpoint).startswith("http://"),
                force_path_style=endpoint is not None,  # endpoints of one's own rarely have a name for each bucket
                anonymous=anonymous or None,
                from_env=None if anonymous else True,
            )
        case "gs" | "gcs":
            return icechunk.gcs_storage(bucket=parts.netloc, prefix=prefix, from_env=True)
        case "az" | "azure":
            account = environ.get("AZURE_STORAGE_ACCOUNT_NAME")
            if account is None:
                raise InputError(f"{url}: set AZURE_STORAGE_ACCOUNT_NAME to the storage account")
            return icechunk.azure_storage(account=account, container=parts.netloc, prefix=prefix, from_env=True)
    raise InputError(f"Icechunk has no storage for {url}: use a path, file://, s3://, gs:// or az://")


def local_storage(path: Path) -> icechunk.Storage:
    """Icechunk storage in a local directory, without its warning about concurrent commits: an ingest commits once."""
    import icechunk

    icechunk.set_logs_filter("error")
    return icechunk.local_filesystem_storage(str(path))


def open_session(url: str | Path, reference: str | None) -> tuple[zarr.abc.store.Store, str]:
    """(read-only store, snapshot id) of a repository.

    Args:
        url: the repository.
        reference: a snapshot id, a tag, a branch or an ISO 8601 time (the last commit on `main` at that time; UTC
            where it names no zone); the tip of `main` if None. Tags go before branches of the same name.

    Raises:
        InputError: no repository, one that this Icechunk cannot read, or nothing of that name.
    """
    import icechunk

    try:
        repository = icechunk.Repository.open(storage(url))
        session = repository.readonly_session(**_place(repository, reference))
    except (icechunk.IcechunkError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if needs_newer(url):
            raise InputError(
                f"{url} is written in Icechunk's format 2, which icechunk {icechunk.__version__} cannot read: "
                "pip install 'icechunk>=2' (Python 3.12), or write it with spec_version=1"
            ) from error
        reason = str(error).splitlines()[0].strip()
        raise InputError(
            f"{url} is no Icechunk repository with that snapshot ({reason}): see `gpuops inspect {url}`"
        ) from error
    return session.store, session.snapshot_id


def needs_newer(url: str | Path) -> bool:
    """Whether a repository has format 2 (a `repo` object at its root) and the installed Icechunk is older."""
    import icechunk

    if int(icechunk.__version__.partition(".")[0]) >= 2:
        return False
    path = local_path(url)
    if path is not None:
        return (path / "repo").is_file()
    import obstore
    import obstore.exceptions

    from gpuops.data.place import object_store

    try:
        obstore.head(object_store(str(url)), "repo")
    except (obstore.exceptions.BaseError, FileNotFoundError):
        return False
    return True


def _place(repository: icechunk.Repository, reference: str | None) -> dict[str, Any]:
    """What `readonly_session` is asked for."""
    if reference is None:
        return {"branch": "main"}
    if reference in repository.list_tags():
        return {"tag": reference}
    if reference in repository.list_branches():
        return {"branch": reference}
    try:
        time = datetime.datetime.fromisoformat(reference)
    except ValueError:
        return {"snapshot_id": reference}
    zoned = time if time.tzinfo is not None else time.replace(tzinfo=datetime.UTC)
    return {"branch": "main", "as_of": zoned}


def history(url: str | Path, snapshot: str) -> list[dict[str, Any]]:
    """Snapshots up to `snapshot`, newest first: id, written, message, and the tags and branches that point there."""
    import icechunk

    repository = icechunk.Repository.open(storage(url))
    tags = {name: repository.lookup_tag(name) for name in repository.list_tags()}
    branches = {name: repository.lookup_branch(name) for name in repository.list_branches()}
    return [
        {
            "id": info.id,
            "written": info.written_at.isoformat(timespec="seconds"),
            "message": info.message,
            "tags": sorted(name for name, target in tags.items() if target == info.id),
            "branches": sorted(name for name, target in branches.items() if target == info.id),
        }
        for info in repository.ancestry(snapshot_id=snapshot)
    ]


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on")
