"""`gpuops export` and `gpuops verify`: what they print, and a served model swept through real servers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuops.bundle import read_bundle, write_manifest
from gpuops.cli.bundles import _line, verify, verify_served
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.export import parity
from gpuops_serving.client import Client
from gpuops_serving.config import Batching, Options
from gpuops_serving.repository import SHIM, deploy
from gpuops_serving.server import TritonServer
from tests.conftest import Job, run_cli
from tests.serving.tiny_bundle import make_bundle

JOINED = Options(batching=Batching(delay_us=20_000))
"""Requests wait for others, so that even a loaded machine joins some."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[TritonServer]:
    deploy(tiny, tiny.parent / "repository", options=JOINED)
    with TritonServer(tiny.parent / "repository", log=tiny.parent / "log") as running:
        yield running


def url_of(server: TritonServer, protocol: str) -> str:
    return {"http": server.http_url, "grpc": server.grpc_url}[protocol]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_served_model_is_swept_with_requests_that_the_server_joins(
    tiny: Path, server: TritonServer, protocol: str
) -> None:
    bundle = read_bundle(tiny)
    with Client(url_of(server, protocol)) as client:
        found = verify_served(bundle, client, "tiny")
    assert found["batches"] == 5
    assert found["max_abs_diff"] <= bundle.tolerance
    assert "batch 6 in parts" in found["answered"]
    assert {"batch 0", "dtype", "shape", "layout (channels last)", "missing input"} <= set(found["refused"])
    concurrent = found["concurrent"]
    assert (concurrent["requests"], concurrent["threads"]) == (128, 8)
    assert 0 < concurrent["executions"] < 128
    assert concurrent["max_abs_diff"] <= bundle.tolerance
    assert found["warnings"] == []


def test_several_servers_are_verified_in_one_command(
    tiny: Path, server: TritonServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuops.export.verify.check_identity", lambda bundle: None)  # the tiny bundle has none
    urls = [server.http_url, server.grpc_url]
    verify(str(tiny), json=True, server=urls)
    assert list(json.loads(capsys.readouterr().out)["parity"]) == urls
    verify(str(tiny), json=False, server=urls[0])
    line = " ".join(capsys.readouterr().out.split())
    assert re.search(r"128 requests in flight from 8 threads in \d+ batches; refused batch 0, dtype", line)


def test_a_server_with_another_version_is_found(server: TritonServer, tmp_path: Path) -> None:
    other = read_bundle(make_bundle(tmp_path / "other", version_id="3" * 64))
    with (
        Client(server.http_url) as client,
        pytest.raises(IntegrityError, match=f"serves version {'1' * 64} of 'tiny', .* is {'3' * 64}: deploy it"),
    ):
        verify_served(other, client, "tiny")


def test_a_server_that_answers_otherwise_is_found(server: TritonServer, tmp_path: Path) -> None:
    """It claims the version id of a bundle whose golden answers are another model's."""
    other = read_bundle(make_bundle(tmp_path / "other", golden_gain=0.6))
    with Client(server.grpc_url) as client, pytest.raises(IntegrityError, match=r"at batch 1, allowed is 0\.001"):
        verify_served(other, client, "tiny")


def test_a_model_that_is_not_there_and_a_server_that_is_not(tiny: Path, server: TritonServer) -> None:
    with Client(server.http_url) as client, pytest.raises(InputError, match="it serves tiny"):
        verify_served(read_bundle(tiny), client, "forecast")
    with Client("http://127.0.0.1:1") as client, pytest.raises(UnavailableError):
        verify_served(read_bundle(tiny), client, "tiny")
    with pytest.raises(InputError, match="give --server too"):
        verify(str(tiny), json=False, model="tiny")


def test_the_tolerance_is_that_of_the_format_that_is_served(
    tiny: Path, server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says it runs int8 is held to what int8 was allowed at export."""
    bundle = read_bundle(make_bundle(tmp_path / "other", golden_gain=0.5001))
    write_manifest(bundle.path, {**_document(bundle.path), "int8": {"tolerance": 0.5, "missing_tolerance": 0.5}})
    config = Client.config

    def says_int8(client: Client, model: str, version: str = "") -> object:
        found = config(client, model, version)
        found["parameters"]["gpuops.format"] = "int8"
        return found

    with Client(server.http_url) as client:
        with pytest.raises(IntegrityError, match=r"allowed is 0\.001"):
            verify_served(read_bundle(bundle.path), client, "tiny")
        monkeypatch.setattr(Client, "config", says_int8)
        assert verify_served(read_bundle(bundle.path), client, "tiny")["tolerance"] == 0.5


def _document(bundle: Path) -> dict[str, object]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {key: value for key, value in manifest.items() if key not in ("files", "sha256", "schema")}


@pytest.fixture(scope="module")
def swapping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TritonServer]]:
    """A server that is right for one request at a time, and swaps answers of equal size among those it joined."""
    folder = tmp_path_factory.mktemp("swapping")
    bundle = make_bundle(folder / "bundle")
    made = deploy(bundle, folder / "repository", options=JOINED)
    shim = SHIM.read_text()
    assert "def execute(self, requests: list[Any]) -> list[Any]:" in shim
    swapped = shim.replace("def execute(self,", "def rightly(self,") + SWAP
    (made.path / "model.py").write_text(swapped)
    with TritonServer(folder / "repository", log=folder / "log") as running:
        yield bundle, running


SWAP = '''

def execute(model, requests):
    """Answer as before, and turn round the answers of requests of the same size."""
    answers = TritonPythonModel.rightly(model, requests)
    names = [triton.get_input_tensor_by_name(request, model.inputs[0]).shape()[0] for request in requests]
    for size in set(names):
        places = [place for place, found in enumerate(names) if found == size]
        for place, answer in zip(places, [answers[place] for place in reversed(places)]):
            answers[place] = answer
    return answers


TritonPythonModel.execute = execute
'''


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_mixes_up_answers_of_joined_requests_is_found(
    swapping: tuple[Path, TritonServer], protocol: str
) -> None:
    bundle, running = swapping
    opened = read_bundle(bundle)
    with Client(url_of(running, protocol)) as client:
        infer = lambda inputs: client.infer("tiny", inputs)  # noqa: E731
        parity.sweep(infer, opened.golden(), opened.signature, opened.tolerance, splits=True)
        with pytest.raises(IntegrityError, match="in flight together: answers differ"):
            verify_served(opened, client, "tiny")


def test_a_server_that_joins_nothing_proves_nothing_about_batches(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    made = deploy(bundle, tmp_path / "repository")
    config = made.path.parent / "config.pbtxt"
    text = config.read_text()
    assert "dynamic_batching {\n}\n" in text
    config.write_text(text.replace("dynamic_batching {\n}\n", ""))
    with TritonServer(tmp_path / "repository", log=tmp_path / "log") as running, Client(running.grpc_url) as client:
        found = verify_served(read_bundle(bundle), client, "tiny")
    assert found["concurrent"]["executions"] == 128
    assert found["warnings"] == ["the server joined no requests to a batch, so this proves nothing about batches"]


@pytest.mark.slow
def test_the_job_is_served_as_it_was_trained(bundled: Job, tmp_path: Path) -> None:
    """The main job's bundle: three inputs, a batch of up to 32, both protocols."""
    repository = tmp_path / "repository"
    deploy(bundled.bundle, repository, options=JOINED)
    bundle = read_bundle(bundled.bundle)
    with TritonServer(repository, log=tmp_path / "log") as running:
        for url in (running.http_url, running.grpc_url):
            with Client(url) as client:
                found = verify_served(bundle, client, "forecast")
            assert found["batches"] == 32
            assert found["max_abs_diff"] <= 1e-5
            assert found["concurrent"]["executions"] < 128


def test_what_int8_costs_is_said() -> None:
    found = {
        "max_abs_diff": 0.2,
        "batches": 8,
        "refused": ["batch 0"],
        "bound": 0.02,
        "rmse": {"y": {"float32": 2.0, "int8": 2.01}, "z": {"float32": 1.0, "int8": 0.9}},
    }
    assert _line(found) == (
        "max abs diff 0.2, batches 1 to 8; error on held-out samples +0.50% of float32's, bound 2.0%; refused batch 0"
    )


@pytest.mark.slow
def test_export_and_verify_say_what_was_proved(bundled: Job) -> None:
    done = run_cli("verify", bundled.bundle)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert re.search(r"pt2 +max abs diff \S+, batches 1 to 32", words)
    assert "refused batch 0, dtype, shape, layout (channels last)" in words
    assert "every byte agrees with the manifest; sweeping pt2, onnx in fresh processes" in " ".join(done.stderr.split())
