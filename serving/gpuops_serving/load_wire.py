"""Requests as bytes, and the connections that send them: HTTP/1.1 by hand, gRPC with messages that are encoded already.

A shot is one request, encoded once and sent many times. `Endpoint.opened` gives a coroutine function that sends a shot
and returns what is wrong with the answer, or None.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from gpuops.bundle import Golden
from gpuops.errors import InputError, UnavailableError
from gpuops.spec import Arrays
from gpuops_serving.wire import CHANNEL

REJECTED = "rejected"
"""What is wrong where a server has too much to do: a full queue, 429, 503, UNAVAILABLE."""
CONNECTIONS = 512
"""HTTP connections that are opened at most; a request waits for one, in its latency."""
_HEADER_LENGTH, _LENGTH = b"inference-header-content-length", b"content-length"

Check = Callable[[bytes, bytes], str | None]
"""(headers in lower case, body) of an answer to what is wrong with it, or None."""
Send = Callable[["Shot"], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, encoded."""

    content: bytes
    """HTTP request with its headers, or a gRPC message."""
    check: Check
    """What is wrong with an answer."""


class Endpoint(Protocol):
    """Where shots are sent."""

    def opened(self) -> Any:
        """Async context manager of a `Send`."""
        ...


class HttpEndpoint:
    """A server over HTTP/1.1, connections kept open and used one request at a time.

    Args:
        url: http://HOST:PORT.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise InputError(f"{url!r} is not http://HOST:PORT: load is sent in plain text")
        self.url, self._host, self._port = url, parts.hostname, parts.port

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Send]:
        """Send shots; connections are opened as they are needed."""
        free: deque[_Connection] = deque()
        every: list[_Connection] = []
        slots = asyncio.Semaphore(CONNECTIONS)
        loop = asyncio.get_running_loop()

        async def connect() -> _Connection:
            _, made = await loop.create_connection(_Connection, self._host, self._port)
            every.append(made)
            return made

        async def send(shot: Shot) -> str | None:
            async with slots:
                connection = free.pop() if free else None
                try:
                    if connection is None or connection.lost:
                        connection = await connect()
                    status, headers, body = await connection.ask(shot.content)
                except OSError as error:
                    return f"connection: {error.strerror or error}"
                if not connection.lost:
                    free.append(connection)
            if status == 200:
                return shot.check(headers, body)
            return REJECTED if status in (429, 503) or _full(body) else f"HTTP {status}: {body[:100].decode('latin-1')}"

        try:
            free.append(await connect())
        except OSError as error:
            raise UnavailableError(f"{self.url} cannot be reached ({error.strerror or error}): start it") from error
        try:
            yield send
        finally:
            for connection in every:
                connection.close()


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; answers must say how long they are, as servers of tensors do."""

    def __init__(self) -> None:
        self.lost = False
        self._transport: Any = None
        self._answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None
        self._received = bytearray()
        self._needed = 0
        self._head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, content: bytes) -> asyncio.Future[tuple[int, bytes, bytes]]:
        """Status, headers in lower case, and body of the answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._needed = 0
        self._transport.write(content)
        return self._answer

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            self._take()
        except ValueError as error:  # whatever this is, it is no HTTP/1.1
            self._end(ConnectionError(f"no HTTP answer ({error})"))
            self.close()

    def _take(self) -> None:
        """Give out the answer once all of it is there."""
        if not self._needed:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = end + 4
            self._needed = self._head + _number(bytes(self._received[: self._head]).lower(), _LENGTH)
        if len(self._received) < self._needed or self._answer is None:
            return
        content, self._received = bytes(self._received), bytearray()
        headers = content[: self._head].lower()
        status = int(headers[9:12])
        self.lost = b"connection: close" in headers
        answer, self._answer = self._answer, None
        if not answer.done():
            answer.set_result((status, headers, content[self._head :]))

    def _end(self, error: Exception) -> None:
        self.lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionResetError("closed by the server"))


class GrpcEndpoint:
    """A server over gRPC, on a few channels.

    Args:
        url: grpc://HOST:PORT.
        channels: Connections; one carries many requests at a time.
    """

    METHOD = "/inference.GRPCInferenceService/ModelInfer"

    def __init__(self, url: str, channels: int = 2) -> None:
        parts = urlsplit(url)
        if parts.scheme != "grpc" or not parts.hostname or not parts.port:
            raise InputError(f"{url!r} is not grpc://HOST:PORT: load is sent in plain text")
        self.url, self._authority, self._channels = url, parts.netloc, channels

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Send]:
        """Send shots; gRPC's own errors are told by their code."""
        every = [grpc.aio.insecure_channel(self._authority, options=CHANNEL) for _ in range(self._channels)]
        # Messages are encoded, so there is nothing to serialise.
        calls = [channel.unary_unary(self.METHOD) for channel in every]
        turn = 0

        async def send(shot: Shot) -> str | None:
            nonlocal turn
            turn += 1
            try:
                answer = await calls[turn % len(calls)](shot.content)
            except grpc.aio.AioRpcError as error:
                rejected = error.code() is grpc.StatusCode.UNAVAILABLE
                return REJECTED if rejected else f"{error.code().name}: {(error.details() or '')[:100]}"
            return shot.check(b"", answer)

        try:
            await asyncio.wait_for(every[0].channel_ready(), 10.0)
        except TimeoutError as error:
            raise UnavailableError(f"{self.url} cannot be reached: start it") from error
        try:
            yield send
        finally:
            for channel in every:
                await channel.close()


def shots(url: str, model: str, golden: Golden, tolerance: float, version: str = "", size: int = 1) -> list[Shot]:
    """Requests of `size` samples each, out of golden ones, whose every answer is compared with the golden one.

    Args:
        url: http://HOST:PORT or grpc://HOST:PORT.
        model: Model name.
        golden: Samples and answers.
        tolerance: Largest absolute difference that passes.
        version: Version number; empty is the version the server chooses.
        size: Samples a request.
    """
    count = len(next(iter(golden.inputs.values())))
    made = []
    for first in range(count):
        part = golden.take((first + np.arange(size)) % count)
        if url.startswith("grpc"):
            made.append(Shot(_grpc_request(model, version, part.inputs), compared(part, tolerance, _grpc_answer)))
        else:
            path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
            content = http_request(url, path, *_http_body(part.inputs))
            made.append(Shot(content, compared(part, tolerance, _http_answer)))
    return made


def http_request(url: str, path: str, body: bytes, headers: Sequence[str] = ()) -> bytes:
    """A POST request as bytes."""
    head = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(url).netloc}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def _http_body(inputs: Arrays) -> tuple[bytes, list[str]]:
    tensors = []
    for name, array in inputs.items():
        tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        tensors.append(tensor)
    body, json_length = InferenceServerClient.generate_request_body(tensors)
    return body, ["Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {json_length}"]


def _http_answer(headers: bytes, body: bytes) -> Arrays:
    length = _number(headers, _HEADER_LENGTH)
    if not length:  # numbers as JSON
        result = InferenceServerClient.parse_response_body(body)
        return {tensor["name"]: result.as_numpy(tensor["name"]) for tensor in result.get_response()["outputs"]}
    return {
        name: np.frombuffer(body, dtype, math.prod(shape), length + start).reshape(shape)
        for name, dtype, shape, start in _layout(body[:length])
    }


@lru_cache(maxsize=64)
def _layout(header: bytes) -> list[tuple[str, Any, tuple[int, ...], int]]:
    """Name, dtype, shape and first byte of each output of an answer, whose JSON is nearly always as the one before it.

    tritonclient would read it anew for each, at several times the cost of all else that is done with an answer, on a
    machine that the server may share.
    """
    found, start = [], 0
    for tensor in json.loads(header)["outputs"]:
        found.append((tensor["name"], triton_to_np_dtype(tensor["datatype"]), tuple(tensor["shape"]), start))
        start += tensor["parameters"]["binary_data_size"]
    return found


def _grpc_request(model: str, version: str, inputs: Arrays) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return bytes(request.SerializeToString())


def _grpc_answer(headers: bytes, body: bytes) -> Arrays:
    answer = service_pb2.ModelInferResponse.FromString(body)
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return {
        tensor.name: np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tuple(tensor.shape))
        for tensor, raw in pairs
    }


def compared(golden: Golden, tolerance: float, decode: Callable[[bytes, bytes], Arrays]) -> Check:
    """A check of answers against golden ones; `decode` turns headers and body into arrays by name."""
    least = sum(answer.nbytes for answer in golden.outputs.values())

    def close(got: npt.NDArray[Any] | None, want: npt.NDArray[np.float32]) -> bool:
        return got is not None and got.shape == want.shape and bool(np.abs(got - want).max() <= tolerance)

    def check(headers: bytes, body: bytes) -> str | None:
        if len(body) < least:
            return "an answer with too few bytes"
        try:
            answers = decode(headers, body)
        except (ValueError, LookupError, TypeError, InferenceServerException, DecodeError) as error:
            return f"an answer that cannot be read ({error})"
        # Nearly always enough, and much cheaper than the comparison in float64 that knows of NaN.
        if all(close(answers.get(name), want) for name, want in golden.outputs.items()):
            return None
        return None if golden.max_abs_diff(answers) <= tolerance else "a wrong answer"

    return check


def _number(headers: bytes, name: bytes) -> int:
    """Number in a header; 0 if there is none."""
    start = b"\r\n" + name + b":"  # one header's name ends like another's
    at = headers.find(start)
    return int(headers[at + len(start) :].split(b"\r\n", 1)[0]) if at >= 0 else 0


def _full(body: bytes) -> bool:
    """Whether Triton says that a queue is full or a request waited too long in it."""
    return b"maximum queue size" in body or b"imeout" in body
