"""Ask a Triton server, over HTTP or gRPC, with arrays in and arrays out.

A client holds one connection and is for one thread. Close it (`with`): an open HTTP keep-alive connection holds up
Triton's shutdown for up to 30 s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from types import ModuleType
from typing import Any, TypedDict
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.spec import Arrays
from gpuops_serving.repository import SAMPLE, TRITON_TYPES, VERSION_ID

_DTYPES = {triton: dtype for dtype, triton in TRITON_TYPES.items()}
_REFUSED = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
"""Statuses that mean that the request is at fault; any other one is the server's."""
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
# As over HTTP, no proxy from the environment: a model server is a neighbour, and loopback must stay on loopback.
_CHANNEL = [*_UNLIMITED, ("grpc.enable_http_proxy", 0)]


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


class Client:
    """A connection to one server.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`.
        timeout_s: Longest time to wait for one answer, in seconds.

    Raises:
        InputError: the URL is neither.
    """

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        try:
            address = f"{parts.hostname}:{parts.port}" if parts.hostname and parts.port else ""
        except ValueError:  # a port that is no number
            address = ""
        if parts.scheme not in ("http", "grpc") or not address or parts.path.strip("/"):
            raise InputError(f"{url!r} is not a server: write http://HOST:PORT or grpc://HOST:PORT")
        self.url = url
        self._timeout_s = timeout_s
        self._grpc = parts.scheme == "grpc"
        self._protocol: ModuleType = tritonclient.grpc if self._grpc else tritonclient.http
        self._configs: dict[str, ModelConfig] = {}
        if self._grpc:
            self._client = tritonclient.grpc.InferenceServerClient(address, channel_args=_CHANNEL)
        else:
            self._client = tritonclient.http.InferenceServerClient(
                address, connection_timeout=timeout_s, network_timeout=timeout_s
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

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
        sizes = {name: array.shape[0] if array.ndim else 0 for name, array in inputs.items()}
        size = max(sizes.values(), default=0)
        if size < 1 or len(set(sizes.values())) > 1:
            raise InputError(f"model {model!r}: every input needs the same number of samples, at least 1, got {sizes}")
        if model not in self._configs:
            self._configs[model] = self.config(model)
        limit = self._configs[model]["max_batch_size"] or size
        parts = [
            self._request(model, {name: array[start : start + limit] for name, array in inputs.items()}, version)
            for start in range(0, size, limit)
        ]
        if len(parts) == 1:
            return parts[0]
        if len({part.version for part in parts}) > 1:
            raise IntegrityError(
                f"{self.url}: versions {sorted({part.version for part in parts})} of {model!r} answered parts of one "
                "request: name the version"
            )
        return Answer(
            parts[0].version, {name: np.concatenate([p.outputs[name] for p in parts]) for name in parts[0].outputs}
        )

    def server_version(self) -> str:
        """Version of the server, for example "2.51.0"."""
        return str(self._metadata()["version"])

    def server_id(self) -> str:
        """Name that the server was started with (`--id`)."""
        return str(self._metadata()["name"])

    def models(self) -> list[ModelState]:
        """Versions in the server's repository and their states."""
        index = self._call(self._client.get_model_repository_index)
        entries = index.get("models", []) if isinstance(index, dict) else index
        return [ModelState(e["name"], e.get("version", ""), e.get("state", "")) for e in entries]

    def config(self, model: str) -> ModelConfig:
        """Configuration of a model as the server has it, dtypes by their NumPy names.

        Raises:
            InputError: the server does not serve the model.
            UnavailableError: the server cannot be reached.
        """
        try:
            found = self._call(self._client.get_model_config, model)
        except InputError as error:
            names = sorted({state.name for state in self.models()})
            raise InputError(f"{error}; it serves {', '.join(names) or 'nothing'}") from error
        found = found.get("config", found)

        def tensors(side: str) -> list[Tensor]:
            found_tensors = found.get(side, [])
            return [Tensor(name=t["name"], dtype=_dtype(t), shape=[int(d) for d in t["dims"]]) for t in found_tensors]

        return ModelConfig(
            name=found["name"],
            max_batch_size=int(found.get("max_batch_size", 0)),
            inputs=tensors("input"),
            outputs=tensors("output"),
            parameters={key: value.get("string_value", "") for key, value in found.get("parameters", {}).items()},
        )

    def version_id(self, model: str) -> str:
        """Version id (lineage) of the version that the server's configuration names."""
        return self._parameter(model, VERSION_ID)

    def sample(self, model: str) -> Any:
        """The manifest's "sample": how the model's samples are cut out of the arrays it was trained on."""
        return json.loads(self._parameter(model, SAMPLE))

    def _parameter(self, model: str, key: str) -> str:
        parameters = self.config(model)["parameters"]
        if key not in parameters:
            raise InputError(f"{self.url}: model {model!r} has no {key}: deploy it with `gpuops deploy`")
        return parameters[key]

    def _metadata(self) -> Mapping[str, Any]:
        metadata: Mapping[str, Any] = self._call(self._client.get_server_metadata)
        return metadata

    def _request(self, model: str, inputs: Arrays, version: str) -> Answer:
        tensors = []
        for name, array in inputs.items():
            kind = np_to_triton_dtype(array.dtype)
            if array.dtype.name not in TRITON_TYPES or kind is None:
                raise InputError(
                    f"input {name!r} is {array.dtype}, which no model takes: send one of {', '.join(TRITON_TYPES)}"
                )
            tensor = self._protocol.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        try:
            result = self._call(self._client.infer, model, tensors, version, as_result=True)
        except InputError as error:
            config = self._configs.pop(model)  # asked for again next time, in case another server runs there now
            takes = ", ".join(
                f"{t['name']} {t['dtype']} [{', '.join(['n', *map(str, t['shape'])])}]" for t in config["inputs"]
            )
            raise InputError(f"{error}; {model!r} takes {takes} with n up to {config['max_batch_size']}") from error
        response = result.get_response()
        if self._grpc:
            shapes = {tensor.name: tuple(tensor.shape) for tensor in response.outputs}
            served = response.model_version
        else:
            shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in response["outputs"]}
            served = response["model_version"]
        return Answer(served, {name: self._array(model, result, name, shape) for name, shape in shapes.items()})

    def _array(self, model: str, result: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Array of one output, or IntegrityError if its bytes do not fill the shape it claims (see shim/model.py)."""
        try:
            array = result.as_numpy(name)
        except ValueError:  # tritonclient reshapes what bytes there are
            array = None
        if array is None or array.shape != shape:
            raise IntegrityError(
                f"{self.url}: model {model!r} answered {name!r} with too few bytes for its shape {list(shape)}: "
                "its backend is broken (NumPy 2 without DLPack?); deploy it again with this gpuops"
            )
        return np.array(array)

    def _call(self, method: Callable[..., Any], *arguments: Any, as_result: bool = False) -> Any:
        """Call tritonclient and turn its errors, and those of the libraries under it, into ours."""
        options: dict[str, Any] = {"client_timeout": self._timeout_s} if self._grpc else {}
        if self._grpc and not as_result:
            options["as_json"] = True
        try:
            return method(*arguments, **options)
        except InferenceServerException as error:
            status, message = str(error.status()), _one_line(str(error.message()))
            if status in _REFUSED:
                raise InputError(f"{self.url} refused: {message}") from error
            raise self._unreachable(message) from error
        except (OSError, EOFError, HTTPException) as error:  # refused, reset, timed out, or something else than HTTP
            raise self._unreachable(str(error) or type(error).__name__) from error

    def _unreachable(self, reason: str) -> UnavailableError:
        return UnavailableError(f"no answer from {self.url} ({reason}): is a Triton server running there? See its log")


def _dtype(tensor: Mapping[str, Any]) -> str:
    """NumPy's name of a configured tensor's type; Triton's where no stored sample can have it."""
    return _DTYPES.get(tensor["data_type"], str(tensor["data_type"]))


def _one_line(message: str) -> str:
    """Triton's message without its request id and its advice to server administrators."""
    return " ".join(message.removeprefix("[request id: <id_unknown>] ").partition(" NOTE: ")[0].split()).rstrip(".")
