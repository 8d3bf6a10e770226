"""What goes wrong around a server: bad requests, bad clients, dead processes. No wrong answer, and it is seen at once.

The faults of rollouts are in test_rollout.py and test_rollout_kills.py, empty answers under NumPy 2 in test_server.py.
"""

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc
import tritonclient.http
from faulty import GOLDEN, LIES, Asking, Model, Place, doubling_bundle, leftovers, rss_mb, sabotage, sabotaged, stubs
from malformed import malformed, request, wanted
from tiny_bundle import deployed
from tritonclient.utils import InferenceServerException

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.gates import FIXED, parse_version
from gpuops_serving.probe import probe
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server with `tiny` and `doubling`; afterwards it must have all its processes, and no more memory regions."""
    folder = tmp_path_factory.mktemp("faults")
    made = Place(folder)
    deploy(doubling_bundle(folder / "doubling"), made.repository)
    made.client.load("doubling")
    before = stubs(made.server), regions(made.server)
    yield made
    assert (stubs(made.server), regions(made.server)) == before
    made.close()


@pytest.fixture(autouse=True)
def golden_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever was done to the server, the client that was open all the while gets right answers afterwards."""
    yield
    if "place" in request.fixturenames:
        place: Place = request.getfixturevalue("place")
        probe(place.client, "tiny", GOLDEN, 1e-3)


def regions(server: TritonServer) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"{server.server_id}*"))


def address(server: TritonServer) -> tuple[str, int]:
    return "127.0.0.1", int(server.http_url.rsplit(":", 1)[1])


def post(server: TritonServer, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection(*address(server), timeout=120)) as connection:
        connection.request("POST", INFER, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def status(server: TritonServer, path: str) -> int:
    with urllib.request.urlopen(server.http_url + path, timeout=60) as answer:
        return int(answer.status)


# Requests


def raw(place: Place, protocol: str, inputs: dict[str, npt.NDArray[Any]], kinds: dict[str, str] | None = None) -> Any:
    """Ask with tritonclient itself, which checks nothing that ours would."""
    module: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    url = {"http": place.server.http_url, "grpc": place.server.grpc_url}[protocol].partition("://")[2]
    names = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "int8": "INT8"}
    tensors = []
    for name, array in inputs.items():
        tensors.append(module.InferInput(name, list(array.shape), (kinds or {}).get(name, names[array.dtype.name])))
        tensors[-1].set_data_from_numpy(array)
    with module.InferenceServerClient(url) as client:
        return client.infer("tiny", tensors).as_numpy("y")


def rows(count: int) -> dict[str, npt.NDArray[Any]]:
    return dict(GOLDEN.batch(count).inputs)


BAD = {
    "no sample": rows(0),
    "one sample too many": rows(6),
    "a thousand samples too many": rows(1005),
    "another dtype": {**rows(2), "a": rows(2)["a"].astype(np.float32)},
    "another dtype of the same size": {**rows(2), "a": rows(2)["a"].view(np.int8)},
    "channels last": {**rows(2), "a": np.ascontiguousarray(rows(2)["a"].transpose(0, 2, 3, 1))},
    "another rank": {**rows(2), "a": rows(2)["a"].reshape(2, 192)},
    "no batch axis": {"a": rows(1)["a"][0], "m": rows(1)["m"][0]},
    "numbers of samples that differ": {**rows(2), "m": rows(3)["m"]},
    "one input missing": {"a": rows(2)["a"]},
    "one input too many": {**rows(2), "b": rows(2)["m"]},
    "another name": {"A": rows(2)["a"], "m": rows(2)["m"]},
    "a value that the graph cannot take": {**rows(2), "m": np.full((2, 1), 12, np.int32)},
}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("fault", BAD)
def test_a_request_that_is_wrong_is_refused_as_such(place: Place, protocol: str, fault: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        raw(place, protocol, BAD[fault])
    assert str(caught.value.status()) in ("400", "StatusCode.INVALID_ARGUMENT")


def test_missing_values_stay_missing_and_spread_to_nobody_else(place: Place) -> None:
    """Many requests at once, joined in batches by the server, some with NaN and infinities."""
    draw = np.random.default_rng(0)
    batches = []
    for count in draw.integers(1, 6, 120):
        x = draw.standard_normal((count, 4)).astype(np.float32)
        x[draw.random(x.shape) < 0.2] = np.nan
        x[draw.random(x.shape) < 0.1] = np.inf
        batches.append({"x": x})
    for url in (place.server.http_url, place.server.grpc_url):
        with Client(url) as client:
            for batch, answer in zip(batches, client.stream("doubling", batches, in_flight=8), strict=True):
                np.testing.assert_array_equal(answer["y"], 2 * batch["x"])


@pytest.mark.slow
def test_a_hundred_megabytes_are_refused_and_given_back(place: Place) -> None:
    count = 100 * 2**20 // 196
    tensors = [
        {"name": "a", "shape": [count, 3, 8, 8], "datatype": "UINT8", "parameters": {"binary_data_size": 192 * count}},
        {"name": "m", "shape": [count, 1], "datatype": "INT32", "parameters": {"binary_data_size": 4 * count}},
    ]
    head = json.dumps({"inputs": tensors}).encode()
    bodies = {
        "samples": (head + bytes(196 * count), {"Inference-Header-Content-Length": str(len(head))}),
        "blanks": (b"{" + b" " * 100 * 2**20, {}),
        "zeros": (bytes(100 * 2**20), {}),
    }
    sizes = []
    for _ in range(3):
        for what, (body, headers) in bodies.items():
            code, answer = post(place.server, body, headers)
            assert code in (400, 500), what
            assert b"error" in answer
            probe(place.client, "tiny", GOLDEN, 1e-3)
        sizes.append(rss_mb(place.server.pid))
    assert sizes[-1] - sizes[0] < 100  # not once more for every round


@pytest.mark.parametrize("dripping", ["headers and body", "the request line too"])
def test_a_client_that_sends_a_byte_at_a_time_holds_nobody_up(place: Place, dripping: str) -> None:
    head, tail, headers = request(2, random.Random(3), binary=True)
    body = bytes(head) + tail
    lines = ["Host: tiny", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    first = f"POST {INFER} HTTP/1.1\r\n".encode()
    rest = "\r\n".join([*lines, "", ""]).encode() + body
    at_once, slowly = (first, rest) if "body" in dripping else (b"", first + rest)
    with socket.create_connection(address(place.server), timeout=60) as slow:
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        slow.sendall(at_once)
        for number, byte in enumerate(slowly):
            slow.sendall(bytes([byte]))
            if number % 20 == 0:
                probe(place.client, "tiny", GOLDEN, 1e-3)
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
    if at_once:
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    elif not answer.startswith(b"HTTP/1.1 200 OK\r\n"):
        # Triton 2.51 finds no path that is split over two packets, or hangs up. That is no answer, so no wrong one.
        assert answer == b"" or answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
        return
    outputs = json.loads(answer.partition(b"\r\n\r\n")[2])["outputs"]
    np.testing.assert_allclose(outputs[0]["data"], expected(body, headers).ravel(), atol=1e-3)


def expected(body: bytes, headers: dict[str, str]) -> npt.NDArray[Any]:
    found = wanted(body, headers)
    assert found is not None
    return found


def test_many_idle_and_half_open_clients_hold_nobody_up(place: Place) -> None:
    with contextlib.ExitStack() as open_ones:
        for number in range(100):
            idle = open_ones.enter_context(socket.create_connection(address(place.server)))
            idle.sendall((b"", b"POST ", b"POST /v2 HTTP/1.1\r\nContent-Length: 10\r\n\r\n")[number % 3])
        for url in (place.server.http_url, place.server.grpc_url):
            with Client(url) as client:
                probe(client, "tiny", GOLDEN, 1e-3)


def test_a_thousand_malformed_bodies_get_an_error_or_the_right_answer(place: Place) -> None:
    """Chunked bodies apart: some of those end Triton 2.51 (below)."""
    draw = random.Random(20_251)
    seen: Counter[int] = Counter()
    for number in range(1000):
        body, headers = malformed(draw)
        code, answer = post(place.server, body, headers)
        seen[code] += 1
        if code != 200:
            assert code in (400, 404, 415, 500), (number, code)
            assert isinstance(json.loads(answer)["error"], str), number
            continue
        want = wanted(body, headers)
        assert want is not None, (number, headers, body[:300])
        (output,) = json.loads(answer)["outputs"]
        assert output["shape"] == list(want.shape), number
        np.testing.assert_allclose(output["data"], want.ravel(), atol=1e-3, err_msg=str(number))
        if number % 50 == 0:
            probe(place.client, "tiny", GOLDEN, 1e-3)
    assert seen[200] > 20  # some were whole after all, or this test proves nothing
    assert sum(seen.values()) - seen[200] > 500


def test_the_reader_that_judges_those_answers_reads_right_requests() -> None:
    for binary in (True, False):
        head, tail, headers = request(3, random.Random(1), binary)
        assert expected(bytes(head) + tail, headers).shape == (3, 1, 8, 8)
        assert wanted(bytes(head[:-1]) + tail, headers) is None


# Models and folders


def test_a_half_written_model_keeps_its_own_name_from_being_served_and_no_other(place: Place) -> None:
    half = place.repository / "half"
    for files in ([], ["1/model.onnx"], ["1/model.onnx", "1/manifest.json"], ["config.pbtxt"]):
        for file in files:
            (half / file).parent.mkdir(parents=True, exist_ok=True)
            (half / file).write_bytes((place.repository / "tiny" / file).read_bytes()[:150])
        half.mkdir(exist_ok=True)
        with pytest.raises(GpuopsError, match="half"):
            place.client.load("half")
        with pytest.raises(InputError, match="half"):
            place.client.infer("half", rows(1))
        probe(place.client, "tiny", GOLDEN, 1e-3)
        shutil.rmtree(half)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.onnx", "golden.npz", "manifest.json"])
def test_a_server_does_not_start_on_a_half_written_version(tmp_path: Path, file: str) -> None:
    repository = deployed(tmp_path)
    (repository / "tiny" / "1" / file).unlink()
    with pytest.raises((IntegrityError, UnavailableError), match=file), TritonServer(repository):
        pass
    (repository / "tiny" / "1" / file).write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"{file}|incomplete"), TritonServer(repository):
        pass


def test_a_server_does_not_start_on_a_half_written_model(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    (repository / "half" / "1").mkdir(parents=True)
    with pytest.raises(InputError, match="half was not written by `gpuops deploy`"), TritonServer(repository):
        pass


@pytest.mark.slow
def test_a_server_does_not_start_with_a_version_that_loads_and_answers_wrongly(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    sabotage(repository / "tiny", LIES)
    with pytest.raises(IntegrityError, match=r"(?s)differs from its golden answers by 1 .*do not use it"):
        TritonServer(repository).start()


def test_a_version_that_answers_wrongly_later_is_seen_by_the_golden_request_and_by_nothing_else(
    tmp_path: Path, place: Place
) -> None:
    """As after a bit flip in memory: it was proved at start, and goes wrong in service."""
    model = Model(place, "turns", tmp_path / "model")
    model.deploy(model.bundle("1"))
    turned = tmp_path / "turned"
    wrong = f"__import__('os').path.exists({str(turned)!r})"
    sabotage(model.path, sabotaged(run=f"return {{k: v + {wrong} for k, v in super().run(inputs).items()}}"))
    place.client.load("turns")
    probe(place.client, "turns", GOLDEN, 1e-3)
    turned.touch()
    assert status(place.server, "/v2/models/turns/ready") == 200
    assert place.client.ready("turns")
    with pytest.raises(IntegrityError, match="differs from its golden answers by 1"):
        probe(place.client, "turns", GOLDEN, 1e-3)
    model.close()
    wait_until(lambda: stubs(place.server, "repository/turns") == [])


def wait_until(done: Any) -> None:
    """Poll until a process of the server has ended, which its own API does not tell."""
    over = threading.Event()
    for _ in range(600):
        if done():
            return
        over.wait(0.05)
    raise AssertionError("it did not happen within 30 s")


# Processes


def end_at_once(place: Place) -> None:
    """Triton itself takes half a minute to end after a stub has crashed."""
    os.killpg(place.server.pid, signal.SIGKILL)
    place.close()
    assert leftovers(place.server.server_id) == []


def test_a_crashed_stub_is_seen_by_the_golden_request_at_once_and_loading_mends_it(tmp_path: Path) -> None:
    place = Place(tmp_path)
    try:
        (pid,) = stubs(place.server, "repository/tiny/")
        probe(place.client, "tiny", GOLDEN, 1e-3)
        os.kill(pid, signal.SIGSEGV)
        for url in (place.server.http_url, place.server.grpc_url):
            with Client(url) as client, pytest.raises(UnavailableError, match="not healthy"):
                probe(client, "tiny", GOLDEN, 1e-3)
        # Nothing else sees it, and nothing mends it by itself.
        assert status(place.server, "/v2/health/ready") == status(place.server, "/v2/models/tiny/ready") == 200
        assert place.client.ready("tiny")
        assert {state.state for state in place.client.models()} == {"READY"}
        place.client.load("tiny")
        probe(place.client, "tiny", GOLDEN, 1e-3)
        assert [found for found in stubs(place.server, "repository/tiny/") if found != pid]
    finally:
        end_at_once(place)


@pytest.mark.slow
def test_a_candidate_that_crashes_under_the_comparison_is_rejected_and_the_old_version_answers_throughout(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    model = Model(place, "tiny", tmp_path / "model")
    crash = "__import__('os').kill(__import__('os').getpid(), 11) if len(inputs['m']) == 1 else None"
    said: list[str] = []
    try:
        with Asking(place.server.grpc_url, "tiny", {"1": 0.5}) as asking:
            made = model.rollout_sabotaged(
                model.bundle("2", gain=0.25),
                sabotaged(run=f"{crash}\n        return super().run(inputs)"),
                count=40,
                say=said.append,
            )
        assert not made.promoted
        assert "does not let go of tiny.candidate" in said[-1]  # Triton 2.51 never does
        assert "not healthy" in made.reasons[0]
        assert asking.wrong == []
        model.serves(0.5, "1")
        model.clean()
    finally:
        model.ledger.close()
        end_at_once(place)


@pytest.mark.slow
def test_a_body_in_six_hundred_thousand_chunks_ends_old_servers_and_that_is_seen_at_once(tmp_path: Path) -> None:
    """CVE-2025-23310; expected of every server before the fix, and no later one may."""
    place = Place(tmp_path)
    try:
        version = parse_version(place.client.server_version())
        with contextlib.suppress(OSError), socket.create_connection(address(place.server), timeout=60) as raw_socket:
            raw_socket.sendall(f"POST {INFER} HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(600):
                raw_socket.sendall(b"1\r\n{\r\n" * 1000)
            raw_socket.sendall(b"0\r\n\r\n")
            raw_socket.recv(65536)
        if version < FIXED.since:
            with pytest.raises(UnavailableError, match="no answer from"):
                probe(place.client, "tiny", GOLDEN, 1e-3)
            with pytest.raises(UnavailableError, match="ended with code -"):
                place.server.wait()
        else:
            probe(place.client, "tiny", GOLDEN, 1e-3)
    finally:
        place.close()
    assert leftovers(place.server.server_id) == []
