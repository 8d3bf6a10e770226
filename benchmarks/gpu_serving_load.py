"""For gpu_serving.py: a closed loop over HTTP, a thread and a connection for each request, and the sum of accounts."""

from __future__ import annotations

import http.client
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import tritonclient.http

from gpuops.errors import IntegrityError
from gpuops_serving.accounts import Totals

WARM_UP_S = 1.0
TOLERANCE = 1e-3
"""Largest absolute difference of an answer that passes."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, encoded once, and its answer."""

    path: str
    """Path and query."""
    headers: dict[str, str]
    """Sent with it."""
    body: bytes
    """As it goes over the wire."""
    answer: npt.NDArray[np.float32]
    """What the end of the response must hold."""

    @classmethod
    def triton(cls, model: str, sample: npt.NDArray[Any], answer: npt.NDArray[np.float32]) -> Shot:
        """By KServe's protocol v2 with its binary extension; `sample` is input "x", the answer output "y"."""
        tensor = tritonclient.http.InferInput("x", list(sample.shape), "INT16")
        tensor.set_data_from_numpy(sample)
        wanted = tritonclient.http.InferRequestedOutput("y", binary_data=True)
        body, length = tritonclient.http.InferenceServerClient.generate_request_body([tensor], outputs=[wanted])
        return cls(f"/v2/models/{model}/infer", {"Inference-Header-Content-Length": str(length)}, body, answer)

    @classmethod
    def raw(cls, sample: npt.NDArray[Any], answer: npt.NDArray[np.float32]) -> Shot:
        """Bytes in, bytes out."""
        return cls("/infer", {}, sample.tobytes(), answer)

    def check(self, status: int, content: bytes) -> None:
        """Raise IntegrityError unless this is the answer."""
        size = self.answer.nbytes
        if status != 200 or len(content) < size:
            raise IntegrityError(f"{self.path}: HTTP {status} with {len(content)} bytes: {content[:200]!r}")
        found = np.frombuffer(content[len(content) - size :], np.float32).reshape(self.answer.shape)
        if not (difference := np.abs(found - self.answer).max()) <= TOLERANCE:
            raise IntegrityError(f"{self.path}: an answer differs by {difference:g}, {TOLERANCE:g} is allowed")


@dataclass(frozen=True, slots=True)
class Loop:
    """What a closed loop found after its warm-up."""

    latencies_s: list[float]
    """Seconds from sending a request to having its answer, one each."""
    seconds: float
    """From the first of them to the last answer."""
    answered: int
    """All that were answered, warm-up included, as a server counts them."""

    @property
    def per_s(self) -> float:
        """Requests a second."""
        return len(self.latencies_s) / self.seconds

    def quantiles_ms(self, at: tuple[float, ...]) -> list[float]:
        """Latencies in milliseconds, such as (0.5, 0.99)."""
        cuts = statistics.quantiles(self.latencies_s, n=1000, method="inclusive")
        return [1e3 * cuts[round(1000 * q) - 1] for q in at]


def closed_loop(url: str, shots: list[Shot], concurrency: int, seconds: float) -> Loop:
    """Keep `concurrency` requests under way for `WARM_UP_S` and then `seconds`; every answer is checked.

    Raises:
        IntegrityError: an answer was wrong, or none came.
    """
    where = urlsplit(url)
    assert where.hostname is not None
    host, port = where.hostname, where.port
    found: list[list[tuple[float, float]]] = [[] for _ in range(concurrency)]
    errors: list[Exception] = []
    ready = threading.Barrier(concurrency + 1)

    def work(place: int) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            connection.connect()
            ready.wait()
            number = place
            while time.perf_counter() < until[0] and not errors:
                shot = shots[number % len(shots)]
                begun = time.perf_counter()
                connection.request("POST", shot.path, shot.body, shot.headers)
                response = connection.getresponse()
                content = response.read()
                found[place].append((begun, time.perf_counter()))
                shot.check(response.status, content)
                number += 1
        except Exception as error:
            errors.append(error)
            ready.abort()
        finally:
            connection.close()

    begin = time.perf_counter()
    until = [begin + WARM_UP_S + seconds]
    threads = [threading.Thread(target=work, args=(place,)) for place in range(concurrency)]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
        begin = time.perf_counter()
        until[0] = begin + WARM_UP_S + seconds
    except threading.BrokenBarrierError:
        pass
    for thread in threads:
        thread.join()
    if errors:
        raise IntegrityError(f"the load was broken off ({errors[0]}): see the server's log") from errors[0]
    times = [pair for pairs in found for pair in pairs]
    counted = [(begun, ended) for begun, ended in times if begun >= begin + WARM_UP_S]
    if len(counted) < 2:
        raise IntegrityError(f"{len(counted)} answers within {seconds:g} s: load it for longer")
    return Loop(
        [ended - begun for begun, ended in counted],
        max(ended for _, ended in counted) - min(begun for begun, _ in counted),
        len(times),
    )


def add_up(totals: Totals, key: tuple[str, str], answered: int) -> str:
    """The meter's accounts in words; SystemExit if they are not the counter's rise, or requests are missing."""
    parts = {
        "attributed": sum(totals.shares_uj.values()),
        "idle": sum(totals.idle_uj.values()),
        "loading": sum(totals.loading_uj.values()),
        "unattributed": sum(totals.unattributed_uj.values()),
        "lost": sum(totals.lost_uj.values()),
    }
    whole = sum(totals.counted_uj.values())
    said = ", ".join(f"{name} {uj / 1e6:.1f} J" for name, uj in parts.items())
    if sum(parts.values()) != whole:
        raise SystemExit(f"the accounts do not add up: {said}, counted {whole / 1e6:.6f} J")
    if (seen := totals.requests[key]) < answered:
        raise SystemExit(f"{answered} requests were answered, the meter saw {seen}")
    return f"{said}; counted {whole / 1e6:.1f} J"
