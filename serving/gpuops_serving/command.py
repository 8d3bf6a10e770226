"""The command lines of a tritonserver: on loopback for us, and the same repository in a container.

    python3 -m gpuops_serving.command /models     what the container runs (Dockerfile.cuda): proves the repository,
                                                  signatures included where keys are trusted, then becomes tritonserver

Whoever reaches a server's ports can use what is open there, so what nobody needs is closed: models cannot be loaded,
and the parts of the API that change tracing or logging or attach shared memory ask for a key that nobody has. That is a
second line only: CVE-2026-24206 and -24207 went around such keys (gpuops_serving.gates).
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuops.errors import GpuopsError
from gpuops_serving.repository import served_versions
from gpuops_serving.wire import Tls

HOST = "127.0.0.1"
CONTAINER_IMAGE = "gpuops-serving"
"""Image that Dockerfile.cuda builds."""
CONTAINER_PORTS = (8000, 8001, 8002)
"""HTTP, gRPC and metrics inside the container."""
CLOSED = ("trace", "logging", "shared-memory")
"""Parts of the API that nobody needs who asks a model: only the key opens them. Health, metadata, inference, statistics
and, without model control, the repository's index stay open."""
EXIT_TIMEOUT_S = 40
"""How long a server may finish its requests before it ends; whoever stops a container must wait longer."""
STOP_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class ServerTls:
    """TLS of a server's gRPC port; Triton's HTTP port has none, so put a proxy before that."""

    certificate: Path
    """The server's certificate, PEM."""
    key: Path
    """Its private key, PEM."""
    root: Path | None = None
    """Certificates that clients must be signed by, PEM; None asks clients for none."""

    def flags(self) -> list[str]:
        """Flags of tritonserver; InputError if a file is missing or not what it should be, or the key is another's."""
        # gRPC says what is wrong in its own log lines only, and takes no encrypted key.
        Tls(self.root, self.certificate, self.key).context(password="")
        found = ["--grpc-use-ssl=1", f"--grpc-server-cert={self.certificate}", f"--grpc-server-key={self.key}"]
        return found if self.root is None else [*found, "--grpc-use-ssl-mutual=1", f"--grpc-root-cert={self.root}"]


def control_flags(models: Sequence[str], access: tuple[str, str] | None, *, shared_memory: bool = False) -> list[str]:
    """Flags that fix what is served at start, or let the owner of a key change it.

    Args:
        models: Names to load at start where models can be loaded later.
        access: (name, secret) of the key to the restricted APIs; None serves what is there and loads nothing later.
        shared_memory: Let every client attach memory of this host; a client could attach the server's own.
    """
    closed = [api for api in CLOSED if not (shared_memory and api == "shared-memory")]
    if access is None:  # a key that nobody has
        return ["--model-control-mode=none", *_restricted(closed, ("gpuops-closed", secrets.token_hex(16)))]
    return [
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        *_restricted(["model-repository", *closed], access),
    ]


def container_flags(repository: Path, host: str) -> list[str]:
    """Flags of tritonserver inside a container.

    Args:
        repository: Model repository, read-only.
        host: Address of the three ports. A port on a container's own loopback cannot be published, so it is 0.0.0.0
            there, and who publishes it says to whom.
    """
    return [
        f"--model-repository={repository}",
        *control_flags((), None),
        "--disable-auto-complete-config",  # `deploy` writes all of it
        *(f"--{endpoint}-address={host}" for endpoint in ("http", "grpc", "metrics")),
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
    ]


def container_command(repository: Path, ports: Sequence[int]) -> str:
    """The command that serves a repository in production: NVIDIA's current server, least privilege, one line a shell.

    Args:
        repository: Model repository, mounted read-only.
        ports: Ports of this host for HTTP, gRPC and metrics.
    """
    published = [
        option
        for outside, inside in zip(ports, CONTAINER_PORTS, strict=True)
        for option in ("-p", f"{HOST}:{outside}:{inside}")
    ]
    return shlex.join(
        [
            *("docker", "run", "--rm", "--gpus", "all", "--shm-size=256m", "--read-only"),
            # Not Docker's default, noexec: AOTInductor packages are unpacked there and loaded as code.
            *("--tmpfs", "/tmp:rw,exec,nosuid,nodev,size=1g"),
            *("--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--user=1000:1000"),
            f"--stop-timeout={STOP_TIMEOUT_S}",
            *("-v", f"{repository.absolute()}:/models:ro"),
            *published,
            CONTAINER_IMAGE,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove a repository, then become the tritonserver on PATH that serves it; returns only where that fails.

    Args:
        arguments: Of the command line; those that it does not know are passed on to tritonserver.
    """
    parser = argparse.ArgumentParser(
        prog="python3 -m gpuops_serving.command", description="Serve a model repository that `gpuops deploy` wrote."
    )
    parser.add_argument("repository", type=Path, help="model repository, mounted read-only")
    parser.add_argument("--host", default="0.0.0.0", help="address of the ports (default: 0.0.0.0, for a container)")
    options, flags = parser.parse_known_args(arguments)
    try:
        count = len(served_versions(options.repository))
        sys.stderr.write(f"gpuops: {options.repository} names {count} versions and holds them; starting tritonserver\n")
        sys.stderr.flush()
        os.execvp("tritonserver", ["tritonserver", *container_flags(options.repository, options.host), *flags])
    except GpuopsError as error:
        sys.stderr.write(f"gpuops: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"gpuops: tritonserver cannot be started ({error.strerror}): run this in Triton's container\n")
        return 4


def _restricted(apis: Sequence[str], access: tuple[str, str]) -> list[str]:
    """Flags that ask for a key, over both protocols: what one of them leaves open is open."""
    what, (key, secret) = ",".join(apis), access
    return [f"--http-restricted-api={what}:{key}={secret}", f"--grpc-restricted-protocol={what}:{key}={secret}"]


if __name__ == "__main__":
    sys.exit(main())
