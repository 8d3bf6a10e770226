"""`gpuops publish` and `gpuops fetch`: repositories in object stores."""

from __future__ import annotations

from typing import Any

from gpuops.cli.output import fields, say
from gpuops.cli.serving import public_keys
from gpuops.lineage.ledger import Ledger, ledger_path


def publish(repository: str, store: str, trusted: list[str]) -> None:
    """Upload what a repository serves, make it current, and tell the ledger."""
    from gpuops_serving.objects import publish_repository

    with Ledger(ledger_path()) as ledger:
        made = publish_repository(repository, store, keys=public_keys(trusted), say=say)
        ledger.append("publish", {"store": store, **_told(made)})
    fields({"store": store, **_told(made)})


def fetch(store: str, repository: str, number: int | None, trusted: list[str], overwrite: bool) -> None:
    """Download a repository for serving, and tell the ledger."""
    from gpuops_serving.objects import fetch_repository

    with Ledger(ledger_path()) as ledger:
        made = fetch_repository(
            store, repository, number=number, overwrite=overwrite, keys=public_keys(trusted), say=say
        )
        ledger.append("fetch", {"store": store, "repository": repository, **_told(made)})
    fields({"repository": repository, **_told(made)})


def _told(pointer: Any) -> dict[str, Any]:
    return {"number": pointer.number, "snapshot": pointer.snapshot}
