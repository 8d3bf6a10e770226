"""What a client can do, without I/O.

An operation is a generator that yields the calls of tritonclient that it needs and is sent their results, so that the
blocking and the asyncio client run the very same code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tritonclient.utils import np_to_triton_dtype

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops.spec import Arrays
from gpuops_serving.config import SAMPLE, TENSORS, VERSION_ID
from gpuops_serving.wire import Address, Answer, ModelConfig, ModelState, Tensor

T = TypeVar("T")


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
    """The operations on one server. `protocol` is tritonclient.http or .grpc, whose messages both clients use."""

    def __init__(self, address: Address, protocol: ModuleType) -> None:
        self.address = address
        self._protocol = protocol
        self._configs: dict[str, ModelConfig] = {}

    def answer(self, model: str, inputs: Arrays, version: str) -> Steps[Answer]:
        """A batch of any size, in parts where it is larger than the model's largest."""
        config = self._configs.get(model)
        if config is None:
            config = self._configs[model] = yield from self.config(model, version)
        limit = config["max_batch_size"]
        if not limit:  # no batch axis
            return (yield from self._request(config, inputs, version, None))
        sizes = {name: array.shape[0] if array.ndim else 0 for name, array in inputs.items()}
        size = max(sizes.values(), default=0)
        if size < 1 or len(set(sizes.values())) > 1:
            raise InputError(f"model {model!r}: every input needs the same number of samples, at least 1, got {sizes}")
        if size <= limit:
            return (yield from self._request(config, inputs, version, size))
        parts = []
        for start in range(0, size, limit):
            part = {name: array[start : start + limit] for name, array in inputs.items()}
            parts.append((yield from self._request(config, part, version, min(limit, size - start))))
        if len({part.version for part in parts}) > 1:  # the default changed meanwhile: all of it from the last one
            return (yield from self.answer(model, inputs, parts[-1].version))
        return Answer(
            parts[0].version, {name: np.concatenate([p.outputs[name] for p in parts]) for name in parts[0].outputs}
        )

    def server(self, key: str) -> Steps[str]:
        """Server's `name` (`--id`) or `version`."""
        found = yield Call("get_server_metadata")
        return str(self._entry(found)[key])

    def models(self) -> Steps[list[ModelState]]:
        """The repository's index."""
        index = yield Call("get_model_repository_index")
        entries = index.get("models", []) if isinstance(index, dict) and self.address.grpc else index
        if not isinstance(entries, list):
            raise self._stranger()
        found = [self._entry(entry) for entry in entries]
        return [ModelState(e["name"], e.get("version", ""), e.get("state", "")) for e in found]

    def raw_config(self, model: str, version: str) -> Steps[dict[str, Any]]:
        """Every field of a model's configuration."""
        if version and not version.isdecimal():
            raise InputError(f"version {version!r} of {model!r} is no number: name one such as 3, or none")
        try:
            found = yield Call("get_model_config", (model, version))
        except InputError as error:
            try:
                names = sorted({state.name for state in (yield from self.models())})
            except GpuopsError:  # the index may be restricted
                raise error from None
            raise InputError(f"{error}; it serves {', '.join(names) or 'nothing'}") from error
        return self._entry(found["config"] if self.address.grpc else found)

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

    def version_id(self, model: str, version: str) -> Steps[str]:
        """Version id that `deploy` gave to a version, or to the newest one."""
        return (yield from self._parameter(model, f"{VERSION_ID}.{version}" if version else VERSION_ID))

    def sample(self, model: str) -> Steps[Any]:
        """The manifest's "sample"."""
        return json.loads((yield from self._parameter(model, SAMPLE)))

    def statistics(self, model: str, version: str) -> Steps[list[dict[str, Any]]]:
        """Statistics by model version, every number an int."""
        found = yield Call("get_inference_statistics", (model, version))
        if not isinstance(found, dict) or not (self.address.grpc or "model_stats" in found):  # protobuf leaves out none
            raise self._stranger()
        return [_durations(_whole(entry)) for entry in found.get("model_stats", [])]

    def change(self, method: str, model: str) -> Steps[None]:
        """Load or unload a model; what was known of it is asked for anew."""
        self._configs.pop(model, None)
        yield Call(method, (model,), repeatable=False)

    def _parameter(self, model: str, key: str) -> Steps[str]:
        parameters = (yield from self.config(model, ""))["parameters"]
        if key not in parameters:
            raise InputError(f"{self.address.url}: model {model!r} has no {key}: deploy it with `gpuops deploy`")
        return parameters[key]

    def _request(self, config: ModelConfig, inputs: Arrays, version: str, size: int | None) -> Steps[Answer]:
        model = config["name"]
        sent = json.loads(config["parameters"].get(TENSORS, "{}"))  # how a backend takes what `deploy` put there
        named, widened = sent.get("inputs", {}), sent.get("widened", {})
        tensors = [
            self._input(named.get(name, name), array.astype(widened.get(name, array.dtype), copy=False))
            for name, array in inputs.items()
        ]
        try:
            result = yield Call("infer", (model, tensors, version), None, True, not config["stateful"])
        except InputError as error:
            self._configs.pop(model, None)  # asked for again next time, in case another server runs there now
            raise InputError(f"{error}; {takes(config)}") from error
        response = result.get_response()
        if self.address.grpc:
            heads = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in response.outputs]
            served = response.model_version
        else:
            heads = [(tensor["name"], tensor["datatype"], tuple(tensor["shape"])) for tensor in response["outputs"]]
            served = response["model_version"]
        promised = {tensor["name"]: tensor for tensor in config["outputs"]}
        outputs = {}
        for name, datatype, shape in heads:
            if (wrong := _differs(promised.get(name), datatype, shape, size)) is not None:
                raise self._broken(model, f"{name!r} {wrong}")
            outputs[name] = self._array(model, result, name, shape)
        if missing := promised.keys() - outputs.keys():
            raise self._broken(model, f"without {min(missing)!r}")
        ours = {theirs: name for name, theirs in sent.get("outputs", {}).items()}
        return Answer(served, {ours.get(name, name): array for name, array in outputs.items()})

    def _input(self, name: str, array: npt.NDArray[Any]) -> Any:
        kind = np_to_triton_dtype(array.dtype)
        if kind is None or not array.dtype.isnative:
            raise InputError(
                f"input {name!r} is {array.dtype}, which no model takes: send numbers in this machine's byte order, "
                "text as an object array of bytes"
            )
        tensor = self._protocol.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        return tensor

    def _array(self, model: str, result: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Array of one output, or IntegrityError if its bytes do not fill the shape it claims (see shim/model.py)."""
        try:
            array = result.as_numpy(name)
        except (ValueError, struct.error):  # tritonclient reshapes what bytes there are
            array = None
        if array is None or array.shape != shape:
            raise self._broken(model, f"{name!r} with too few bytes for its shape {list(shape)}")
        return array if array.flags.writeable else np.array(array)

    def _broken(self, model: str, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.address.url}: model {model!r} answered {what}: do not use it; its backend or its configuration is "
            "broken (python backend under NumPy 2 without DLPack?): deploy it again with this gpuops"
        )

    def _entry(self, found: Any) -> dict[str, Any]:
        """JSON of Triton about something that has a name."""
        if not isinstance(found, dict) or "name" not in found:
            raise self._stranger()
        return found

    def _stranger(self) -> UnavailableError:
        return UnavailableError(f"{self.address.url} is no Triton server: write the URL of one, its HTTP or gRPC port")


_DTYPES = {
    "BOOL": "bool",
    **{f"{kind.upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "BYTES": "TYPE_STRING",
    "STRING": "TYPE_STRING",
}
"""NumPy's name (bfloat16 is ml_dtypes') of a type as answers and, with TYPE_ before it, configurations name it."""


def _dtype(triton: str) -> str:
    return _DTYPES.get(triton.removeprefix("TYPE_"), triton)


def _differs(promised: Tensor | None, datatype: str, shape: tuple[int, ...], size: int | None) -> str | None:
    """What an output is, if it is not what the model's configuration says of it."""
    if promised is None:
        return "which its configuration does not have"
    if size is not None and shape[:1] != (size,):
        return f"with shape {list(shape)} for {size} samples"
    if _dtype(datatype) != promised["dtype"]:
        return f"as {_dtype(datatype)}, its configuration says {promised['dtype']}"
    axes, want = shape if size is None else shape[1:], promised["shape"]
    if len(axes) != len(want) or any(d not in (-1, axis) for d, axis in zip(want, axes, strict=True)):
        return f"with shape {list(shape)}, its configuration says {_axes(promised, size is not None)}"
    return None


def takes(config: ModelConfig) -> str:
    """What a model takes, for an error's end."""
    batched = bool(config["max_batch_size"])
    wanted = ", ".join(f"{t['name']} {t['dtype']} {_axes(t, batched)}" for t in config["inputs"])
    return f"{config['name']!r} takes {wanted}" + (f" with n up to {config['max_batch_size']}" if batched else "")


def _axes(tensor: Tensor, batched: bool) -> str:
    return f"[{', '.join([*(['n'] if batched else []), *map(str, tensor['shape'])])}]"


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
