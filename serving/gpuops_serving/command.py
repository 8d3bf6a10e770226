"""The command line of a tritonserver: loopback, nothing open that is not needed; and the same for a container."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuops.errors import InputError

HOST = "127.0.0.1"
CONTAINER_IMAGE = "gpuops-serving"
"""Image that Dockerfile.cuda builds."""
RESTRICTED = ("model-repository", "trace", "logging")
"""Parts of the API that need the key where models can be loaded through it: loading a model is running code."""


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
        """Flags of tritonserver; InputError if a file is missing."""
        for file in (self.certificate, self.key, self.root):
            if file is not None and not file.is_file():
                raise InputError(f"TLS file {file} is not there: name PEM files")
        found = ["--grpc-use-ssl=1", f"--grpc-server-cert={self.certificate}", f"--grpc-server-key={self.key}"]
        return found if self.root is None else [*found, "--grpc-use-ssl-mutual=1", f"--grpc-root-cert={self.root}"]


def control_flags(models: Sequence[str], access: tuple[str, str] | None) -> list[str]:
    """Flags that fix what is served at start, or let the owner of a key change it.

    Args:
        models: Names to load at start where models can be loaded later.
        access: (name, secret) of the key to the restricted APIs; None serves what is there and loads nothing later.
    """
    if access is None:
        return ["--model-control-mode=none"]
    key, secret = access
    apis = ",".join(RESTRICTED)
    return [
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        f"--http-restricted-api={apis}:{key}={secret}",
        f"--grpc-restricted-protocol={apis}:{key}={secret}",
    ]


def container_command(repository: Path, ports: Sequence[int]) -> str:
    """The command that serves a repository in production: NVIDIA's current server, least privilege, one line a shell.

    Args:
        repository: Model repository, mounted read-only.
        ports: Ports of this host for HTTP, gRPC and metrics.
    """
    published = [
        option
        for outside, inside in zip(ports, (8000, 8001, 8002), strict=True)
        for option in ("-p", f"{HOST}:{outside}:{inside}")
    ]
    return shlex.join(
        [
            *("docker", "run", "--rm", "--gpus", "all", "--shm-size=256m", "--read-only", "--tmpfs", "/tmp"),
            *("--cap-drop=ALL", "--security-opt=no-new-privileges", "--user", "1000:1000"),
            *("-v", f"{repository.absolute()}:/models:ro"),
            *published,
            CONTAINER_IMAGE,
        ]
    )
