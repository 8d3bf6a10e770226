"""The asyncio client, against the real server; it says the same as the blocking one."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_bundle import golden

from gpuops.errors import InputError
from gpuops_serving.aio import AsyncClient
from gpuops_serving.client import Client
from gpuops_serving.server import TritonServer

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


def test_a_stream_answers_in_order_and_reads_no_further_than_it_may(url: str) -> None:
    batch = golden(count=23)
    read: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, 23, 4):
            read.append(start)
            yield {name: array[start : start + 4] for name, array in batch.inputs.items()}

    async def ask() -> list[Any]:
        found = []
        async with AsyncClient(url) as client:
            async for answer in client.stream("tiny", batches(), in_flight=2):
                found.append(answer["y"])
                assert len(read) <= len(found) + 2
        return found

    found = asyncio.run(ask())
    assert [len(part) for part in found] == [4, 4, 4, 4, 4, 3]
    assert batch.max_abs_diff({"y": np.concatenate(found)}) <= 1e-3


def test_a_stream_ends_at_its_first_error_or_when_it_is_closed_and_leaves_no_task(url: str) -> None:
    read: list[int] = []

    def batches(bad: int) -> Iterator[dict[str, Any]]:
        for place in range(100):
            read.append(place)
            yield {"a": GOLDEN.inputs["a"][:1], "m": GOLDEN.inputs["m"][:1] + (50 if place == bad else 0)}

    async def ask() -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(InputError, match="out of data bounds"):
                async for _ in client.stream("tiny", batches(3), in_flight=2):
                    pass
            assert len(read) <= 6
            stream = client.stream("tiny", batches(-1), in_flight=2)
            await anext(stream)
            await stream.aclose()
            assert len(asyncio.all_tasks()) == 1
            with pytest.raises(InputError, match="at least 1"):
                await anext(client.stream("tiny", batches(-1), in_flight=0))

    asyncio.run(ask())
    assert len(read) <= 12


def test_a_closed_client_says_so(url: str) -> None:
    async def ask() -> None:
        client = AsyncClient(url)
        await client.close()
        with pytest.raises(InputError, match="is closed: open another"):
            await client.models()

    asyncio.run(ask())


def test_a_cancelled_request_is_cancelled_and_the_client_goes_on(url: str) -> None:
    async def ask() -> float:
        async with AsyncClient(url) as client:
            for _ in range(20):
                task = asyncio.create_task(client.infer("tiny", GOLDEN.inputs))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            return GOLDEN.max_abs_diff(await client.infer("tiny", GOLDEN.inputs))

    assert asyncio.run(ask()) <= 1e-3
