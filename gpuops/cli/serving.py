"""`gpuops deploy` and `gpuops serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuops.bundle import read_bundle
from gpuops.cli.output import fields, print_json, say
from gpuops.errors import InputError
from gpuops.lineage.ledger import Ledger, ledger_path


def deploy(
    bundle: str,
    repository: str,
    name: str | None,
    tune: bool,
    plan: str | None,
    trusted: list[str],
    json: bool,
    **how: Any,
) -> None:
    """Publish a bundle and tell the ledger."""
    from gpuops_serving.repository import deploy as run_deploy
    from gpuops_serving.tuning import tune as run_tune

    options, tuning = serving_options(**how), None
    if tune:
        flags = {"instances": "--instances", "threads": "--threads", "micro_batch": "--micro-batch"}
        if named := [flag for key, flag in flags.items() if how[key] is not None]:
            raise InputError(f"--tune measures what {', '.join(named)} would set: leave {' and '.join(named)} out")
        opened = read_bundle(bundle)
        tuning = run_tune(opened, options=options, say=say)
        options = tuning.apply(options, opened.signature.max_batch)
    with Ledger(ledger_path()) as ledger:
        made = run_deploy(
            bundle,
            repository,
            name=name,
            options=options,
            tuning=tuning,
            plan=None if plan is None else Path(plan),
            keys=public_keys(trusted),
        )
        found = {"model": made.name, "version": made.version, "version_id": made.version_id, "new": made.new}
        if made.new:
            ledger.append("deploy", {**found, "repository": repository})
    found |= {"path": str(made.path), "kept": list(made.kept)}
    if tuning is not None:
        found["tuning"] = tuning.to_json()
    if json:
        print_json(found)
        return
    fields({key: value for key, value in found.items() if key not in ("kept", "tuning") or value})
    if not made.new:
        sys.stdout.write("this version was deployed already; nothing was written\n")


def serve(
    repository: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    control: str | None,
    shared_memory: bool,
    tls_certificate: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    tls_mutual: bool,
    trusted: list[str],
    trace: str | None,
    tritonserver: str | None,
    log: str | None,
    container: bool,
) -> None:
    """Serve until SIGINT or SIGTERM; one line a protocol as soon as the golden requests are answered."""
    from gpuops_serving.command import container_command
    from gpuops_serving.gates import security_warnings
    from gpuops_serving.repository import served_versions
    from gpuops_serving.server import TritonServer
    from gpuops_serving.server import serve as run_server
    from gpuops_serving.trace import trace_flags

    keys = public_keys(trusted)
    versions = served_versions(repository, keys=keys)
    if control is not None and Path(control).exists():
        raise InputError(
            f"--control {control} is there: another server may have written it; name a new file, or remove it"
        )
    if container:
        sys.stdout.write(container_command(Path(repository), (http_port, grpc_port, metrics_port)) + "\n")
        return
    tls, client = _tls(tls_certificate, tls_key, tls_ca, tls_mutual)
    server = TritonServer(
        repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        tritonserver=None if tritonserver is None else Path(tritonserver),
        log=None if log is None else Path(log),
        control=control is not None,
        tls=tls,
        client=client,
        keys=keys,
        shared_memory=shared_memory,
        flags=[] if trace is None else trace_flags(Path(trace).absolute()),
    )
    written: list[Path] = []
    with Ledger(ledger_path()) as ledger:

        def ready(running: TritonServer) -> None:
            served = {f"{version.name}:{version.version}": version.version_id for version in versions}
            ledger.append("serve", {"server": running.version, "models": served})
            for warning in security_warnings(running.version):
                say(f"warning: {warning}")
            if control is not None and running.access is not None:
                write_access(Path(control), running.access)
                written.append(Path(control))
            for url in (running.http_url, running.grpc_url, running.metrics_url):
                sys.stdout.write(f"{url}\n")
            sys.stdout.flush()

        try:
            run_server(server, ready)
        finally:
            for file in written:
                file.unlink(missing_ok=True)


def serving_options(
    backend: str,
    gpu: bool,
    instances: int | None,
    threads: int | None,
    micro_batch: int | None,
    delay_us: int,
    queue_size: int,
    tag: list[str],
    server_version: str,
) -> Any:
    """What the options of a command say of how a model is served."""
    from gpuops_serving.config import Batching, Options

    tags = dict(text.split("=", 1) for text in tag if "=" in text)
    if len(tags) < len(tag):
        raise InputError(f"--tag {' '.join(tag)}: write KEY=VALUE, each key once")
    return Options(
        backend=backend,
        gpu=gpu,
        instances=1 if instances is None else instances,
        threads=0 if threads is None else threads,
        micro_batch=0 if micro_batch is None else micro_batch,
        batching=Batching(delay_us=delay_us, queue_size=queue_size),
        tags=tags,
        server_version=server_version,
    )


def public_keys(trusted: Sequence[str]) -> list[Path] | None:
    """Public keys that were named; None leaves it to $GPUOPS_TRUSTED_KEYS."""
    return [Path(key) for key in trusted] or None


def write_access(file: Path, access: tuple[str, str]) -> None:
    """Keep the key of a server's restricted APIs where its owner alone can read it."""
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(" ".join(access) + "\n")
    except OSError as error:
        raise InputError(f"the key cannot be written to {file} ({error.strerror}): name another file") from error


def _tls(certificate: str | None, key: str | None, ca: str | None, mutual: bool) -> tuple[Any, dict[str, Any]]:
    """The server's TLS, and what the proof at its start needs to reach it."""
    from gpuops_serving.client import Tls
    from gpuops_serving.command import ServerTls

    if certificate is None or key is None:
        if certificate is not None or key is not None or ca is not None or mutual:
            raise InputError("TLS needs --tls-certificate and --tls-key (and --tls-ca with --tls-mutual)")
        return None, {}
    root = Path(ca or certificate)  # a certificate that signed itself is its own root
    own = (Path(certificate), Path(key)) if mutual else (None, None)
    return ServerTls(Path(certificate), Path(key), root if mutual else None), {"tls": Tls(root, *own)}
