"""What is open on a server of ours: to whom it listens, what asks for a key, and what it refuses to start with."""

import asyncio
import importlib._bootstrap_external as bytecode
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import answers, golden, make_bundle
from tritonclient.utils import InferenceServerException

from gpuops.errors import GpuopsError, InputError, IntegrityError
from gpuops.signing import SIGNATURE, TRUSTED, keygen, sign
from gpuops_serving.aio import AsyncClient
from gpuops_serving.client import Client
from gpuops_serving.config import CONFIG
from gpuops_serving.failures import Attempts
from gpuops_serving.gates import FIXED, MAY_2026, security_warnings
from gpuops_serving.operations import Call
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer
from gpuops_serving.triton import Triton

GOLDEN = golden()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a signed repository and its public key."""
    folder = tmp_path_factory.mktemp("published")
    keygen(folder / "our.key", folder / "our.pub")
    bundle = make_bundle(folder / "bundle")
    sign(bundle, folder / "our.key")
    deploy(bundle, folder / "repository", keys=[folder / "our.pub"])
    return folder


@pytest.fixture(scope="module")
def controlled(published: Path) -> Iterator[TritonServer]:
    """A server with model control, of a repository that a trusted key signed."""
    with TritonServer(published / "repository", control=True, keys=[published / "our.pub"]) as running:
        yield running


def listening(pid: int) -> set[str]:
    """Addresses, as the kernel writes them, of the sockets that a process listens on."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except OSError:  # closed meanwhile
            continue
    tables = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return {row[1].split(":")[0] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in found}


def test_a_server_listens_on_loopback_alone(server: TritonServer) -> None:
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and as IPv6 writes it
    found = listening(server.pid)
    assert found
    assert found <= loopback


def post(url: str, document: Any = None, **headers: str) -> tuple[int, str]:
    """Status and body of a request as curl would send it."""
    data = None if document is None else json.dumps(document).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


NOT_LOADED = {"parameters": {"config": "{}", "file:1/model.py": "cHJpbnQoMSk="}}


def test_without_model_control_nothing_is_loaded_or_unloaded(server: TritonServer) -> None:
    for model in ("tiny", "new"):
        for verb, body in (("load", {}), ("load", NOT_LOADED), ("unload", {})):
            status, text = post(f"{server.http_url}/v2/repository/models/{model}/{verb}", body)
            assert (status, "not allowed" in text) == (503, True), text
    for url in (server.http_url, server.grpc_url):
        with Client(url) as client:
            for call in (client.load, client.unload):
                with pytest.raises(
                    InputError, match=r"explicit model load / unload.*start the server with model control"
                ):
                    call("tiny")
            assert [state.state for state in client.models()] == ["READY"]


def test_files_of_the_host_cannot_be_named_over_the_network(server: TritonServer, tmp_path: Path) -> None:
    for path, field in (("/v2/logging", "log_file"), ("/v2/trace/setting", "trace_file")):
        status, _ = post(f"{server.http_url}{path}", {field: str(tmp_path / "written")})
        assert status >= 400
    assert list(tmp_path.iterdir()) == []


RESTRICTED = [
    "/v2/repository/index",
    "/v2/repository/models/tiny/load",
    "/v2/repository/models/new/load",
    "/v2/repository/models/tiny/unload",
    "/v2/trace/setting",
    "/v2/models/tiny/trace/setting",
    "/v2/logging",
]


@pytest.mark.parametrize("path", RESTRICTED)
def test_with_model_control_the_apis_that_run_code_or_write_files_ask_for_the_key(
    controlled: TritonServer, path: str
) -> None:
    assert controlled.access is not None
    name, secret = controlled.access
    for headers in ({}, {name: "guessed"}, {name: secret[:-1]}, {name: ""}, {f"x-{name}": secret}):
        for document in ({}, {"log_verbose_level": 1}, NOT_LOADED):
            status, text = post(f"{controlled.http_url}{path}", document, **headers)
            assert (status, "restricted" in text) == (403, True), text
    with Client(controlled.http_url, access=controlled.access) as owner:
        assert [state.name for state in owner.models()] == ["tiny"]
    assert secret not in repr(owner._address)


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, controlled: TritonServer) -> str:
    return controlled.http_url if request.param == "http" else controlled.grpc_url


def test_models_are_loaded_by_who_has_the_key_and_nobody_else(controlled: TritonServer, url: str) -> None:
    with Client(url, retries=3) as stranger:
        for call in (stranger.load, stranger.unload):
            with pytest.raises(InputError, match=r"restricted.*its key as access"):
                call("tiny")
        with pytest.raises(InputError, match="restricted"):
            stranger.models()
        assert GOLDEN.max_abs_diff(stranger.infer("tiny", GOLDEN.inputs)) <= 1e-3
        # Which models there are stays unsaid, but what was wrong does not.
        with pytest.raises(InputError, match="unknown model: 'other'"):
            stranger.infer("other", GOLDEN.inputs)
    with Client(url, access=("gpuops-control", "guessed")) as guesser, pytest.raises(InputError, match="restricted"):
        guesser.unload("tiny")
    with Client(url, access=controlled.access) as owner:
        owner.unload("tiny")
        with pytest.raises(GpuopsError):
            owner.infer("tiny", GOLDEN.inputs)
        owner.load("tiny")
        np.testing.assert_allclose(
            owner.infer("tiny", GOLDEN.inputs)["y"], answers(GOLDEN.inputs["a"], GOLDEN.inputs["m"]), atol=1e-3
        )
    with Triton(url) as someone, pytest.raises(InputError, match="restricted"):
        someone.versions()


def test_the_asyncio_client_needs_the_key_as_well(controlled: TritonServer, url: str) -> None:
    async def ask() -> None:
        async with AsyncClient(url) as stranger:
            for call in (stranger.load, stranger.unload):
                with pytest.raises(InputError, match=r"restricted.*its key as access"):
                    await call("tiny")
            assert GOLDEN.max_abs_diff(await stranger.infer("tiny", GOLDEN.inputs)) <= 1e-3
        async with AsyncClient(url, access=controlled.access) as owner:
            await owner.unload("tiny")
            assert not await owner.ready("tiny")
            await owner.load("tiny")
            assert await owner.ready("tiny")
            assert [state.state for state in await owner.models()] == ["READY"]

    asyncio.run(ask())


def test_a_refusal_is_not_asked_again(url: str) -> None:
    # gRPC says UNAVAILABLE to whoever has no key, as a server does that is away.
    with Client(url, retries=5) as stranger, pytest.raises(InputError, match="restricted") as caught:
        stranger.models()
    refusal = caught.value.__cause__
    assert isinstance(refusal, InferenceServerException)
    assert Attempts(stranger._address, 0.0).wait_s(Call("get_model_repository_index"), refusal, 0.0) is None


def edited(path: str, old: str, new: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        text = (model / path).read_text()
        assert old in text
        (model / path).write_text(text.replace(old, new))

    return change


def appended(path: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        with (model / path).open("ab") as file:
            file.write(b"\n")

    return change


def unsigned(model: Path) -> None:
    (model / "1" / SIGNATURE).unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (appended("1/model.onnx"), r"model\.onnx differs from what was signed"),
        (appended("1/golden.npz"), r"golden\.npz differs"),
        (edited("1/manifest.json", '"tolerance": 0.001', '"tolerance": 1000.0'), r"manifest\.json differs"),
        (edited("1/model.py", "return carried", "return {}"), r"model\.py is not this gpuops' shim"),
        (edited(CONFIG, "1" * 64, "2" * 64), "another version id"),
        (unsigned, "is not signed"),
    ],
)
def test_a_server_does_not_start_with_what_is_not_as_it_was_signed(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], says: str
) -> None:
    monkeypatch.setenv(TRUSTED, str(published / "our.pub"))
    repository = Path(shutil.copytree(published / "repository", tmp_path / "repository"))
    change(repository / "tiny")
    server = TritonServer(repository)
    with pytest.raises(IntegrityError, match=says):
        server.start()
    assert not list(Path("/dev/shm").glob(f"{server.server_id}*"))


def test_what_no_trusted_key_signed_is_not_deployed(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keygen(tmp_path / "other.key", tmp_path / "other.pub")
    bundle = make_bundle(tmp_path / "bundle")
    monkeypatch.setenv(TRUSTED, str(published / "our.pub"))
    for private in (None, tmp_path / "other.key"):
        if private is not None:
            sign(bundle, private)
        with pytest.raises(IntegrityError, match=r"signed bundles are trusted|none of the trusted keys"):
            deploy(bundle, tmp_path / "repository")
    sign(bundle, published / "our.key")
    (bundle / "more.py").write_text("")
    with pytest.raises(IntegrityError, match=r"more\.py is not among what was signed"):
        deploy(bundle, tmp_path / "repository")
    assert not (tmp_path / "repository").exists() or not any((tmp_path / "repository").iterdir())
    (bundle / "more.py").unlink()
    assert deploy(bundle, tmp_path / "repository").new


def test_old_servers_are_warned_of() -> None:
    for version, says in (
        ("2.51.0", "CVE-2025-23310.*loopback only"),
        ("2.59.0", "CVE-2025-23310"),
        ("2.59.1", "CVE-2026-24206"),
        ("2.69.0", "CVE-2026-24206"),
    ):
        (warning,) = security_warnings(version)
        assert re.search(says, warning)
    assert FIXED.since == (2, 59, 1)
    assert MAY_2026 == (2, 70, 0)
    assert security_warnings("2.70.0") == security_warnings("2.75.0") == []
    with pytest.raises(InputError, match="is not a server version"):
        security_warnings("nightly")


def test_a_running_server_is_warned_of(server: TritonServer) -> None:
    with Triton(server.grpc_url) as triton:
        (warning,) = triton.warnings()
    assert "Triton 2.51.0 is older than" in warning


@pytest.mark.parametrize("path", ["/v2/trace/setting", "/v2/models/tiny/trace/setting", "/v2/logging"])
def test_tracing_and_logging_are_for_nobody(server: TritonServer, path: str) -> None:
    for document in ({}, {"log_verbose_level": 1}, {"trace_level": ["TENSORS"]}):
        status, text = post(f"{server.http_url}{path}", document)
        assert (status, "restricted" in text) == (403, True), text


def left_over_trial(model: Path) -> None:
    """What a server without model control would load with the others."""
    folder = model.parent / "tiny.candidate" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(f"open({str(model.parent.parent / 'ran')!r}, 'w')")
    (folder.parent / CONFIG).write_text('backend: "python"')


def planted_stub(model: Path) -> None:
    (model / "triton_python_backend_stub").write_bytes(b"\x7fELF")


@pytest.mark.parametrize("change", [left_over_trial, planted_stub])
def test_a_server_does_not_start_beside_what_it_would_run_unsigned(
    published: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    repository = Path(shutil.copytree(published / "repository", tmp_path / "repository"))
    change(repository / "tiny")
    with pytest.raises(IntegrityError, match=r"tiny\.candidate|stub"):
        TritonServer(repository, keys=[published / "our.pub"]).start()
    assert not (tmp_path / "ran").exists()


def test_a_server_does_not_run_bytecode_in_place_of_what_was_signed(published: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(published / "repository", tmp_path / "repository"))
    shim = repository / "tiny" / "1" / "model.py"
    code = compile(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{shim.read_text()}", str(shim), "exec")
    (shim.parent / "__pycache__").mkdir(exist_ok=True)
    cache = shim.parent / "__pycache__" / f"model.cpython-{sys.version_info.major}{sys.version_info.minor}.pyc"
    cache.write_bytes(bytecode._code_to_hash_pyc(code, bytes(8), False))  # type: ignore[attr-defined]
    with TritonServer(repository, keys=[published / "our.pub"]) as running, Client(running.http_url) as client:
        assert GOLDEN.max_abs_diff(client.infer("tiny", GOLDEN.inputs)) <= 1e-3
    assert not (tmp_path / "ran").exists()
