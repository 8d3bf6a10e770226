"""System shared memory between a client and a server of one host: what is sent is where samples and answers lie.

Worth it for large samples. Servers from 26.04 (2.68) on allow it only with --allow-client-shm.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tritonclient.utils import np_to_triton_dtype, shared_memory

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops.spec import Arrays, Signature, TensorSpec
from gpuops_serving.client import Client
from gpuops_serving.wire import Call, ModelConfig

PREFIX = "gpuops-client-"
"""How our regions in /dev/shm are called."""


class SharedMemory:
    """One region for the inputs and one for the outputs of a model, used for every request; close it.

        with SharedMemory(client, "forecast") as region:
            answers = region.infer({"x": stored})

    Args:
        client: Connection to a server of this host; used by this alone meanwhile.
        model: Model name; its dims must be fixed.

    Raises:
        InputError: the model has free dimensions, text or no batch axis.
        UnavailableError: the server does not allow shared memory, or does not share this host's.
    """

    def __init__(self, client: Client, model: str) -> None:
        self._client, self._model = client, model
        config = client.config(model)
        self.signature = _signature(config)
        self._names: list[str] = []
        self._handles: list[Any] = []
        self._places: dict[str, tuple[str, Any, int, int]] = {}
        try:
            for side, specs in (("in", self.signature.inputs), ("out", self.signature.outputs)):
                self._open(side, specs)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell the server to forget the regions, and remove them."""
        for name in self._names:
            with suppress(GpuopsError):  # a server that is gone has forgotten them
                self._client.call(Call("unregister_system_shared_memory", (name,), as_result=True))
        for handle in self._handles:
            shared_memory.destroy_shared_memory_region(handle)
        self._names, self._handles = [], []

    def infer(self, inputs: Arrays, version: str = "") -> dict[str, npt.NDArray[Any]]:
        """As `Client.infer`, for at most the model's largest batch; the answers are copies of what lies in the region.

        Raises:
            InputError: not these inputs, or closed.
            UnavailableError, IntegrityError: as `Client.infer`.
        """
        if not self._handles:
            raise InputError("this shared memory is closed: open another")
        size = self.signature.check(inputs)
        protocol = self._client.protocol
        asked, wanted = [], []
        for spec in self.signature.inputs:
            name, handle, offset, _ = self._places[f"in/{spec.name}"]
            array = np.ascontiguousarray(inputs[spec.name])
            shared_memory.set_shared_memory_region(handle, [array], offset)
            tensor = protocol.InferInput(spec.name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_shared_memory(name, array.nbytes, offset)
            asked.append(tensor)
        for spec in self.signature.outputs:
            name, _, offset, each = self._places[f"out/{spec.name}"]
            output = protocol.InferRequestedOutput(spec.name)
            output.set_shared_memory(name, each * size, offset)
            wanted.append(output)
        result = self._client.call(
            Call("infer", (self._model, asked, version), {"outputs": wanted}, as_result=True, repeatable=False)
        )
        return {spec.name: self._read(result, spec, size) for spec in self.signature.outputs}

    def _open(self, side: str, specs: tuple[TensorSpec, ...]) -> None:
        name = f"{PREFIX}{secrets.token_hex(6)}-{side}"
        offset, places = 0, {}
        for spec in specs:
            each = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
            places[f"{side}/{spec.name}"] = (offset, each)
            offset += -(-each * self.signature.max_batch // 64) * 64  # aligned to a cache line
        try:
            handle = shared_memory.create_shared_memory_region(name, f"/{name}", max(offset, 1))
        except shared_memory.SharedMemoryException as error:
            raise UnavailableError(f"no shared memory of {offset} bytes ({error}): make /dev/shm larger") from error
        self._handles.append(handle)
        self._places |= {key: (name, handle, at, each) for key, (at, each) in places.items()}
        try:
            self._client.call(Call("register_system_shared_memory", (name, f"/{name}", max(offset, 1)), as_result=True))
        except GpuopsError as error:
            raise UnavailableError(
                f"{error}; the server must run on this host, with --allow-client-shm from 26.04 on: or ask without"
            ) from error
        self._names.append(name)

    def _read(self, result: Any, spec: TensorSpec, size: int) -> npt.NDArray[Any]:
        output = result.get_output(spec.name)
        shape = () if output is None else tuple(output.shape if self._client.grpc else output["shape"])
        if shape != (size, *spec.shape):
            raise IntegrityError(
                f"{self._client.url}: model {self._model!r} answered {spec.name!r} with shape {list(shape)}, its "
                f"configuration says {[size, *spec.shape]}: deploy it again"
            )
        _, handle, offset, _ = self._places[f"out/{spec.name}"]
        return np.array(shared_memory.get_contents_as_numpy(handle, np.dtype(spec.dtype), shape, offset))


def _signature(config: ModelConfig) -> Signature:
    sides = []
    for side in (config["inputs"], config["outputs"]):
        if any(d < 0 for tensor in side for d in tensor["shape"]) or not config["max_batch_size"]:
            raise InputError(f"{config['name']!r} has free dimensions or no batch axis: ask it without shared memory")
        sides.append(tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in side))
    return Signature(sides[0], sides[1], config["max_batch_size"])
