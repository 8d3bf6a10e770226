"""What crosses the wire, as plain values: where a server is, how it is spoken to, what it says of its models."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

import numpy.typing as npt

from gpuops.errors import InputError

_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
CHANNEL = [
    *_UNLIMITED,
    # As over HTTP, no proxy from the environment: a model server is a neighbour, and loopback must stay on loopback.
    ("grpc.enable_http_proxy", 0),
    # Channels of one process share a connection, and with it the pause after a refusal, unless they are told not to.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC lets a second pass before it connects again, and refuses every call meanwhile: no retry would ever be early.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
"""Options of a gRPC channel."""
SCHEMES = ("http", "grpc", "https", "grpcs")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered, and which version did."""

    version: str
    """Version number of the model that answered."""
    outputs: dict[str, npt.NDArray[Any]]
    """Arrays by output name, each [n, *shape], in physical units."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """One version of a model in the server's repository."""

    name: str
    """Model name."""
    version: str
    """Version number; empty if the server has loaded none."""
    state: str
    """READY, UNAVAILABLE, LOADING or UNLOADING; empty if it was never loaded."""


class Tensor(TypedDict):
    """One tensor of a model, without its batch axis; dtype by NumPy's name, or Triton's where NumPy has none."""

    name: str
    dtype: str
    shape: list[int]


class ModelConfig(TypedDict):
    """What a client needs to know of a model."""

    name: str
    max_batch_size: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, str]
    stateful: bool


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates of a connection, PEM files."""

    root: Path | None = None
    """Who must have signed the server's certificate, and nobody else; None is the system's list."""
    certificate: Path | None = None
    """Our certificate, where the server asks for one (mutual TLS)."""
    key: Path | None = None
    """Its private key."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InputError("TLS with a certificate of our own needs its key too: give both or neither")
        for file in (self.root, self.certificate, self.key):
            if file is not None and not file.is_file():
                raise InputError(f"TLS file {file} is not there: name PEM files")

    def context(
        self, create: Callable[..., ssl.SSLContext] = ssl.create_default_context, password: str | None = None
    ) -> ssl.SSLContext:
        """For HTTP.

        Args:
            create: Makes a context of another event loop's kind.
            password: Of an encrypted key; asked for if None.

        Raises:
            InputError: a file holds no certificate or key, or the key is of another certificate.
        """
        try:
            context = create(cafile=None if self.root is None else str(self.root))
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password)
        except ssl.SSLError as error:
            raise InputError(
                f"TLS files {self._names()} cannot be used ({error}): name PEM files, the certificate's own key, not "
                "encrypted"
            ) from error
        return context

    def grpc(self) -> dict[str, Any]:
        """For gRPC, as tritonclient takes it; InputError as `context`, which gRPC itself would only say in its log."""
        self.context()
        root = self.root
        if root is None and (system := ssl.get_default_verify_paths().cafile):
            root = Path(system)  # gRPC would take a list of its own
        files = {"root_certificates": root, "private_key": self.key, "certificate_chain": self.certificate}
        return {"ssl": True, **{name: None if file is None else str(file) for name, file in files.items()}}

    def _names(self) -> str:
        return ", ".join(str(file) for file in (self.root, self.certificate, self.key) if file is not None)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is and how it is spoken to."""

    url: str
    """As it was given."""
    grpc: bool
    """gRPC rather than HTTP."""
    tls: Tls | None
    """None is plain text."""
    headers: Mapping[str, str] = field(repr=False)
    """Sent with every call, the key of restricted APIs included, so never printed."""
    timeout_s: float
    """Longest wait for one answer, retries included."""
    retries: int
    """How often a call that is safe to repeat is tried again."""

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return urlsplit(self.url).netloc

    @classmethod
    def parse(
        cls,
        url: str,
        timeout_s: float,
        tls: Tls | None,
        access: tuple[str, str] | None,
        headers: Mapping[str, str] | None,
        retries: int,
    ) -> Address:
        """Check and join what a client was given; see `Client`."""
        try:
            parts = urlsplit(url)
        except ValueError:  # half a bracket
            parts = urlsplit("")
        try:
            complete = bool(parts.hostname and parts.port)
        except ValueError:  # a port that is no number
            complete = False
        more = parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None
        if parts.scheme not in SCHEMES or not complete or more:
            raise InputError(
                f"{url!r} is not a server: write http://HOST:PORT or grpc://HOST:PORT (https, grpcs for TLS)"
            )
        if tls is not None and not parts.scheme.endswith("s"):
            raise InputError(f"{url!r} is plain text and TLS files were given: write {parts.scheme}s://{parts.netloc}")
        if timeout_s <= 0 or retries < 0:
            raise InputError(f"timeout {timeout_s:g} s, {retries} retries: more than 0 s, 0 retries or more")
        grpc = parts.scheme.startswith("grpc")
        sent = dict(headers or {})
        if access is not None:
            name, secret = access
            sent[f"triton-grpc-protocol-{name}" if grpc else name] = secret
        for name, value in sent.items():
            if not _HEADER.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise InputError(f"header {name!r} cannot be sent: letters, digits and '-', its value printable ASCII")
        if grpc:  # metadata is lower case
            sent = {name.lower(): value for name, value in sent.items()}
        if tls is None and parts.scheme.endswith("s"):
            tls = Tls()
        return cls(url, grpc, tls, sent, timeout_s, retries)
