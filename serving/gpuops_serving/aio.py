"""The client for asyncio: many requests of one event loop at a time, over one connection pool."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import islice
from typing import Any, Self, TypeVar

import numpy.typing as npt
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from gpuops.errors import GpuopsError, InputError
from gpuops.spec import Arrays
from gpuops_serving.client import call_options
from gpuops_serving.failures import FAILURES, Attempts, translated
from gpuops_serving.operations import Call, Operations, Steps
from gpuops_serving.wire import CHANNEL, Address, Answer, ModelConfig, ModelState, Tls

T = TypeVar("T")
CONNECTIONS = 1000
"""HTTP connections that one client may have open."""


class AsyncClient:
    """As `gpuops_serving.Client`, with coroutines; make it inside the loop that uses it, and close it there.

    Args:
        url: See `Client`, as for all of these.
        timeout_s: Longest time to wait for one answer, retries included, in seconds.
        tls: Certificates.
        access: Key to restricted APIs.
        headers: Sent with every call.
        retries: How often a call that is safe to repeat is tried again.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 30.0,
        *,
        tls: Tls | None = None,
        access: tuple[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        retries: int = 0,
    ) -> None:
        self._address = Address.parse(url, timeout_s, tls, access, headers, retries)
        self._operations = Operations(self._address, tritonclient.grpc if self._address.grpc else tritonclient.http)
        self._connection = _connect(self._address)
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """As it was given."""
        return self._address.url

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        await self._connection.close()

    async def infer(self, model: str, inputs: Arrays, version: str = "") -> dict[str, npt.NDArray[Any]]:
        """As `Client.infer`."""
        return (await self.answer(model, inputs, version)).outputs

    async def answer(self, model: str, inputs: Arrays, version: str = "") -> Answer:
        """As `Client.answer`."""
        return await self._run(self._operations.answer(model, inputs, version))

    async def stream(
        self, model: str, batches: Iterable[Arrays], *, version: str = "", in_flight: int = 4
    ) -> AsyncIterator[dict[str, npt.NDArray[Any]]]:
        """As `Client.stream`; closing it before its end cancels what is on its way."""
        if in_flight < 1:
            raise InputError(f"{in_flight} requests in flight: at least 1")
        source = iter(batches)
        waiting: deque[asyncio.Task[dict[str, npt.NDArray[Any]]]] = deque()
        try:
            waiting.extend(asyncio.create_task(self.infer(model, b, version)) for b in islice(source, in_flight))
            while waiting:
                answer = await waiting[0]
                waiting.popleft()
                waiting.extend(asyncio.create_task(self.infer(model, b, version)) for b in islice(source, 1))
                yield answer
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def server_version(self) -> str:
        """As `Client.server_version`."""
        return await self._run(self._operations.server("version"))

    async def server_id(self) -> str:
        """As `Client.server_id`."""
        return await self._run(self._operations.server("name"))

    async def models(self) -> list[ModelState]:
        """As `Client.models`."""
        return await self._run(self._operations.models())

    async def ready(self, model: str, version: str = "") -> bool:
        """As `Client.ready`."""
        return bool(await self._call(Call("is_model_ready", (model, version), as_result=True)))

    async def config(self, model: str, version: str = "") -> ModelConfig:
        """As `Client.config`."""
        return await self._run(self._operations.config(model, version))

    async def raw_config(self, model: str, version: str = "") -> dict[str, Any]:
        """As `Client.raw_config`."""
        return await self._run(self._operations.raw_config(model, version))

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        """As `Client.statistics`."""
        return await self._run(self._operations.statistics(model, version))

    async def load(self, model: str) -> None:
        """As `Client.load`."""
        await self._run(self._operations.change("load_model", model))

    async def unload(self, model: str) -> None:
        """As `Client.unload`."""
        await self._run(self._operations.change("unload_model", model))

    async def version_id(self, model: str, version: str = "") -> str:
        """As `Client.version_id`."""
        return await self._run(self._operations.version_id(model, version))

    async def sample(self, model: str) -> Any:
        """As `Client.sample`."""
        return await self._run(self._operations.sample(model))

    async def _run(self, steps: Steps[T]) -> T:
        """Carry out an operation."""
        try:
            wanted = next(steps)
            while True:
                try:
                    found = await self._call(wanted)
                except GpuopsError as error:
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(found)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _call(self, call: Call) -> Any:
        if self._closed:
            raise InputError(f"this client of {self.url} is closed: open another")
        options = call_options(call, self._address)
        method = getattr(self._connection, call.method)
        attempts = Attempts(self._address, time.monotonic())
        while True:
            left_s = attempts.left_s(time.monotonic())
            try:
                if self._address.grpc:
                    return await method(*call.arguments, client_timeout=left_s, **options)
                async with asyncio.timeout(left_s):
                    return await method(*call.arguments, **options)
            except FAILURES as error:
                wait_s = attempts.wait_s(call, error, time.monotonic())
                if wait_s is None:
                    raise translated(error, self.url) from error
                await asyncio.sleep(wait_s)


def _connect(address: Address) -> Any:
    if address.grpc:
        tls = {} if address.tls is None else address.tls.grpc()
        return tritonclient.grpc.aio.InferenceServerClient(address.authority, channel_args=CHANNEL, **tls)
    https = {} if address.tls is None else {"ssl": True, "ssl_context": address.tls.context()}
    return tritonclient.http.aio.InferenceServerClient(
        address.authority, conn_limit=CONNECTIONS, conn_timeout=address.timeout_s, **https
    )
