"""What goes wrong between a client and a server: as our own errors, and when a call may be made again."""

from __future__ import annotations

import errno
import random
import ssl
from http.client import HTTPException

import aiohttp
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException

from gpuops.errors import GpuopsError, InputError, UnavailableError
from gpuops_serving.operations import Call
from gpuops_serving.wire import Address

FAILURES: tuple[type[Exception], ...] = (
    InferenceServerException,
    OSError,
    EOFError,
    HTTPException,
    aiohttp.ClientError,
    ValueError,
    LookupError,
    TypeError,
)
"""What tritonclient and the libraries under it raise: refused, reset, timed out, or an answer that is not Triton's."""
_REFUSED = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND", "None")
"""Statuses that mean that the request is at fault (None: tritonclient did not even send it)."""
_FORBIDDEN = ("401", "403", "407", "StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED")
"""Statuses of a proxy that wants to know who asks."""
_AWAY = ("502", "503", "504", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED")
"""Statuses with which nobody need be there: gRPC's own, and a proxy's."""
_REMEDIES = {
    "is restricted, expecting header": "give the name and secret of its key as access (--access FILE)",
    "explicit model load / unload is not allowed": "start the server with model control",
    "decoupled transaction policy": "it answers a request more than once, which this client does not read",
}
"""What a server says that does not let just anyone do this, whatever its status, and what to do."""
_BROKEN_OFF = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0


class Attempts:
    """When a call may be made again: only what may be sent twice, never after a timeout, within the time allowed.

    Waits are exponential with full jitter (Brooker 2015), so that many clients of one server do not come back at once.
    """

    def __init__(self, address: Address, now_s: float) -> None:
        self._address = address
        self._deadline_s = now_s + address.timeout_s
        self._made = 0

    def left_s(self, now_s: float) -> float:
        """Seconds that an attempt made now may take."""
        return max(self._deadline_s - now_s, 1e-3)

    def wait_s(self, call: Call, error: Exception, now_s: float) -> float | None:
        """Seconds to wait before the next attempt; None if there is none."""
        self._made += 1
        if not call.repeatable or self._made > self._address.retries or not _turned_away(error):
            return None
        wait = random.uniform(0.0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._made))
        return wait if now_s + wait < self._deadline_s else None


def _turned_away(error: Exception) -> bool:
    """Whether the server was away or turned the request away, rather than slow, at work or not ours to ask."""
    if isinstance(error, InferenceServerException):
        wanted = str(error.status()) in ("503", "StatusCode.UNAVAILABLE")
        return wanted and not any(words in str(error.message()) for words in _REMEDIES)
    if isinstance(error, (ssl.SSLError, aiohttp.ClientSSLError)):
        return False
    if isinstance(error, (HTTPConnectionClosed, aiohttp.ServerDisconnectedError)):
        return True
    # aiohttp's errors of the system are OSErrors, but not ConnectionErrors.
    return isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno in _BROKEN_OFF)


def translated(error: Exception, url: str) -> GpuopsError:
    """One of `FAILURES` as our own error, in one line."""
    if not isinstance(error, InferenceServerException):
        reason = _one_line(str(error)) or type(error).__name__
        if isinstance(error, (ValueError, LookupError, TypeError)) and not isinstance(error, OSError):
            return UnavailableError(f"{url} is no Triton server, or a proxy answers in its place ({reason})")
        return _unreachable(url, reason)
    status, message = str(error.status()), _one_line(str(error.message()))
    for words, remedy in _REMEDIES.items():
        if words in message:
            return InputError(f"{url} refused: {message}: {remedy}")
    if status in _REFUSED:
        return InputError(f"{url} refused: {message}")
    if status in _FORBIDDEN:
        return InputError(f"{url} refused: {message}: give what it wants to know as headers")
    if status in _AWAY:
        return _unreachable(url, message)
    return UnavailableError(f"{url} failed: {message}: see its log")


def _unreachable(url: str, reason: str) -> UnavailableError:
    what = "a Triton server running there"
    if url.startswith(("https:", "grpcs:")):
        what += " with TLS, and do the certificates fit"
    return UnavailableError(f"no answer from {url} ({reason}): is {what}? See its log")


def _one_line(message: str) -> str:
    """Triton's message without its request id and its advice to server administrators."""
    return " ".join(message.removeprefix("[request id: <id_unknown>] ").partition(" NOTE: ")[0].split()).rstrip(".")
