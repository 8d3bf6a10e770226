"""What the clients share: addresses, tritonclient's messages as plain values, its errors as ours, and retries.

Nothing here does I/O: an operation is a generator that yields the calls it needs and is sent their results, so that the
blocking and the asyncio client run the very same code.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops.spec import Arrays

T = TypeVar("T")
_REFUSED = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
"""Statuses that mean that the request is at fault; any other one is the server's."""
_FORBIDDEN = {
    "is restricted, expecting header": "give the name and secret of its key as access",
    "explicit model load / unload is not allowed": "start the server with model control",
}
"""What a server says that does not let just anyone do this, and what to do."""
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
# As over HTTP, no proxy from the environment: a model server is a neighbour, and loopback must stay on loopback.
CHANNEL = [*_UNLIMITED, ("grpc.enable_http_proxy", 0)]
SCHEMES = ("http", "grpc", "https", "grpcs")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered, and which version did."""

    version: str
    """Version number of the model that answered."""
    outputs: dict[str, npt.NDArray[Any]]
    """Arrays by output name, each [n, *shape], in physical units."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """One version of a model in the server's repository."""

    name: str
    """Model name."""
    version: str
    """Version number; empty if the server has loaded none."""
    state: str
    """READY, UNAVAILABLE, LOADING or UNLOADING; empty if it was never loaded."""


class Tensor(TypedDict):
    """One tensor of a model, without its batch axis."""

    name: str
    dtype: str
    shape: list[int]


class ModelConfig(TypedDict):
    """What a client needs to know of a model."""

    name: str
    max_batch_size: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: dict[str, str]
    stateful: bool


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates of a connection, PEM files."""

    root: Path | None = None
    """Who must have signed the server's certificate; None is the system's list."""
    certificate: Path | None = None
    """Our certificate, where the server asks for one (mutual TLS)."""
    key: Path | None = None
    """Its private key."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InputError("TLS with a certificate of our own needs its key too: give both or neither")
        for file in (self.root, self.certificate, self.key):
            if file is not None and not file.is_file():
                raise InputError(f"TLS file {file} is not there: name PEM files")

    def context(self) -> ssl.SSLContext:
        """For HTTP."""
        context = ssl.create_default_context(cafile=None if self.root is None else str(self.root))
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context

    def grpc(self) -> dict[str, Any]:
        """For gRPC, as tritonclient takes it."""
        files = {"root_certificates": self.root, "private_key": self.key, "certificate_chain": self.certificate}
        return {"ssl": True, **{name: None if file is None else str(file) for name, file in files.items()}}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is and how it is spoken to."""

    url: str
    """As it was given."""
    grpc: bool
    """gRPC rather than HTTP."""
    tls: Tls | None
    """None is plain text."""
    headers: Mapping[str, str]
    """Sent with every call, the key of restricted APIs included."""
    timeout_s: float
    """Longest wait for one answer, retries included."""
    retries: int
    """How often a call that is safe to repeat is tried again."""

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return urlsplit(self.url).netloc

    @classmethod
    def parse(
        cls,
        url: str,
        timeout_s: float,
        tls: Tls | None,
        access: tuple[str, str] | None,
        headers: Mapping[str, str] | None,
        retries: int,
    ) -> Address:
        """Check and join what a client was given; see `Client`."""
        parts = urlsplit(url)
        try:
            complete = bool(parts.hostname and parts.port)
        except ValueError:  # a port that is no number
            complete = False
        if parts.scheme not in SCHEMES or not complete or parts.path.strip("/"):
            raise InputError(
                f"{url!r} is not a server: write http://HOST:PORT or grpc://HOST:PORT (https, grpcs for TLS)"
            )
        if tls is not None and not parts.scheme.endswith("s"):
            raise InputError(f"{url!r} is plain text and TLS files were given: write {parts.scheme}s://{parts.netloc}")
        if timeout_s <= 0 or retries < 0:
            raise InputError(f"timeout {timeout_s:g} s, {retries} retries: more than 0 s, 0 retries or more")
        grpc = parts.scheme.startswith("grpc")
        sent = dict(headers or {})
        if access is not None:
            name, secret = access
            sent[f"triton-grpc-protocol-{name}" if grpc else name] = secret
        if tls is None and parts.scheme.endswith("s"):
            tls = Tls()
        return cls(url, grpc, tls, sent, timeout_s, retries)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of tritonclient."""

    method: str
    """Name of its client's method."""
    arguments: tuple[Any, ...] = ()
    """Positional arguments."""
    options: Mapping[str, Any] | None = None
    """Keyword arguments."""
    as_result: bool = False
    """Give back its result object rather than JSON."""
    repeatable: bool = True
    """Whether it may be sent twice."""


Steps = Generator[Call, Any, T]
"""An operation: yields calls, is sent their results, returns its own."""


class Operations:
    """What a client can do, as steps. `protocol` is tritonclient.http or .grpc, whose messages both clients use."""

    def __init__(self, address: Address, protocol: ModuleType) -> None:
        self.address = address
        self._protocol = protocol
        self._configs: dict[str, ModelConfig] = {}

    def answer(self, model: str, inputs: Arrays, version: str) -> Steps[Answer]:
        """A batch of any size, in parts where it is larger than the model's largest."""
        if model not in self._configs:
            self._configs[model] = yield from self.config(model, version)
        config = self._configs[model]
        limit = config["max_batch_size"]
        if not limit:  # no batch axis
            return (yield from self._request(model, inputs, version, None))
        sizes = {name: array.shape[0] if array.ndim else 0 for name, array in inputs.items()}
        size = max(sizes.values(), default=0)
        if size < 1 or len(set(sizes.values())) > 1:
            raise InputError(f"model {model!r}: every input needs the same number of samples, at least 1, got {sizes}")
        if size <= limit:
            return (yield from self._request(model, inputs, version, size))
        parts = []
        for start in range(0, size, limit):
            part = {name: array[start : start + limit] for name, array in inputs.items()}
            parts.append((yield from self._request(model, part, version, min(limit, size - start))))
        if len({part.version for part in parts}) > 1:  # the default changed meanwhile: all of it from the last one
            return (yield from self.answer(model, inputs, parts[-1].version))
        return Answer(
            parts[0].version, {name: np.concatenate([p.outputs[name] for p in parts]) for name in parts[0].outputs}
        )

    def models(self) -> Steps[list[ModelState]]:
        """The repository's index."""
        index = yield Call("get_model_repository_index")
        entries = index.get("models", []) if isinstance(index, dict) else index
        return [ModelState(e["name"], e.get("version", ""), e.get("state", "")) for e in entries]

    def raw_config(self, model: str, version: str) -> Steps[dict[str, Any]]:
        """Every field of a model's configuration."""
        try:
            found = yield Call("get_model_config", (model, version))
        except InputError as error:
            try:
                names = sorted({state.name for state in (yield from self.models())})
            except GpuopsError:  # the index may be restricted
                raise error from None
            raise InputError(f"{error}; it serves {', '.join(names) or 'nothing'}") from error
        config: dict[str, Any] = found.get("config", found)
        return config

    def config(self, model: str, version: str) -> Steps[ModelConfig]:
        """A model's configuration as a client needs it."""
        found = yield from self.raw_config(model, version)

        def tensors(side: str) -> list[Tensor]:
            return [
                Tensor(name=t["name"], dtype=_dtype(t["data_type"]), shape=[int(d) for d in t["dims"]])
                for t in found.get(side, [])
            ]

        return ModelConfig(
            name=found["name"],
            max_batch_size=int(found.get("max_batch_size", 0)),
            inputs=tensors("input"),
            outputs=tensors("output"),
            parameters={key: value.get("string_value", "") for key, value in found.get("parameters", {}).items()},
            stateful="sequence_batching" in found,
        )

    def statistics(self, model: str, version: str) -> Steps[list[dict[str, Any]]]:
        """Statistics by model version, every number an int."""
        found = yield Call("get_inference_statistics", (model, version))
        return [_durations(_whole(entry)) for entry in found.get("model_stats", [])]

    def change(self, method: str, model: str) -> Steps[None]:
        """Load or unload a model; what was known of it is asked for anew."""
        self._configs.pop(model, None)
        yield Call(method, (model,), repeatable=False)

    def _request(self, model: str, inputs: Arrays, version: str, size: int | None) -> Steps[Answer]:
        tensors = [self._input(name, array) for name, array in inputs.items()]
        repeatable = not self._configs[model]["stateful"]
        try:
            result = yield Call("infer", (model, tensors, version), None, True, repeatable)
        except InputError as error:
            config = self._configs.pop(model)  # asked for again next time, in case another server runs there now
            takes = ", ".join(
                f"{t['name']} {t['dtype']} [{', '.join(['n', *map(str, t['shape'])])}]" for t in config["inputs"]
            )
            raise InputError(f"{error}; {model!r} takes {takes} with n up to {config['max_batch_size']}") from error
        response = result.get_response()
        if self.address.grpc:
            shapes = {tensor.name: tuple(tensor.shape) for tensor in response.outputs}
            served = response.model_version
        else:
            shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in response["outputs"]}
            served = response["model_version"]
        if short := [name for name, shape in shapes.items() if size is not None and shape[:1] != (size,)]:
            raise self._broken(model, f"{short[0]!r} with shape {list(shapes[short[0]])} for {size} samples")
        return Answer(served, {name: self._array(model, result, name, shape) for name, shape in shapes.items()})

    def _input(self, name: str, array: npt.NDArray[Any]) -> Any:
        kind = np_to_triton_dtype(array.dtype)
        if kind is None or not array.dtype.isnative:
            raise InputError(
                f"input {name!r} is {array.dtype}, which no model takes: send it in this machine's byte order"
            )
        tensor = self._protocol.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        return tensor

    def _array(self, model: str, result: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Array of one output, or IntegrityError if its bytes do not fill the shape it claims (see shim/model.py)."""
        try:
            array = result.as_numpy(name)
        except ValueError:  # tritonclient reshapes what bytes there are
            array = None
        if array is None or array.shape != shape:
            raise self._broken(model, f"{name!r} with too few bytes for its shape {list(shape)}")
        return array if array.flags.writeable else np.array(array)

    def _broken(self, model: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.address.url}: model {model!r} answered {what}: its backend is broken (NumPy 2 without DLPack?); "
            "deploy it again with this gpuops"
        )


class Attempts:
    """When a call may be made again: only what may be sent twice, never after a timeout, within the time allowed.

    Waits are exponential with full jitter (Brooker 2015), so that many clients of one server do not come back at once.
    """

    def __init__(self, address: Address, now_s: float) -> None:
        self._address = address
        self._deadline_s = now_s + address.timeout_s
        self._made = 0

    def wait_s(self, call: Call, error: Exception, now_s: float) -> float | None:
        """Seconds to wait before the next attempt; None if there is none."""
        self._made += 1
        if not call.repeatable or self._made > self._address.retries or not _nobody_there(error):
            return None
        wait = random.uniform(0.0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._made))
        return wait if now_s + wait < self._deadline_s else None


def _nobody_there(error: Exception) -> bool:
    """Whether the server was away or turned the request away, rather than slow or at work."""
    if isinstance(error, InferenceServerException):
        return str(error.status()) in ("503", "StatusCode.UNAVAILABLE")
    return isinstance(error, (ConnectionError, aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError))


FAILURES: tuple[type[Exception], ...] = (
    InferenceServerException,
    OSError,
    EOFError,
    HTTPException,
    aiohttp.ClientError,
    asyncio.TimeoutError,
)
"""What tritonclient and the libraries under it raise: refused, reset, timed out, or something else than HTTP."""


def translated(error: Exception, url: str) -> GpuopsError:
    """One of `FAILURES` as our own error."""
    if not isinstance(error, InferenceServerException):
        return _unreachable(url, str(error) or type(error).__name__)
    status, message = str(error.status()), _one_line(str(error.message()))
    for words, remedy in _FORBIDDEN.items():
        if words in message:
            return InputError(f"{url} refused: {message}: {remedy}")
    return InputError(f"{url} refused: {message}") if status in _REFUSED else _unreachable(url, message)


def _unreachable(url: str, reason: str) -> UnavailableError:
    return UnavailableError(f"no answer from {url} ({reason}): is a Triton server running there? See its log")


def _dtype(triton: str) -> str:
    """NumPy's name of a configured type; Triton's where NumPy has none."""
    short = triton.removeprefix("TYPE_")
    kind = None if short in ("STRING", "BF16") else triton_to_np_dtype(short)
    return triton if kind is None else np.dtype(kind).name


def _one_line(message: str) -> str:
    """Triton's message without its request id and its advice to server administrators."""
    return " ".join(message.removeprefix("[request id: <id_unknown>] ").partition(" NOTE: ")[0].split()).rstrip(".")


def _whole(value: Any, key: str = "") -> Any:
    """JSON with the decimal strings of protobuf's 64-bit numbers as ints; names and versions stay text."""
    if isinstance(value, dict):
        return {k: _whole(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, str) and value.isdigit() and key not in ("name", "version") else value


def _durations(entry: dict[str, Any]) -> dict[str, Any]:
    """A version's statistics with the zeros that protobuf leaves out."""
    for table in (entry.setdefault("inference_stats", {}), *entry.setdefault("batch_stats", [])):
        for part, value in table.items():
            if isinstance(value, dict):
                table[part] = {"count": 0, "ns": 0, **value}
    return entry


def run(steps: Steps[T], call: Callable[[Call], Any]) -> T:
    """Carry out an operation with blocking calls."""
    try:
        wanted = next(steps)
        while True:
            try:
                found = call(wanted)
            except GpuopsError as error:
                wanted = steps.throw(error)
            else:
                wanted = steps.send(found)
    except StopIteration as done:
        result: T = done.value
        return result
