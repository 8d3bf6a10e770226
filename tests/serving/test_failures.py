"""What clients make of servers that are away, busy, silent, slow or no Triton at all; and when they ask again."""

import asyncio
import errno
import socket
import ssl
import threading
from contextlib import ExitStack
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from flaky import Behaviour, KServe, close, kserve, listener, one_model, reply, reset, response, silence, tensor
from geventhttpclient.response import HTTPConnectionClosed
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

import gpuops_serving.client
from gpuops.errors import GpuopsError, InputError, UnavailableError
from gpuops_serving.aio import AsyncClient
from gpuops_serving.client import Client
from gpuops_serving.failures import Attempts, translated
from gpuops_serving.operations import Call
from gpuops_serving.wire import Address

X = np.ones((1, 2), np.float32)
SERVER = b'{"name":"late","version":"2.51.0","extensions":[]}'


def ask(url: str, method: str, *arguments: Any, asynchronous: bool, timeout_s: float = 30.0, retries: int = 0) -> Any:
    """One call of a client of its own."""
    if not asynchronous:
        with Client(url, timeout_s, retries=retries) as client:
            return getattr(client, method)(*arguments)

    async def one() -> Any:
        async with AsyncClient(url, timeout_s, retries=retries) as client:
            return await getattr(client, method)(*arguments)

    return asyncio.run(one())


both_clients = pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asyncio"])


def busy(connection: socket.socket, number: int) -> None:
    reply(connection, b'{"error":"busy"}', b"503 Service Unavailable")


@both_clients
@pytest.mark.parametrize("behaviour", [busy, close, reset])
def test_a_server_that_turns_a_request_away_is_asked_as_often_as_allowed_and_then_answers(
    behaviour: Behaviour, asynchronous: bool
) -> None:
    def at_last(connection: socket.socket, number: int) -> None:
        if number < 2:
            behaviour(connection, number)
        else:
            reply(connection, b"[]")

    for retries in (0, 1):
        with listener(at_last) as (server, seen):
            with pytest.raises(UnavailableError):
                ask(f"http://{server}", "models", asynchronous=asynchronous, retries=retries)
            assert len(seen) == 1 + retries
    with listener(at_last) as (server, seen):
        assert ask(f"http://{server}", "models", asynchronous=asynchronous, retries=2) == []
        assert len(seen) == 3


@both_clients
@pytest.mark.parametrize("behaviour", [busy, close, reset])
@pytest.mark.parametrize("method", ["load", "unload"])
def test_what_may_not_be_done_twice_is_sent_once(behaviour: Behaviour, method: str, asynchronous: bool) -> None:
    with listener(behaviour) as (server, seen):
        with pytest.raises(UnavailableError):
            ask(f"http://{server}", method, "m", asynchronous=asynchronous, retries=5)
        assert len(seen) == 1


def answer_twos(request: Any, context: Any, number: int) -> Any:
    rows = request.inputs[0].shape[0]
    return response(tensor("y", "FP32", [rows, 2], np.full((rows, 2), 2.0, np.float32).tobytes()))


def unavailable_twice(request: Any, context: Any, number: int) -> Any:
    if number < 2:
        context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    return answer_twos(request, context, number)


@both_clients
def test_over_grpc_a_stateless_model_is_asked_again_and_one_with_state_never(asynchronous: bool) -> None:
    with_state = one_model()
    with_state.sequence_batching.SetInParent()
    for config, retries, asked in ((one_model(), 1, 2), (one_model(), 2, 3), (with_state, 5, 1)):
        service = KServe(config, unavailable_twice)
        with kserve(service) as url:
            if asked == 3:
                found = ask(url, "infer", "m", {"x": X}, asynchronous=asynchronous, retries=retries)
                assert found["y"].tolist() == [[2.0, 2.0]]
            else:
                with pytest.raises(UnavailableError, match="Exceeds maximum queue size"):
                    ask(url, "infer", "m", {"x": X}, asynchronous=asynchronous, retries=retries)
        assert len(service.asked) == asked
    service = KServe(one_model(), answer_twos)
    with kserve(service) as url, pytest.raises(UnavailableError, match="not now"):
        ask(url, "load", "m", asynchronous=asynchronous, retries=5)
    assert len(service.asked) == 1


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_comes_back_between_two_attempts_is_found(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        waits: list[float] = []
        pause = gpuops_serving.client.time.sleep

        def come_back(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == 2:
                if scheme == "grpc":
                    stack.enter_context(kserve(KServe(one_model(), answer_twos), port))
                else:
                    late = stack.enter_context(socket.create_server(("127.0.0.1", port)))
                    thread = threading.Thread(target=lambda: serve_one(late), daemon=True)
                    thread.start()
                    stack.callback(thread.join, 30)
            pause(wait_s)

        monkeypatch.setattr(gpuops_serving.client.time, "sleep", come_back)
        with Client(f"{scheme}://127.0.0.1:{port}", retries=20) as client:
            if scheme == "grpc":
                assert client.infer("m", {"x": X})["y"].tolist() == [[2.0, 2.0]]
            else:
                assert client.models() == []
    assert len(waits) >= 2


def serve_one(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection:
        reply(connection, b"[]")


@both_clients
@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("method", ["infer", "models", "config", "statistics", "load", "server_version", "ready"])
def test_a_silent_server_is_given_up_at_the_time_limit_and_not_asked_again(
    scheme: str, method: str, asynchronous: bool
) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "infer": ("m", {"x": X}),
        "config": ("m",),
        "load": ("m",),
        "ready": ("m",),
    }
    with listener(silence) as (server, seen):
        with pytest.raises(UnavailableError, match=f"no answer from {scheme}://{server}"):
            ask(
                f"{scheme}://{server}",
                method,
                *arguments.get(method, ()),
                asynchronous=asynchronous,
                timeout_s=0.2,
                retries=5,
            )
        assert len(seen) == 1


@both_clients
def test_over_grpc_an_answer_that_does_not_come_is_given_up_at_the_time_limit(asynchronous: bool) -> None:
    given_up = threading.Event()

    def late(request: Any, context: Any, number: int) -> Any:
        given_up.wait(20)  # then it would come
        return answer_twos(request, context, number)

    service = KServe(one_model(), late)
    with kserve(service) as url:
        with pytest.raises(UnavailableError, match="Deadline Exceeded"):
            ask(url, "infer", "m", {"x": X}, asynchronous=asynchronous, timeout_s=0.5, retries=5)
        given_up.set()
    assert len(service.asked) == 1


@both_clients
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_time_limit_is_one_for_all_attempts(scheme: str, asynchronous: bool) -> None:
    # Turned away after 0.6 s, answered after 0.7 s more: each within the limit of 1 s, both together not.
    slow = threading.Event()

    def over_http(connection: socket.socket, number: int) -> None:
        slow.wait(0.6 if number == 0 else 0.7)
        if number == 0:
            busy(connection, number)
        else:
            reply(connection, b"[]")

    def over_grpc(request: Any, context: Any, number: int) -> Any:
        slow.wait(0.6 if number == 0 else 0.7)
        if number == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        return answer_twos(request, context, number)

    with ExitStack() as stack:
        if scheme == "http":
            url = f"http://{stack.enter_context(listener(over_http))[0]}"
        else:
            url = stack.enter_context(kserve(KServe(one_model(), over_grpc)))
        arguments = ("models",) if scheme == "http" else ("infer", "m", {"x": X})
        with pytest.raises(UnavailableError):
            ask(url, *arguments, asynchronous=asynchronous, timeout_s=1.0, retries=1)


def test_an_asyncio_stream_that_is_closed_does_not_wait_for_what_is_on_its_way() -> None:
    closed = threading.Event()
    answered: list[int] = []

    def late(request: Any, context: Any, number: int) -> Any:
        if any(request.raw_input_contents[0]):  # all but the first
            closed.wait(20)
            answered.append(number)
        return answer_twos(request, context, number)

    async def close_early(url: str) -> None:
        async with AsyncClient(url) as client:
            stream = client.stream("m", [{"x": 0 * X}, *[{"x": X}] * 9], in_flight=3)
            await anext(stream)
            await stream.aclose()

    with kserve(KServe(one_model(), late)) as url:
        asyncio.run(close_early(url))
        assert answered == []
        closed.set()


@both_clients
def test_a_server_that_drips_is_given_up_at_the_time_limit(asynchronous: bool) -> None:
    broken_off = threading.Event()

    def drip(connection: socket.socket, number: int) -> None:
        reply(connection, b"", length=1_000_000)
        try:
            while True:  # each byte within any limit that counts from the last one
                connection.sendall(b" ")
                connection.settimeout(0.02)
                try:
                    if connection.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
        finally:
            broken_off.set()

    with listener(drip) as (server, seen):
        with pytest.raises(UnavailableError, match="no answer"):
            ask(f"http://{server}", "models", asynchronous=asynchronous, timeout_s=0.5, retries=5)
        assert broken_off.wait(30)
        assert len(seen) == 1


def test_a_client_is_of_use_after_a_time_limit_even_one_that_was_met_while_it_sent() -> None:
    def deaf_at_first(connection: socket.socket, number: int) -> None:
        if number == 0:
            held.wait(60)  # reads nothing, so that the request does not even get out
        else:
            reply(connection, b"[]")

    held = threading.Event()
    with listener(deaf_at_first) as (server, _), Client(f"http://{server}", timeout_s=0.5) as client:
        large = Call("infer", ("m", [tritonclient_input(client)], ""), None, True)
        with pytest.raises(UnavailableError, match="no answer"):
            client.call(large)
        held.set()
        assert client.models() == []


def tritonclient_input(client: Client) -> Any:
    """64 MB, more than any socket buffer."""
    array = np.zeros((1 << 24,), np.float32)
    found = client.protocol.InferInput("x", list(array.shape), "FP32")
    found.set_data_from_numpy(array)
    return found


def page(body: bytes, status: bytes = b"200 OK", length: int | None = None) -> Behaviour:
    return lambda connection, number: reply(connection, body, status, length)


@both_clients
@pytest.mark.parametrize("method", ["models", "server_version", "config", "statistics", "infer"])
@pytest.mark.parametrize(
    ("behaviour", "kind", "says"),
    [
        (page(b"<html>Welcome to nginx</html>"), UnavailableError, "is no Triton server"),
        (page(b'{"some": "API"}'), UnavailableError, "is no Triton server"),
        (page(b'["some", "API"]'), UnavailableError, "is no Triton server"),
        (page(b"1"), UnavailableError, "is no Triton server"),
        (page(b'{"name": "cut', length=100), UnavailableError, "no answer"),
        (page(b"<html>", b"500 Internal Server Error"), UnavailableError, "failed"),
        (page(b"<html>", b"502 Bad Gateway"), UnavailableError, "no answer"),
        (page(b'{"error": "who?"}', b"401 Unauthorized"), InputError, "refused: who.: give what it wants .* headers"),
        (page(b"", b"302 Found"), UnavailableError, "failed|no answer"),
        (lambda connection, number: connection.sendall(b"220 smtp\r\n\r\n"), UnavailableError, "no answer"),
        (lambda connection, number: connection.sendall(bytes(64)), UnavailableError, "no answer"),
    ],
)
def test_what_is_no_triton_is_named_in_one_line(
    behaviour: Behaviour, kind: type[GpuopsError], says: str, method: str, asynchronous: bool
) -> None:
    arguments: dict[str, tuple[Any, ...]] = {"infer": ("m", {"x": X}), "config": ("m",)}
    with listener(behaviour) as (server, _), pytest.raises(kind, match=says) as caught:
        ask(f"http://{server}", method, *arguments.get(method, ()), asynchronous=asynchronous)
    assert "\n" not in str(caught.value)
    assert f"http://{server}" in str(caught.value)


address = Address.parse("http://127.0.0.1:1", 30.0, None, None, None, 5)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (BrokenPipeError(errno.EPIPE, "pipe"), True),
        (aiohttp.ClientOSError(errno.ECONNRESET, "reset"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (HTTPConnectionClosed("connection closed."), True),
        (InferenceServerException("busy", "503"), True),
        (InferenceServerException("queue is full", "StatusCode.UNAVAILABLE"), True),
        (TimeoutError("nothing within 1 s"), False),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), False),
        (aiohttp.ServerTimeoutError(), False),
        (InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"), False),
        (InferenceServerException("This protocol is restricted, expecting header x", "StatusCode.UNAVAILABLE"), False),
        (InferenceServerException("wrong shape", "400"), False),
        (InferenceServerException("died", "500"), False),
        (InferenceServerException("gateway timeout", "504"), False),
        (ssl.SSLCertVerificationError("expired"), False),
        (socket.gaierror(socket.EAI_NONAME, "no such host"), False),
        (ValueError("not JSON"), False),
    ],
)
def test_only_who_was_away_or_turned_a_request_away_is_asked_again(error: Exception, again: bool) -> None:
    assert (Attempts(address, 0.0).wait_s(Call("infer"), error, 0.0) is not None) == again
    assert Attempts(address, 0.0).wait_s(Call("infer", repeatable=False), error, 0.0) is None
    assert isinstance(translated(error, "http://h:1"), GpuopsError)


@given(st.floats(0.01, 1e4), st.integers(0, 12), st.lists(st.floats(0.0, 100.0), max_size=15), st.floats(0.0, 1e6))
def test_attempts_are_counted_waits_are_bounded_and_the_deadline_is_kept(
    timeout_s: float, retries: int, taken_s: list[float], start_s: float
) -> None:
    attempts = Attempts(Address.parse("http://127.0.0.1:1", timeout_s, None, None, None, retries), start_s)
    now_s = start_s
    for made, took_s in enumerate(taken_s):
        assert attempts.left_s(now_s) <= max(start_s + timeout_s - now_s, 1e-3) + 1e-9
        now_s += min(took_s, attempts.left_s(now_s))
        wait_s = attempts.wait_s(Call("infer"), ConnectionRefusedError(), now_s)
        if wait_s is None:
            break
        assert made < retries
        assert 0.0 <= wait_s <= min(2.0, 0.05 * 2 ** (made + 1))
        assert now_s + wait_s < start_s + timeout_s
        now_s += wait_s


def test_waits_differ_so_that_many_clients_do_not_come_back_at_once() -> None:
    waits = {Attempts(address, 0.0).wait_s(Call("infer"), ConnectionRefusedError(), 0.0) for _ in range(20)}
    assert len(waits) == 20
