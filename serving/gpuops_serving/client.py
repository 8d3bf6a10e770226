"""Ask a Triton server, over HTTP or gRPC, with arrays in and arrays out.

A client holds one connection and is for one thread at a time (`gpuops_serving.aio.AsyncClient` is for many tasks of one
loop). Close it (`with`): an open HTTP keep-alive connection holds up Triton's shutdown for up to 30 s.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from itertools import islice
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Self

import gevent
import gevent.ssl
import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http

from gpuops.errors import InputError
from gpuops.spec import Arrays
from gpuops_serving.failures import FAILURES, Attempts, translated
from gpuops_serving.operations import Call, Operations, run
from gpuops_serving.wire import CHANNEL, Address, Answer, ModelConfig, ModelState, Tls

__all__ = ["Answer", "Client", "ModelConfig", "ModelState", "Tls", "group"]


class Client:
    """A connection to one server.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`; `https` and `grpcs` for TLS (Triton's own HTTP port has none).
        timeout_s: Longest time to wait for the answer to one request, retries included, in seconds.
        tls: Certificates, where the system's list is not enough.
        access: (name, secret) of the key to a server's restricted APIs.
        headers: Sent with every call.
        retries: How often a call is repeated when the server is away or turns it away (connection refused or reset,
            UNAVAILABLE, 503). Never after a timeout, as the request may still run; never loading or unloading; never a
            request to a model with sequence batching, as it holds state. (A question that is not a request, the library
            below asks up to three times itself if the connection is closed on it.)

    Raises:
        InputError: the URL is none, a header cannot be sent, or a TLS file is not there or none.
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
        self._options = {"tls": tls, "access": access, "headers": headers, "retries": retries}
        self.protocol: ModuleType = tritonclient.grpc if self._address.grpc else tritonclient.http
        self._operations = Operations(self._address, self.protocol)
        self._connection = _connect(self._address)
        self._closed = False
        self._in_use = threading.Lock()
        self._thread = threading.current_thread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """As it was given."""
        return self._address.url

    @property
    def grpc(self) -> bool:
        """Whether it speaks gRPC rather than HTTP."""
        return self._address.grpc

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._connection.close()

    def again(self) -> Client:
        """Another client of the same server, for another thread.

        Over HTTP every thread that asks gets an event loop (two file descriptors) that it keeps for life: keep threads.
        """
        return Client(self.url, self._address.timeout_s, **self._options)  # type: ignore[arg-type]

    def infer(self, model: str, inputs: Arrays, version: str = "") -> dict[str, npt.NDArray[Any]]:
        """Return the model's answers to a batch of stored samples.

        Args:
            model: Model name.
            inputs: Arrays by input name, each [n, *shape], n >= 1; more than its largest batch goes in parts.
            version: Version number; empty is the version the server chooses.

        Returns:
            Arrays by output name, each [n, *shape], in physical units; they are the caller's to change.

        Raises:
            InputError: the server does not know the model, or not these inputs.
            UnavailableError: the server cannot be reached or did not answer in time.
            IntegrityError: the answer is not what its own header says.
        """
        return self.answer(model, inputs, version).outputs

    def answer(self, model: str, inputs: Arrays, version: str = "") -> Answer:
        """As `infer`, with the version that answered."""
        return run(self._operations.answer(model, inputs, version), self.call)

    def stream(
        self, model: str, batches: Iterable[Arrays], *, version: str = "", in_flight: int = 4
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Answers to many batches in their order, several requests going at a time so that the server can join them.

        Closing it before its end sends nothing more and waits for what is on its way.

        Args:
            model: Model name.
            batches: Inputs by name, one request each (`group` makes them of single samples); read as answers are taken.
            version: Version number; empty is the version the server chooses.
            in_flight: Requests going at a time, each on a connection and in a thread of its own.

        Raises:
            As `infer`, for the first request that fails; what was not sent yet is not sent.
        """
        if in_flight < 1:
            raise InputError(f"{in_flight} requests in flight: at least 1")
        source = iter(batches)
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        waiting: deque[_Job] = deque()
        threads: list[threading.Thread] = []
        try:
            for batch in islice(source, in_flight):
                threads.append(threading.Thread(target=self._work, args=(jobs, model, version), daemon=True))
                threads[-1].start()
                waiting.append(_Job(batch))
                jobs.put(waiting[-1])
            while waiting:
                answer = waiting.popleft().future.result()
                for batch in islice(source, 1):
                    waiting.append(_Job(batch))
                    jobs.put(waiting[-1])
                yield answer
        finally:
            for _ in threads:
                jobs.put(None)
            for thread in threads:
                thread.join()

    def _work(self, jobs: SimpleQueue[_Job | None], model: str, version: str) -> None:
        """Answer jobs until there is a None."""
        client = None
        try:
            while (job := jobs.get()) is not None:
                try:
                    client = client or self.again()
                    job.future.set_result(client.infer(model, job.batch, version))
                except BaseException as error:
                    job.future.set_exception(error)
        finally:
            if client is not None:
                client.close()
            if not self.grpc:  # else the event loop of this thread would outlive it
                gevent.get_hub().destroy(destroy_loop=True)

    def server_version(self) -> str:
        """Version of the server, for example "2.51.0"."""
        return run(self._operations.server("version"), self.call)

    def server_id(self) -> str:
        """Name that the server was started with (`--id`)."""
        return run(self._operations.server("name"), self.call)

    def models(self) -> list[ModelState]:
        """Versions in the server's repository and their states."""
        return run(self._operations.models(), self.call)

    def ready(self, model: str, version: str = "") -> bool:
        """Whether the server says that a model can be asked. It may be wrong both ways: `probe` asks the model."""
        return bool(self.call(Call("is_model_ready", (model, version), as_result=True)))

    def config(self, model: str, version: str = "") -> ModelConfig:
        """Configuration of a model as the server has it, dtypes by their NumPy names.

        Raises:
            InputError: the server does not serve the model.
            UnavailableError: the server cannot be reached.
        """
        return run(self._operations.config(model, version), self.call)

    def raw_config(self, model: str, version: str = "") -> dict[str, Any]:
        """Every field of a model's configuration, as Triton's JSON."""
        return run(self._operations.raw_config(model, version), self.call)

    def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        """Triton's statistics by model version (counts and nanoseconds since it was loaded), every number an int."""
        return run(self._operations.statistics(model, version), self.call)

    def load(self, model: str) -> None:
        """Make the server read a model's folder; returns when its versions answer or one of them could not be loaded.

        Raises:
            InputError: the server does not allow it, or refuses the model.
        """
        run(self._operations.change("load_model", model), self.call)

    def unload(self, model: str) -> None:
        """Make the server drop a model; requests that it has are answered first."""
        run(self._operations.change("unload_model", model), self.call)

    def version_id(self, model: str, version: str = "") -> str:
        """Version id (lineage) of a version, or of the one that the server chooses."""
        return run(self._operations.version_id(model, version), self.call)

    def sample(self, model: str) -> Any:
        """The manifest's "sample": how the model's samples are cut out of the arrays it was trained on."""
        return run(self._operations.sample(model), self.call)

    def call(self, call: Call) -> Any:
        """One call of tritonclient, again where that is safe, its errors turned into ours."""
        if self._closed:
            raise InputError(f"this client of {self.url} is closed: open another")
        if self.grpc:  # made for many threads
            return self._attempts(call)
        # Two threads in one HTTP connection would wait for each other for ever.
        if not self._in_use.acquire(blocking=False):
            raise InputError(f"this client of {self.url} is in use by another thread: give each its own, with again()")
        try:
            if self._thread is not threading.current_thread():  # whose event loop alone can wait on the connection
                self._connection.close()
                self._connection = _connect(self._address)
                self._thread = threading.current_thread()
            return self._attempts(call)
        finally:
            self._in_use.release()

    def _attempts(self, call: Call) -> Any:
        options = call_options(call, self._address)
        method = getattr(self._connection, call.method)
        attempts = Attempts(self._address, time.monotonic())
        while True:
            left_s = attempts.left_s(time.monotonic())
            try:
                if self.grpc:
                    return method(*call.arguments, client_timeout=left_s, **options)
                # The library's own limit is one for each read, which a server that drips never reaches.
                limit = gevent.Timeout.start_new(left_s, TimeoutError(f"nothing within {left_s:.3g} s"))
                try:
                    return method(*call.arguments, **options)
                finally:
                    limit.close()
            except FAILURES as error:
                wait_s = attempts.wait_s(call, error, time.monotonic())
                if wait_s is None:
                    raise translated(error, self.url) from error
                time.sleep(wait_s)


class _Job:
    """One request of a stream, and where its answer goes."""

    def __init__(self, batch: Arrays) -> None:
        self.batch = batch
        self.future: Future[dict[str, npt.NDArray[Any]]] = Future()


def call_options(call: Call, address: Address) -> dict[str, Any]:
    """Keyword arguments of one call of tritonclient, but for its time limit."""
    options: dict[str, Any] = dict(call.options or {})
    if address.headers:
        options["headers"] = dict(address.headers)
    if address.grpc and not call.as_result and call.method not in ("load_model", "unload_model"):
        options["as_json"] = True
    return options


def group(samples: Iterable[Arrays], size: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Single samples, each [*shape] by name, as batches [n, *shape] of `size`; the last may be smaller."""
    source = iter(samples)
    while batch := list(islice(source, size)):
        yield {name: np.stack([sample[name] for sample in batch]) for name in batch[0]}


def _connect(address: Address) -> Any:
    if address.grpc:
        tls = {} if address.tls is None else address.tls.grpc()
        return tritonclient.grpc.InferenceServerClient(address.authority, channel_args=CHANNEL, **tls)
    https: dict[str, Any] = {}
    if address.tls is not None:
        context = address.tls.context(gevent.ssl.create_default_context)
        # It must take `cafile`, or geventhttpclient adds the authorities of the whole Web to ours.
        https = {"ssl": True, "ssl_context_factory": lambda cafile: context}
    return tritonclient.http.InferenceServerClient(
        address.authority, connection_timeout=address.timeout_s, network_timeout=address.timeout_s, **https
    )
