"""The router before a real server: who goes where, what goes wrong, and that clients notice nothing else."""

import contextlib
import http.client
import json
import math
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import pytest
import tritonclient.http
from faulty import GOLDEN, Model, Place
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import answers

from gpuops.errors import InputError, UnavailableError
from gpuops_serving import router as room
from gpuops_serving.client import Client
from gpuops_serving.compare import Target
from gpuops_serving.router import STICKY, Router

STABLE, CANDIDATE, DEAD = Target("tiny", "1"), Target("tiny", "2"), Target("gone", "1")
ONE = {name: array[:1] for name, array in GOLDEN.inputs.items()}
RIGHT = {"1": answers(ONE["a"], ONE["m"], 0.5), "2": answers(ONE["a"], ONE["m"], 0.25)}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Versions 1 and 2 of tiny; the server itself chooses 2."""
    folder = tmp_path_factory.mktemp("router")
    made = Place(folder)
    model = Model(made, "tiny", folder / "model")
    model.deploy(model.bundle("2", gain=0.25))
    model.ledger.close()
    yield made
    made.close()


@pytest.fixture
def route(place: Place) -> Iterator[Callable[..., Router]]:
    with contextlib.ExitStack() as stack:
        yield lambda candidate=CANDIDATE, **options: stack.enter_context(
            Router(place.server.http_url, STABLE, candidate, **options)
        )


def ask(url: str, key: str | None = None) -> str:
    """Version that answers, and it must answer as it does."""
    with Client(url, headers={} if key is None else {STICKY: key}) as client:
        answer = client.answer("tiny", ONE)
    np.testing.assert_allclose(answer.outputs["y"], RIGHT[answer.version], atol=1e-3)
    return answer.version


def test_a_client_needs_to_know_nothing_of_the_router(place: Place, route: Callable[..., Router]) -> None:
    router = route(share=1.0)
    with Client(router.url, access=place.server.access) as client, Client(place.server.http_url) as direct:
        assert client.answer("tiny", ONE).version == "2"
        assert client.answer("tiny", ONE, "1").version == "1"  # who names a version gets it
        assert client.answer("tiny", GOLDEN.inputs).outputs["y"].shape == (8, 1, 8, 8)  # in parts
        assert client.config("tiny") == direct.config("tiny")
        assert client.server_id() == place.server.server_id
        assert {state.version for state in client.models()} == {"1", "2"}
        with pytest.raises(InputError, match="takes a uint8"):
            client.infer("tiny", {**ONE, "a": ONE["a"][:, :2]})
        with pytest.raises(InputError, match="unknown model"):
            client.infer("nobody", ONE)
    assert router.traffic["tiny:2"].requests == 4  # one, and two parts, and the refused one
    assert router.traffic["tiny:2"].failed == 1
    assert len(router.traffic["tiny:2"].ms) == 3
    assert router.traffic["tiny:1"].requests == 0


def test_keys_are_shared_out_as_they_should_and_each_stays_where_it_is(route: Callable[..., Router]) -> None:
    router = route(share=0.3)
    keys = [f"user-{number}" for number in range(30)]
    first = {key: ask(router.url, key) for key in keys}
    assert first == {key: "2" if router.to_candidate(key) else "1" for key in keys}
    assert {key: ask(router.url, key) for key in reversed(keys)} == first
    assert set(first.values()) == {"1", "2"}
    assert router.traffic["tiny:2"].requests == 2 * sum(version == "2" for version in first.values())
    router.share = 0.0
    assert {ask(router.url, key) for key in keys[:5]} == {"1"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_the_share_of_seeded_keys_is_within_binomial_bounds(share: float) -> None:
    router = Router(NOWHERE, STABLE, CANDIDATE, share=share)
    draw, count = random.Random(7), 20_000
    hits = sum(router.to_candidate(str(draw.getrandbits(64))) for _ in range(count))
    assert abs(hits - share * count) <= 5 * math.sqrt(count * share * (1 - share))


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_ever_moves_a_key_to_the_candidate(key: str, one: float, other: float) -> None:
    smaller, larger = (Router(NOWHERE, STABLE, CANDIDATE, share=share) for share in sorted((one, other)))
    assert smaller.to_candidate(key) <= larger.to_candidate(key)
    assert smaller.to_candidate(key) == smaller.to_candidate(key)


def test_another_candidate_is_tried_on_others() -> None:
    routers = [Router(NOWHERE, STABLE, Target("tiny", version), share=0.5) for version in ("2", "3")]
    same = sum(routers[0].to_candidate(str(k)) == routers[1].to_candidate(str(k)) for k in range(10_000))
    assert abs(same - 5000) < 300


@pytest.mark.parametrize("binary", [True, False])
def test_the_id_of_a_request_is_a_key_too(route: Callable[..., Router], binary: bool) -> None:
    router = route(share=0.5)
    tensors = []
    for name, kind in (("a", "UINT8"), ("m", "INT32")):
        tensors.append(tritonclient.http.InferInput(name, list(ONE[name].shape), kind))
        tensors[-1].set_data_from_numpy(ONE[name], binary_data=binary)
    with tritonclient.http.InferenceServerClient(router.url.removeprefix("http://")) as client:
        for key in map(str, range(20)):
            answered = client.infer("tiny", tensors, request_id=key).get_response()
            assert answered["model_version"] == ("2" if router.to_candidate(key) else "1")
            assert answered["id"] == key


def test_without_a_key_both_are_asked(route: Callable[..., Router]) -> None:
    router = route(share=0.5)
    assert {ask(router.url) for _ in range(60)} == {"1", "2"}


def test_a_shadow_changes_no_answer_and_sees_the_difference(route: Callable[..., Router]) -> None:
    router = route(share=1.0, shadow=True)
    assert {ask(router.url) for _ in range(20)} == {"1"}
    router.__exit__()  # what is under way is given up
    assert router.traffic["tiny:1"].requests == 20
    assert router.traffic["tiny:2"].requests + router.shadows_left_out == 20
    assert router.traffic["tiny:2"].requests > 0
    found = router.distances.found()["y"]
    assert found.max_abs == pytest.approx(float(np.abs(RIGHT["1"] - RIGHT["2"]).max()), abs=1e-3)
    router.__enter__()


def test_a_dead_shadow_changes_no_answer(route: Callable[..., Router]) -> None:
    router = route(DEAD, share=1.0, shadow=True)
    assert {ask(router.url) for _ in range(5)} == {"1"}
    assert router.distances.found() == {}


def test_a_dead_candidates_requests_are_answered_by_stable_only_if_that_is_wanted(
    route: Callable[..., Router],
) -> None:
    router = route(DEAD, share=1.0, fallback=True)
    assert {ask(router.url) for _ in range(5)} == {"1"}
    assert (router.traffic["gone:1"].failed, router.traffic["tiny:1"].failed) == (5, 0)
    strict = route(DEAD, share=1.0)
    with pytest.raises(InputError, match="unknown model"):
        ask(strict.url)


def test_a_fallback_hides_no_fault_of_the_request(route: Callable[..., Router]) -> None:
    router = route(share=1.0, fallback=True)
    with Client(router.url) as client, pytest.raises(InputError, match="takes a uint8"):
        client.infer("tiny", {**ONE, "m": np.full((1, 1), 99, np.int32)})
    assert ask(router.url) == "2"


def test_a_server_that_is_away_is_said_at_once() -> None:
    with Router(NOWHERE, STABLE, CANDIDATE, fallback=True, share=1.0) as router:
        for method, path in (("POST", "/v2/models/tiny/infer"), ("GET", "/v2/health/ready")):
            status, _, body = exchange(router, method, path, b"{}")
            assert status == 503
            assert "no answer from http://127.0.0.1:9" in json.loads(body)["error"]
        with Client(router.url) as client, pytest.raises(UnavailableError, match="no answer"):
            client.server_version()


def exchange(
    router: Router, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **options: Any
) -> tuple[int, list[tuple[str, str]], bytes]:
    """One request as it is, without a library's own headers."""
    connection = http.client.HTTPConnection("127.0.0.1", int(router.url.rsplit(":", 1)[1]), timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {}, **options)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()


class Upstream(threading.Thread):
    """A socket that takes each request whole, says something that no server should, and hangs up."""

    def __init__(self, says: bytes, hang: bool = False) -> None:
        super().__init__()
        self.says, self.hang, self.heard = says, hang, b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.over = threading.Event()

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                if self.over.is_set():
                    return
                self.hear(connection)
                if self.hang:
                    self.over.wait(60)
                connection.sendall(self.says)

    def hear(self, connection: socket.socket) -> None:
        heard = b""
        while b"\r\n\r\n" not in heard:
            heard += connection.recv(65536)
        head, _, body = heard.partition(b"\r\n\r\n")
        length = next((int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        self.heard = head + b"\r\n\r\n" + body

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        socket.create_connection(self.listener.getsockname()).close()
        self.join()
        self.listener.close()


INFER = "/v2/models/tiny/infer"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"


@pytest.mark.parametrize(
    ("says", "status"), [(HALF, 502), (b"", 503), (b"nonsense\r\n\r\n", 502), (b"HTTP/1.1 302 Found\r\n\r\n", 302)]
)
def test_a_server_that_breaks_off_is_an_error_and_never_half_an_answer(says: bytes, status: int) -> None:
    with Upstream(says) as upstream, Router(upstream.url, STABLE, CANDIDATE) as router:
        assert exchange(router, "POST", INFER, b"{}")[0] == status
    with Upstream(says) as upstream, Router(upstream.url, STABLE, CANDIDATE) as router:
        if says == HALF:  # it had begun to pass it on
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                exchange(router, "GET", "/v2")
        else:
            assert exchange(router, "GET", "/v2")[0] == status


def test_a_server_that_hangs_is_not_waited_for_longer_than_allowed() -> None:
    with Upstream(b"", hang=True) as upstream, Router(upstream.url, STABLE, CANDIDATE, timeout_s=0.3) as router:
        status, _, body = exchange(router, "POST", INFER, b"{}")
        upstream.over.set()
    assert status == 504
    assert "no answer" in json.loads(body)["error"]


def test_headers_between_neighbours_stay_there_and_nothing_is_added() -> None:
    says = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nKeep-Alive: timeout=9\r\nConnection: X-Mine, keep-alive\r\n"
        b"X-Mine: 1\r\nX-Yours: a\r\nX-Yours: b\r\nContent-Encoding: gzip\r\n\r\nok"
    )
    for method, path in (("POST", INFER), ("POST", "/v2/models/other/infer")):
        with Upstream(says) as upstream, Router(upstream.url, STABLE, CANDIDATE) as router:
            sent = {
                "Connection": "X-Secret, close",
                "X-Secret": "1",
                "TE": "trailers",
                "X-Kept": "yes",
                "Accept": "*/*",
            }
            _, headers, body = exchange(router, method, path, iter([b"a", b"", b"bc"]), sent, encode_chunked=True)
        assert body == b"ok"
        names = [name.lower() for name, _ in headers]
        assert "x-mine" not in names
        assert "keep-alive" not in names
        assert [value for name, value in headers if name == "X-Yours"] == ["a", "b"]
        assert ("Content-Encoding", "gzip") in headers
        head, _, heard = upstream.heard.partition(b"\r\n\r\n")
        assert heard == b"abc"
        got = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        assert set(got) - {"Accept-Encoding"} == {"Host", "X-Kept", "Accept", "Content-Length"}
        assert got["Accept-Encoding"] == "identity"  # http.client's own
        assert (got["Host"], got["Content-Length"]) == (upstream.url.removeprefix("http://"), "3")


def test_an_answer_is_not_compressed_for_who_did_not_ask(route: Callable[..., Router]) -> None:
    with socket.create_connection(("127.0.0.1", int(route().url.rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert b"200 OK" in answer
    assert b"content-encoding" not in answer.lower()


def body_of(inputs: dict[str, Any]) -> bytes:
    kinds = {"a": "UINT8", "m": "INT32"}
    tensors = [
        {"name": name, "shape": list(array.shape), "datatype": kinds[name], "data": array.ravel().tolist()}
        for name, array in inputs.items()
    ]
    return json.dumps({"inputs": tensors}).encode()


def test_a_body_in_very_small_chunks_reaches_the_server_in_one_piece(route: Callable[..., Router]) -> None:
    whole = body_of(ONE)
    status, _, body = exchange(
        route(), "POST", INFER, (whole[k : k + 1] for k in range(len(whole))), encode_chunked=True
    )
    assert status == 200, body
    np.testing.assert_allclose(json.loads(body)["outputs"][0]["data"], RIGHT["1"].ravel(), atol=1e-3)


def test_clients_that_go_away_hold_nobody_up(route: Callable[..., Router], caplog: pytest.LogCaptureFixture) -> None:
    router = route()
    port = int(router.url.rsplit(":", 1)[1])
    for sent in (b"POST ", b"POST /v2/models/tiny/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{", b"\0\1\2\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(sent)
        assert ask(router.url) == "1"
    with socket.create_connection(("127.0.0.1", port)) as impatient:  # gone before the answer
        whole = body_of(ONE)
        impatient.sendall(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(whole)) + whole)
    assert ask(router.url) == "1"
    assert [record for record in caplog.records if record.exc_info and "Bad" not in str(record.exc_info)] == []


def test_a_body_that_is_too_large_is_refused(route: Callable[..., Router], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_BODY_BYTES", 1000)
    router = route()
    assert exchange(router, "POST", INFER, bytes(1001))[0] == 413
    assert exchange(router, "POST", INFER, iter([bytes(600)] * 2), encode_chunked=True)[0] == 413
    assert ask_direct(router) == "1"


def ask_direct(router: Router) -> str:
    with Client(router.url) as client:
        return client.answer("tiny", ONE, "1").version


def test_what_cannot_be_routed_is_named(route: Callable[..., Router]) -> None:
    for url in ("grpc://127.0.0.1:8001", "127.0.0.1:8000", "http://[::1", "http://127.0.0.1:99999"):
        with pytest.raises(InputError, match="no HTTP server"):
            Router(url, STABLE, CANDIDATE)
    with pytest.raises(InputError, match=r"a share of 1\.5"):
        Router(NOWHERE, STABLE, CANDIDATE, share=1.5)
    for port in (-1, 65536):
        with pytest.raises(InputError, match="name one of 1 to 65535"):
            Router(NOWHERE, STABLE, CANDIDATE, port=port)
    router = route()
    taken = int(router.url.rsplit(":", 1)[1])
    with pytest.raises(UnavailableError, match=f"port {taken} cannot be had"):
        Router(NOWHERE, STABLE, CANDIDATE, port=taken).__enter__()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["", "0", "5", "99999", "-1", "x", "²"]))
def test_no_body_and_no_header_length_upsets_the_search_for_an_id(body: bytes, length: str) -> None:
    found = room._request_id({"Inference-Header-Content-Length": length}, body)
    assert found is None or isinstance(found, str)
    assert room._request_id({}, b"[" * 100_000) is None
    assert room._request_id({}, b'{"id": 3}') is None
    assert room._request_id({"Inference-Header-Content-Length": "13"}, b'{"id": "abc"}\xff') == "abc"
