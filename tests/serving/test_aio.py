"""The asyncio client, and what both clients share: streams, keys, retries, time limits."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tiny_bundle import SIGNATURE, answers, deployed, golden

from gpuops.errors import GpuopsError, InputError, UnavailableError
from gpuops_serving.aio import AsyncClient
from gpuops_serving.client import Client, group
from gpuops_serving.server import TritonServer
from gpuops_serving.wire import Address, Attempts, Call

GOLDEN = golden()


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return server.http_url if request.param == "http" else server.grpc_url


def test_hundreds_of_requests_at_a_time_are_each_answered_rightly(url: str) -> None:
    async def ask() -> list[float]:
        async with AsyncClient(url) as client:

            async def one(place: int) -> float:
                batch = golden(seed=place, count=1 + place % 7)  # also larger than the largest batch
                return batch.max_abs_diff(await client.infer("tiny", batch.inputs))

            return list(await asyncio.gather(*(one(place) for place in range(200))))

    assert max(asyncio.run(ask())) <= 1e-3


def test_both_clients_say_the_same_of_a_server(url: str, server: TritonServer) -> None:
    async def ask() -> dict[str, Any]:
        async with AsyncClient(url) as client:
            return {
                "version": await client.server_version(),
                "id": await client.server_id(),
                "models": await client.models(),
                "config": await client.config("tiny"),
                "raw": await client.raw_config("tiny"),
                "ready": [await client.ready("tiny"), await client.ready("tiny", "7"), await client.ready("other")],
                "version_id": [await client.version_id("tiny"), await client.version_id("tiny", "1")],
                "sample": await client.sample("tiny"),
                "answer": (await client.answer("tiny", GOLDEN.inputs)).version,
            }

    with Client(url) as client:
        same = {
            "version": client.server_version(),
            "id": client.server_id(),
            "models": client.models(),
            "config": client.config("tiny"),
            "raw": client.raw_config("tiny"),
            "ready": [client.ready("tiny"), client.ready("tiny", "7"), client.ready("other")],
            "version_id": [client.version_id("tiny"), client.version_id("tiny", "1")],
            "sample": client.sample("tiny"),
            "answer": client.answer("tiny", GOLDEN.inputs).version,
        }
    assert asyncio.run(ask()) == same
    assert same["ready"] == [True, False, False]
    assert same["id"] == server.server_id


def test_statistics_are_whole_numbers_and_the_same_over_both_protocols(server: TritonServer) -> None:
    with Client(server.http_url) as http, Client(server.grpc_url) as grpc:
        before, _ = http.statistics("tiny", "1"), grpc.statistics("tiny")
        grpc.infer("tiny", GOLDEN.batch(3).inputs)
        (over_http,), (over_grpc,) = http.statistics("tiny"), grpc.statistics("tiny")
    assert over_http["inference_stats"] == over_grpc["inference_stats"]
    assert over_http["inference_count"] == before[0]["inference_count"] + 3
    assert {entry["batch_size"] for entry in over_http["batch_stats"]} == {
        entry["batch_size"] for entry in over_grpc["batch_stats"]
    }
    assert (over_http["name"], over_http["version"]) == ("tiny", "1")


def test_errors_are_the_same_kind_as_those_of_the_blocking_client(url: str) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("other", GOLDEN.inputs),
        ("tiny", {"a": GOLDEN.inputs["a"]}),
        ("tiny", {"a": GOLDEN.inputs["a"], "m": GOLDEN.inputs["m"] + 50}),
    ]

    async def ask(model: str, inputs: Any) -> str:
        async with AsyncClient(url) as client:
            with pytest.raises(InputError) as caught:
                await client.infer(model, inputs)
        return str(caught.value)

    for model, inputs in wrong:
        with Client(url) as client, pytest.raises(InputError) as caught:
            client.infer(model, inputs)
        assert asyncio.run(ask(model, inputs)) == str(caught.value)


def test_a_stream_answers_in_order_and_from_single_samples(url: str) -> None:
    batch = golden(count=23)
    samples = [{name: array[k] for name, array in batch.inputs.items()} for k in range(23)]
    with Client(url) as client:
        found = list(client.stream("tiny", group(samples, SIGNATURE.max_batch), in_flight=3))
    assert [len(part["y"]) for part in found] == [5, 5, 5, 5, 3]
    assert batch.max_abs_diff({"y": np.concatenate([part["y"] for part in found])}) <= 1e-3


def test_a_stream_ends_at_the_first_error_and_reads_no_further(url: str) -> None:
    taken = []

    def batches() -> Iterator[dict[str, Any]]:
        for place in range(100):
            taken.append(place)
            yield {"a": GOLDEN.inputs["a"][:1], "m": GOLDEN.inputs["m"][:1] + (50 if place == 3 else 0)}

    with Client(url) as client, pytest.raises(InputError, match="out of data bounds"):
        list(client.stream("tiny", batches(), in_flight=2))
    assert len(taken) <= 6


@contextlib.contextmanager
def listener(behaviour: Callable[[socket.socket, int], None]) -> Iterator[tuple[str, list[int]]]:
    """A server that treats its n-th connection as it is told; yields its URL and the connections so far."""
    seen: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    seen.append(len(seen))
                    behaviour(connection, seen[-1])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


OK = b'{"name":"late","version":"2.51.0","extensions":[]}'


def busy_twice(connection: socket.socket, number: int) -> None:
    connection.recv(65536)
    head, body = (b"503 Service Unavailable", b'{"error":"busy"}') if number < 2 else (b"200 OK", OK)
    connection.sendall(
        b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        % (head, len(body), body)
    )
    connection.close()


def test_a_busy_server_is_asked_again_as_often_as_allowed() -> None:
    with listener(busy_twice) as (url, seen), Client(url, retries=2) as client:
        assert client.server_id() == "late"
        assert len(seen) == 3
    with listener(busy_twice) as (url, seen), Client(url, retries=1) as client:
        with pytest.raises(UnavailableError, match="busy"):
            client.server_id()
        assert len(seen) == 2


def test_what_may_not_be_sent_twice_is_not() -> None:
    with listener(busy_twice) as (url, seen), Client(url, retries=5) as client:
        with pytest.raises(GpuopsError):
            client.load("tiny")
        assert len(seen) == 1


def test_a_timeout_is_not_tried_again() -> None:
    address = Address.parse("http://127.0.0.1:1", 30.0, None, None, None, 5)
    attempts = Attempts(address, 0.0)
    assert attempts.wait_s(Call("infer"), TimeoutError(), 0.0) is None
    refused = Attempts(address, 0.0)
    waits = [refused.wait_s(Call("infer"), ConnectionRefusedError(), 0.0) for _ in range(6)]
    assert all(wait is not None and 0 <= wait <= 2 for wait in waits[:5])
    assert waits[5] is None
    assert Attempts(address, 0.0).wait_s(Call("infer"), ConnectionRefusedError(), 31.0) is None


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("method", ["infer", "models", "config", "statistics", "load", "server_version"])
def test_a_silent_server_takes_no_longer_than_the_time_limit(scheme: str, method: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "infer": ("tiny", GOLDEN.inputs),
        "config": ("tiny",),
        "load": ("tiny",),
    }

    async def ask(url: str) -> None:
        async with AsyncClient(url, timeout_s=0.2) as client:
            with pytest.raises(UnavailableError):
                await getattr(client, method)(*arguments.get(method, ()))

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout_s=0.2, retries=3) as client, pytest.raises(UnavailableError):
            getattr(client, method)(*arguments.get(method, ()))
        asyncio.run(asyncio.wait_for(ask(url), 20))


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(deployed(tmp_path_factory.mktemp("controlled")), control=True) as running:
        yield running


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_models_are_loaded_by_who_has_the_key_and_nobody_else(controlled: TritonServer, protocol: str) -> None:
    url = controlled.http_url if protocol == "http" else controlled.grpc_url
    with Client(url) as stranger:
        for call in (stranger.load, stranger.unload):
            with pytest.raises(InputError, match=r"restricted.*its key as access"):
                call("tiny")
        with pytest.raises(InputError, match="restricted"):
            stranger.models()
        assert GOLDEN.max_abs_diff(stranger.infer("tiny", GOLDEN.inputs)) <= 1e-3
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


def test_a_server_without_model_control_says_so(server: TritonServer) -> None:
    with Client(server.http_url) as client, pytest.raises(InputError, match="explicit model load / unload"):
        client.load("tiny")
