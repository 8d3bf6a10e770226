"""`gpuops deploy` and `gpuops serve`."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuops.cli.output import fields, print_json
from gpuops.lineage.ledger import Ledger, ledger_path


def deploy(bundle: str, repository: str, name: str | None, json: bool) -> None:
    """Publish a bundle and tell the ledger."""
    from gpuops_serving.repository import deploy as run_deploy

    with Ledger(ledger_path()) as ledger:
        made = run_deploy(bundle, repository, name=name)
        found = {"model": made.name, "version": made.version, "version_id": made.version_id, "new": made.new}
        if made.new:
            ledger.append("deploy", {**found, "repository": repository})
    found["path"] = str(made.path)
    if json:
        print_json(found)
        return
    fields(found)
    if not made.new:
        sys.stdout.write("this version was deployed already; nothing was written\n")


def serve(
    repository: str, http_port: int, grpc_port: int, metrics_port: int, tritonserver: str | None, log: str | None
) -> None:
    """Serve until SIGINT or SIGTERM; one line a protocol as soon as the golden requests are answered."""
    from gpuops_serving.repository import served_versions
    from gpuops_serving.server import TritonServer
    from gpuops_serving.server import serve as run_server

    versions = served_versions(repository)
    server = TritonServer(
        repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        tritonserver=None if tritonserver is None else Path(tritonserver),
        log=None if log is None else Path(log),
    )
    with Ledger(ledger_path()) as ledger:

        def ready(running: TritonServer) -> None:
            served = {version.name: version.version_id for version in versions}
            ledger.append("serve", {"server": running.version, "models": served})
            for url in (running.http_url, running.grpc_url, running.metrics_url):
                sys.stdout.write(f"{url}\n")
            sys.stdout.flush()

        run_server(server, ready)
