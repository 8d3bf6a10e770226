"""TLS and mutual TLS: against the real server over gRPC, and over HTTPS through a proxy, as Triton's HTTP has none."""

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from geventhttpclient.connectionpool import SSLConnectionPool
from tiny_bundle import deployed, golden

from gpuops.errors import InputError, UnavailableError
from gpuops_serving.aio import AsyncClient
from gpuops_serving.client import Client, Tls
from gpuops_serving.command import ServerTls
from gpuops_serving.server import TritonServer

GOLDEN = golden()


@dataclass(frozen=True)
class Authority:
    """Signs certificates; `root` is its own."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def root(self) -> Path:
        return self.folder / "root.pem"

    def issue(self, name: str, *, host: str = "127.0.0.1", days: int = 30) -> tuple[Path, Path]:
        """Certificate and key, PEM, for a host; with negative days, one that has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = build(name, key.public_key(), self.certificate.subject, self.key, days, host=host)
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        write(paths[0], certificate, paths[1], key)
        return paths


def build(
    name: str, public: Any, issuer: x509.Name | None, signer: Any, days: int, *, host: str | None
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    start, end = sorted((now - datetime.timedelta(days=1), now + datetime.timedelta(days=days)))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
    )
    if host is not None:
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(signer, hashes.SHA256())


def write(certificate: Path, document: x509.Certificate, secret: Path, key: ec.EllipticCurvePrivateKey) -> None:
    certificate.write_bytes(document.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def authority(folder: Path) -> Authority:
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = build(folder.name, key.public_key(), None, key, 30, host=None)
    write(folder / "root.pem", certificate, folder / "root.key", key)
    return Authority(folder, key, certificate)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tls") / "theirs")


def ask(url: str, tls: Tls | None, asynchronous: bool) -> float:
    """Largest difference of an answer from the golden one."""
    if not asynchronous:
        with Client(url, timeout_s=20, tls=tls) as client:
            return GOLDEN.max_abs_diff(client.infer("tiny", GOLDEN.inputs))

    async def one() -> float:
        async with AsyncClient(url, timeout_s=20, tls=tls) as client:
            return GOLDEN.max_abs_diff(await client.infer("tiny", GOLDEN.inputs))

    return asyncio.run(one())


both_clients = pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asyncio"])


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, ours: Authority) -> Iterator[TritonServer]:
    """The real server, which wants a certificate of ours from every client."""
    certificate, key = ours.issue("server")
    own, own_key = ours.issue("start")
    with TritonServer(
        deployed(tmp_path_factory.mktemp("mutual")),
        tls=ServerTls(certificate, key, root=ours.root),
        client={"tls": Tls(ours.root, own, own_key)},
    ) as running:
        yield running


@both_clients
def test_mutual_tls_answers_who_shows_a_certificate_and_trusts_the_servers(
    mutual: TritonServer, ours: Authority, asynchronous: bool
) -> None:
    assert mutual.grpc_url.startswith("grpcs://127.0.0.1:")
    assert ask(mutual.grpc_url, Tls(ours.root, *ours.issue("client")), asynchronous) <= 1e-3


@both_clients
@pytest.mark.parametrize("wrong", ["no certificate", "another authority's", "expired", "other root", "system's roots"])
def test_mutual_tls_answers_nobody_else(
    mutual: TritonServer, ours: Authority, theirs: Authority, wrong: str, asynchronous: bool
) -> None:
    tls = {
        "no certificate": lambda: Tls(ours.root),
        "another authority's": lambda: Tls(ours.root, *theirs.issue("client")),
        "expired": lambda: Tls(ours.root, *ours.issue("old", days=-20)),
        "other root": lambda: Tls(theirs.root, *ours.issue("client")),
        "system's roots": lambda: Tls(None, *ours.issue("client")),
    }[wrong]()
    with pytest.raises(UnavailableError, match=rf"no answer from {mutual.grpc_url}.*do the certificates fit"):
        ask(mutual.grpc_url, tls, asynchronous)


def test_a_plain_text_client_is_not_answered_by_a_server_with_tls(mutual: TritonServer) -> None:
    with pytest.raises(UnavailableError):
        ask(mutual.grpc_url.replace("grpcs:", "grpc:"), None, False)


@contextmanager
def proxy(upstream: str, context: ssl.SSLContext) -> Iterator[str]:
    """HOST:PORT of a proxy that ends TLS in front of a server, as nginx or an ingress does."""
    target = urlsplit(upstream)
    opened: list[asyncio.StreamWriter] = []
    ready = threading.Event()
    place: dict[str, Any] = {}

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inward, outward = await asyncio.open_connection(target.hostname, target.port)
        opened.extend([writer, outward])
        await asyncio.gather(pipe(reader, outward), pipe(inward, writer))

    async def serve() -> None:
        place.update(end=asyncio.Event(), loop=asyncio.get_running_loop())
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
        place["port"] = server.sockets[0].getsockname()[1]
        ready.set()
        await place["end"].wait()
        server.close()
        for writer in opened:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in opened), return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield f"127.0.0.1:{place['port']}"
    finally:
        place["loop"].call_soon_threadsafe(place["end"].set)
        thread.join(30)


def server_context(certificate: tuple[Path, Path], clients: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if clients is not None:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


both_protocols = pytest.mark.parametrize("scheme", ["https", "grpcs"])


def plain(server: TritonServer, scheme: str) -> str:
    return server.http_url if scheme == "https" else server.grpc_url


@both_clients
@both_protocols
def test_both_protocols_work_through_a_proxy_that_ends_tls_and_asks_for_a_certificate(
    server: TritonServer, ours: Authority, scheme: str, asynchronous: bool
) -> None:
    with proxy(plain(server, scheme), server_context(ours.issue("proxy"), ours.root)) as authority:
        url = f"{scheme}://{authority}"
        assert ask(url, Tls(ours.root, *ours.issue("client")), asynchronous) <= 1e-3
        with pytest.raises(UnavailableError, match="do the certificates fit"):
            ask(url, Tls(ours.root), asynchronous)


@both_clients
@both_protocols
@pytest.mark.parametrize("wrong", ["expired", "another host's", "another authority's"])
def test_a_server_whose_certificate_does_not_fit_is_not_asked(
    server: TritonServer, ours: Authority, theirs: Authority, scheme: str, asynchronous: bool, wrong: str
) -> None:
    certificate = {
        "expired": lambda: ours.issue("old", days=-20),
        "another host's": lambda: ours.issue("host", host="example.org"),
        "another authority's": lambda: theirs.issue("proxy"),
    }[wrong]()
    with (
        proxy(plain(server, scheme), server_context(certificate)) as authority,
        pytest.raises(UnavailableError, match=rf"no answer from {scheme}://{authority}.*do the certificates fit"),
    ):
        ask(f"{scheme}://{authority}", Tls(ours.root), asynchronous)


@both_clients
@both_protocols
def test_who_names_a_root_trusts_no_other(
    server: TritonServer,
    ours: Authority,
    theirs: Authority,
    scheme: str,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The system's list, and the list that geventhttpclient brings, now hold another authority.
    monkeypatch.setenv("SSL_CERT_FILE", str(theirs.root))
    monkeypatch.setitem(SSLConnectionPool.default_options, "ca_certs", str(theirs.root))
    with proxy(plain(server, scheme), server_context(theirs.issue("proxy"))) as authority:
        url = f"{scheme}://{authority}"
        with pytest.raises(UnavailableError):
            ask(url, Tls(ours.root), asynchronous)
        assert ask(url, None, asynchronous) <= 1e-3  # https without files takes the system's list


def test_files_that_are_no_certificates_are_named_before_anything_is_sent(ours: Authority, tmp_path: Path) -> None:
    certificate, key = ours.issue("client")
    _, other_key = ours.issue("other")
    (tmp_path / "text.pem").write_text("no certificate")
    for arguments, says in (
        ((tmp_path / "gone.pem",), r"gone\.pem is not there"),
        ((ours.root, certificate), "give both or neither"),
        ((ours.root, None, key), "give both or neither"),
    ):
        with pytest.raises(InputError, match=says):
            Tls(*arguments)
    for arguments in (
        (tmp_path / "text.pem",),
        (ours.root, tmp_path / "text.pem", key),
        (ours.root, certificate, other_key),
        (ours.root, certificate, tmp_path / "text.pem"),
    ):
        for url in ("https://127.0.0.1:9", "grpcs://127.0.0.1:9"):
            with pytest.raises(InputError, match=r"cannot be used.*name PEM files"):
                Client(url, tls=Tls(*arguments))
    for server in (
        ServerTls(certificate, other_key),
        ServerTls(tmp_path / "text.pem", key),
        ServerTls(certificate, key, tmp_path / "text.pem"),
    ):
        with pytest.raises(InputError, match=r"cannot be used.*not encrypted"):
            server.flags()
    with pytest.raises(InputError, match=r"plain text.*write https://"):
        Client("http://127.0.0.1:9", tls=Tls(ours.root))
