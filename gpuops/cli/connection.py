"""The options that say which server a command talks to, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuops.errors import InputError

OPTIONS = ("server", "timeout", "header", "access", "tls_root", "tls_certificate", "tls_key")


def add_connection(sub: Any, server: str = "http://127.0.0.1:8000") -> None:
    """Add the options to a command."""
    sub.add_argument("--server", default=server, help="http://HOST:PORT or grpc://HOST:PORT (https, grpcs for TLS)")
    sub.add_argument("--timeout", type=float, default=30.0, metavar="S", help="longest wait for an answer, seconds")
    sub.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with every call")
    sub.add_argument("--access", metavar="FILE", help="key file of restricted APIs, as `gpuops serve --control` writes")
    sub.add_argument("--tls-root", metavar="PEM", help="who signed the server's certificate")
    sub.add_argument("--tls-certificate", metavar="PEM", help="our certificate, for mutual TLS")
    sub.add_argument("--tls-key", metavar="PEM", help="its key")


@dataclass(frozen=True, slots=True)
class Connection:
    """Which server, and how."""

    server: str
    """URL."""
    timeout_s: float
    """Longest wait for an answer."""
    headers: dict[str, str]
    """Sent with every call."""
    access: tuple[str, str] | None
    """Name and secret of the key to restricted APIs."""
    tls: tuple[str | None, str | None, str | None]
    """PEM files: root, certificate, key."""

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Connection:
        """Take the connection's options out of a command's."""
        server, timeout, header, access, *tls = (options.pop(name) for name in OPTIONS)
        headers = dict(_pair(text) for text in header)
        return cls(server, timeout, headers, None if access is None else read_access(Path(access)), tuple(tls))

    def client(self, timeout_s: float | None = None) -> Any:
        """A `gpuops_serving.Client` of it."""
        from gpuops_serving.client import Client

        return Client(self.server, self.timeout_s if timeout_s is None else timeout_s, **self.options())

    def triton(self) -> Any:
        """A `gpuops_serving.Triton` of it."""
        from gpuops_serving.triton import Triton

        return Triton(self.server, timeout_s=self.timeout_s, **self.options())

    def options(self) -> dict[str, Any]:
        """What `Client` takes besides URL and timeout."""
        from gpuops_serving.client import Tls

        paths = [None if file is None else Path(file) for file in self.tls]
        tls = Tls(*paths) if any(paths) else None
        return {"tls": tls, "access": self.access, "headers": self.headers}


def read_access(file: Path) -> tuple[str, str]:
    """Name and secret in a key file, one line `NAME SECRET`."""
    try:
        name, secret = file.read_text().split()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} holds no key ({error}): name the file that `gpuops serve --control FILE` wrote"
        ) from error
    return name, secret


def _pair(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise InputError(f"--header {text!r}: write NAME:VALUE")
    return name.strip(), value.strip()
