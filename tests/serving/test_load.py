"""Load: schedules, what latency means, and that no wrong answer is counted as one."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import golden, make_bundle

from gpuops.bundle import Golden
from gpuops.errors import InputError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.config import Batching, Options
from gpuops_serving.load import Load, closed_loop, measured, open_loop, schedule
from gpuops_serving.load_wire import (
    REJECTED,
    GrpcEndpoint,
    HttpEndpoint,
    Shot,
    _Connection,
    _http_answer,
    compared,
    http_request,
    shots,
)
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer

GOLDEN = golden()


@given(st.floats(1, 500), st.floats(0.1, 20), st.sampled_from(["poisson", "constant"]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_schedule_is_ascending_and_offers_the_rate(rate: float, seconds: float, arrivals: str, seed: int) -> None:
    due = schedule(rate, seconds, arrivals, seed)
    assert (np.diff(due) >= 0).all()
    assert not len(due) or (due[0] >= 0 and due[-1] < seconds)
    expected = rate * seconds
    assert abs(len(due) - expected) <= (1 if arrivals == "constant" else 6 * expected**0.5 + 1)
    np.testing.assert_array_equal(due, schedule(rate, seconds, arrivals, seed))


def test_an_unknown_schedule_and_empty_loads_are_refused() -> None:
    with pytest.raises(InputError, match="poisson or constant"):
        schedule(1, 1, "bursty", 0)
    endpoint = HttpEndpoint("http://127.0.0.1:9")
    with pytest.raises(InputError, match="at least one sample"):
        closed_loop(endpoint, [], concurrency=1, seconds=1)
    with pytest.raises(InputError, match="rate_per_s is 0"):
        open_loop(endpoint, [Shot(b"", lambda headers, body: None)], rate_per_s=0, seconds=1)
    for url in ("https://127.0.0.1:1", "http://127.0.0.1"):
        with pytest.raises(InputError, match="plain text"):
            HttpEndpoint(url)


@contextmanager
def answering_together(count: int) -> Iterator[str]:
    """A server that answers none of its requests before `count` of them are there."""
    enough, arrived = threading.Event(), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            arrived.append(1)
            if len(arrived) >= count:
                enough.set()
            enough.wait(30)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_requests_behind_a_stall_are_sent_all_the_same_and_wait_from_when_they_were_due() -> None:
    """A closed loop would send one request and hide the other 19."""
    with answering_together(20) as url:
        shot = Shot(http_request(url, "/", b"x"), lambda headers, body: None if body == b"ok" else "wrong")
        found = open_loop(HttpEndpoint(url), [shot], rate_per_s=100, seconds=0.2, warm_up_s=0, arrivals="constant")
    assert (found.sent, found.answered, found.failed) == (20, 20, {})
    longest = found.latency_ms["max_ms"]
    assert longest is not None
    assert longest >= 190  # the first one was due 19 intervals of 10 ms before the last


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_answer_is_compared_and_every_sample_executed(server: TritonServer, protocol: str, size: int) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    endpoint = HttpEndpoint(url) if protocol == "http" else GrpcEndpoint(url)
    right = shots(url, "tiny", GOLDEN, 1e-3, size=size)

    def run(concurrency: int = 4, made: list[Shot] = right) -> Load:
        return closed_loop(endpoint, made, concurrency=concurrency, seconds=0.2, warm_up_s=0)

    with Client(server.http_url) as client:
        found = measured(client, "tiny", run)
    assert found.failed == {}
    assert found.answered == found.sent > 0
    assert found.batches is not None
    assert sum(rows * count for rows, count in found.batches.items()) == size * found.sent
    assert found.joules_per_request is None
    assert found.energy_reason
    assert json.loads(json.dumps(found.to_json()))["kind"] == "closed"
    latency = [found.latency_ms[name] for name in ("p50_ms", "p95_ms", "p99_ms", "p999_ms", "max_ms")]
    assert latency == sorted(latency)
    wrong = run(made=shots(url, "tiny", golden(gain=0.25), 1e-3, size=size))
    assert (wrong.answered, list(wrong.failed)) == (0, ["a wrong answer"])
    assert wrong.latency_ms["p99_ms"] is None


def test_an_unknown_model_fails_by_name_and_no_server_is_an_error(server: TritonServer) -> None:
    for url, endpoint, words in (
        (server.http_url, HttpEndpoint(server.http_url), "HTTP 4"),
        (server.grpc_url, GrpcEndpoint(server.grpc_url), "NOT_FOUND"),
    ):
        found = closed_loop(endpoint, shots(url, "gone", GOLDEN, 1e-3), concurrency=1, seconds=0.05, warm_up_s=0)
        assert found.answered == 0
        assert all(reason.startswith(words) for reason in found.failed), found.failed
    shot = Shot(b"", lambda headers, body: None)
    with pytest.raises(UnavailableError, match="start it"):
        closed_loop(HttpEndpoint("http://127.0.0.1:9"), [shot], concurrency=1, seconds=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_a_full_queue_turns_away_is_rejected_and_not_failed(tmp_path: Path, protocol: str) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    deploy(bundle, tmp_path / "repository", options=Options(batching=Batching(queue_size=1)))
    with TritonServer(tmp_path / "repository") as server:
        url = server.http_url if protocol == "http" else server.grpc_url
        endpoint = HttpEndpoint(url) if protocol == "http" else GrpcEndpoint(url)
        found = closed_loop(endpoint, shots(url, "tiny", GOLDEN, 1e-3), concurrency=32, seconds=0.5, warm_up_s=0)
    assert found.answered > 0
    assert list(found.failed) == [REJECTED]
    assert found.answered + found.failed[REJECTED] == found.sent


class Transport:
    def write(self, content: bytes) -> None: ...

    def close(self) -> None: ...


@given(st.lists(st.integers(1, 60), max_size=12), st.binary(max_size=80))
@settings(max_examples=80, deadline=None)
def test_an_answer_is_the_same_in_whatever_pieces_it_arrives(cuts: list[int], body: bytes) -> None:
    # As Triton answers: another header's name ends like that of the length.
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 1\r\nContent-LENGTH: %d\r\n\r\n"
    answer = head % len(body) + body

    async def run() -> tuple[int, bytes, bytes]:
        connection = _Connection()
        connection.connection_made(Transport())  # type: ignore[arg-type]
        asked = connection.ask(b"")
        at = 0
        for cut in [*cuts, len(answer)]:
            if at < len(answer):
                connection.data_received(answer[at : at + cut])
            at += cut
        return await asked

    status, headers, found = asyncio.run(run())
    assert (status, found) == (200, body)
    assert b"content-length: " in headers


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"])
def test_what_is_no_http_ends_the_request(answer: bytes) -> None:
    async def run() -> None:
        connection = _Connection()
        connection.connection_made(Transport())  # type: ignore[arg-type]
        asked = connection.ask(b"")
        connection.data_received(answer)
        assert connection.lost
        await asked

    with pytest.raises(ConnectionError, match="no HTTP answer"):
        asyncio.run(run())


Y, Z = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([[7], [9]], np.int16)


def answer(*tensors: tuple[str, Any], binary: bool = True, cut: int = 0, **changed: Any) -> tuple[bytes, bytes]:
    """Headers and body of an HTTP answer, its outputs in this order."""
    entries = []
    for name, array in tensors:
        datatype = {"float32": "FP32", "int16": "INT16"}[str(array.dtype)]
        entry = {"name": name, "datatype": datatype, "shape": array.shape}
        entries.append(
            entry | ({"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.tolist()})
        )
    head = json.dumps({"model_name": "m", "outputs": [entry | changed for entry in entries]}).encode()
    if not binary:
        return b"", head
    body = head + b"".join(array.tobytes() for _, array in tensors)
    return b"\r\ninference-header-content-length: %d\r\n" % len(head), body[: len(body) - cut]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (answer(("y", Y), ("z", Z)), None),
        (answer(("z", Z), ("y", Y)), None),  # every output where its JSON says
        (answer(("y", Y), ("z", Z), binary=False), None),
        (answer(("z", Y), ("y", Z)), "a wrong answer"),
        (answer(("y", Y), ("z", Z + 1)), "a wrong answer"),
        (answer(("y", Y), ("q", Z)), "a wrong answer"),
        (answer(("y", Y.reshape(3, 2)), ("z", Z)), "a wrong answer"),
        (answer(("y", Y), ("z", Z), cut=1), "cannot be read"),
        (answer(("y", Y), ("z", Z), parameters={}), "cannot be read"),
        (answer(("y", Y), ("z", Z), datatype="BYTES"), "cannot be read"),
        (answer(("y", Y), ("z", Z), shape="many"), "cannot be read"),
        ((b"\r\ninference-header-content-length: 40\r\n", b"{" * 100), "cannot be read"),
        ((b"", b"{" * 100), "cannot be read"),
        ((b"", b""), "too few bytes"),
    ],
)
def test_an_answer_is_read_as_its_header_says_or_not_at_all(found: tuple[bytes, bytes], says: str | None) -> None:
    check = compared(Golden({}, {"y": Y, "z": Z}), 1e-3, _http_answer)
    for _ in range(2):  # the second time the header has been read before
        got = check(*found)
        assert got is None if says is None else says in str(got)


def test_more_than_one_thread_can_send_is_refused() -> None:
    with pytest.raises(InputError, match="run several"):
        open_loop(HttpEndpoint("http://127.0.0.1:9"), [Shot(b"", lambda h, b: None)], rate_per_s=1e9, seconds=1)
