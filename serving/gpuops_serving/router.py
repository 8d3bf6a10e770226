"""A small router for one host and for tests: a share of a model's requests goes to a candidate version.

Requests that name no version go to stable or, for its share, to the candidate; everything else is passed on as it is.
Who is sent where depends on a key of the request only: a user stays with one version, and a larger share only ever
moves users to the candidate. Not a traffic plane: one process, loopback, KServe v2 over HTTP; clusters have their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import numpy.typing as npt
from aiohttp import web
from multidict import CIMultiDict
from tritonclient.http import InferResult
from tritonclient.utils import InferenceServerException

from gpuops.errors import InputError, UnavailableError
from gpuops_serving.command import HOST
from gpuops_serving.compare import Target
from gpuops_serving.distance import Distances

STICKY = "X-Gpuops-Key"
"""Header with the key that a request is routed by, such as a user; without it, that is the request's own id."""
MAX_BODY_BYTES = 128 * 2**20
"""Largest request body that is taken."""
SHADOWS = 8
"""Shadow requests going at a time; further ones are left out, so that they never hold up answers."""
_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
_HOP |= {"upgrade", "expect", "host", "content-length"}  # RFC 9110, 7.6.1; the last three are made anew
_HEADER_LENGTH = "Inference-Header-Content-Length"
_FAILURES = (aiohttp.ClientError, TimeoutError)


@dataclass(slots=True)
class Traffic:
    """What one version did with the requests that it was sent."""

    requests: int = 0
    """Requests sent to it."""
    failed: int = 0
    """Requests that it refused or did not answer."""
    ms: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    """Latencies of the last answers, milliseconds."""


class Router:
    """Routes one model, from a thread of its own while its `with` block runs; let that end before the server.

    Args:
        upstream: The server, `http://HOST:PORT`.
        stable: What answers; version "" is the one that the server chooses.
        candidate: The version on trial, of this model or of another such as `forecast.candidate`.
        share: Share of requests for the candidate, 0 to 1; may be set later too.
        shadow: Ask the candidate for its share as well, compare, and answer from stable.
        fallback: Answer from stable what the candidate does not answer.
        port: Port on loopback; 0 picks a free one.
        timeout_s: Longest wait for the server to go on, in seconds.

    Raises:
        InputError: no HTTP server's URL, or a share or a port that is none.
    """

    def __init__(
        self,
        upstream: str,
        stable: Target,
        candidate: Target,
        *,
        share: float = 0.0,
        shadow: bool = False,
        fallback: bool = False,
        port: int = 0,
        timeout_s: float = 30.0,
    ) -> None:
        try:
            parts = urlsplit(upstream)
            complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # half a bracket, a port that is none
            complete = False
        if not complete:
            raise InputError(f"{upstream!r} is no HTTP server: write http://HOST:PORT (gRPC is not routed)")
        if not 0.0 <= share <= 1.0:
            raise InputError(f"a share of {share:g}: give 0 (all to {stable}) to 1 (all to {candidate})")
        if not 0 <= port < 2**16:
            raise InputError(f"port {port}: name one of 1 to 65535, or 0 for a free one")
        self._upstream = f"{parts.scheme}://{parts.netloc}"
        self.stable, self.candidate, self.share = stable, candidate, share
        self._shadow, self._fallback, self._port, self._timeout_s = shadow, fallback, port, timeout_s
        self.traffic = {str(target): Traffic() for target in (stable, candidate)}
        """What both versions did, by MODEL:VERSION."""
        self.shadows_left_out = 0
        self.distances = Distances()
        """How far the candidate's shadow answers lie from stable's."""
        self._shadows: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """For `Client`."""
        return f"http://{HOST}:{self._port}"

    def to_candidate(self, key: str) -> bool:
        """Whether a request with this key is the candidate's."""
        digest = hashlib.blake2b(f"{self.candidate}\0{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gpuops-router", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except OSError as error:
            self.__exit__()
            raise UnavailableError(f"port {self._port} cannot be had ({error.strerror}): name another") from error
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        # What is encoded, kept or sent elsewhere is between the client and the server: nothing is added or undone.
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=self._timeout_s),
        )
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self._port).start()
        self._port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        await self._runner.cleanup()
        for task in self._shadows:
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        # Read whole (413 if it is too large): a request can then be sent twice, and a chunked one is passed on in one
        # piece, as some that are cut very small end Triton 2.51.
        body = await request.read()
        headers = _passed_on(request.headers)
        if request.method != "POST" or request.path != f"/v2/models/{self.stable.model}/infer":
            return await self._pass_on(request, headers, body)
        key = request.headers.get(STICKY) or _request_id(request.headers, body)
        chosen = random.random() < self.share if key is None else self.to_candidate(key)
        if chosen and not self._shadow:
            reply = await self._ask(self.candidate, headers, body)
            if reply.status == 200 or not self._fallback:
                return reply
        reply = await self._ask(self.stable, headers, body)
        if chosen and self._shadow and reply.status == 200:
            if len(self._shadows) < SHADOWS:
                task = self._loop.create_task(self._compare(headers, body, reply))
                self._shadows.add(task)
                task.add_done_callback(self._shadows.discard)
            else:
                self.shadows_left_out += 1
        return reply

    async def _compare(self, headers: Mapping[str, str], body: bytes, stable: web.Response) -> None:
        """Ask the candidate what stable has answered."""
        reply = await self._ask(self.candidate, headers, body)
        if reply.status == 200:
            try:
                self.distances.see(_outputs(stable), _outputs(reply))
            except (InferenceServerException, ValueError, KeyError, TypeError):  # 200, and no answer in it
                self.traffic[str(self.candidate)].failed += 1

    async def _ask(self, target: Target, headers: Mapping[str, str], body: bytes) -> web.Response:
        """Send a request to a version, and count how that went."""
        version = f"/versions/{target.version}" if target.version else ""
        url = f"{self._upstream}/v2/models/{target.model}{version}/infer"
        traffic, begin = self.traffic[str(target)], time.perf_counter()
        traffic.requests += 1
        try:
            async with self._session.post(url, headers=headers, data=body, allow_redirects=False) as answer:
                headers, content = _passed_on(answer.headers), await answer.read()
                reply = web.Response(status=answer.status, headers=headers, body=content)
        except _FAILURES as error:
            reply = self._unreachable(error)
        if reply.status == 200:
            traffic.ms.append((time.perf_counter() - begin) * 1e3)
        else:
            traffic.failed += 1
        return reply

    async def _pass_on(self, request: web.Request, headers: Mapping[str, str], body: bytes) -> web.StreamResponse:
        """Anything but a request to the model; what the server says is passed on as it comes."""
        url, response = f"{self._upstream}{request.raw_path}", web.StreamResponse()
        ask = self._session.request(request.method, url, headers=headers, data=body or None, allow_redirects=False)
        try:
            async with ask as answer:
                response.set_status(answer.status)
                response.headers.update(_passed_on(answer.headers))
                response.content_length = answer.content_length
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
                await response.write_eof()
        except _FAILURES as error:
            if not response.prepared:
                return self._unreachable(error)
            request.protocol.force_close()  # half an answer must not look like a whole one
        return response

    def _unreachable(self, error: Exception) -> web.Response:
        """503 if the server did not take the request, 504 if it is too slow, 502 if it broke off."""
        away = isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError))
        status = 503 if away else 504 if isinstance(error, TimeoutError) else 502
        why = str(error) or type(error).__name__
        return web.json_response({"error": f"no answer from {self._upstream} ({why})"}, status=status)


def _outputs(reply: web.Response) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an answer by output name."""
    length = reply.headers.get(_HEADER_LENGTH)
    result = InferResult.from_response_body(reply.body, header_length=None if length is None else int(length))
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: result.as_numpy(name) for name in names}


def _passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Headers without those that are between two neighbours."""
    dropped = _HOP | {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def _request_id(headers: Mapping[str, str], body: bytes) -> str | None:
    """The id in a request's JSON; None without one, or if it would take long to find or to decompress."""
    length = headers.get(_HEADER_LENGTH, "")
    head = body[: int(length)] if length.isascii() and length.isdigit() else body
    try:
        found = json.loads(head).get("id") if len(head) <= 2**20 else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) and found else None
