"""Shared memory between a client and a server of one host: what is sent is where samples and answers lie.

Worth it for large samples. Servers from 26.04 (2.68) on allow it only with --allow-client-shm.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tritonclient.utils import np_to_triton_dtype

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops.spec import Arrays
from gpuops_serving.client import Client
from gpuops_serving.operations import Call, takes
from gpuops_serving.regions import CudaRegion, Region, SystemRegion
from gpuops_serving.wire import ModelConfig, Tensor

PREFIX = "gpuops-client-"
"""How our regions in /dev/shm are called."""
_MARK = 4
"""Bytes of an answer's place that are written before each request and must be others after it."""

_FORGET_S, _LOOK_S = 2.0, 0.002
"""Longest wait for a server to forget a region, and between two words to do so."""


class SharedMemory:
    """A region for each tensor of a model, used for every request; close it.

        with SharedMemory(client, "forecast") as shared:
            answers = shared.infer({"x": stored})

    With a GPU's memory the inputs may be tensors that lie there already (DLPack, as torch's).

    Args:
        client: Connection to a server of this host; used by this alone meanwhile.
        model: Model name; its dims must be fixed.
        gpu: Number of the GPU whose memory is shared, for a model that runs there; None shares the system's.

    Raises:
        InputError: the model has free dimensions, text, no batch axis, or holds state.
        UnavailableError: the server does not allow shared memory or does not share this host's; or no such GPU, or no
            cuda-python.
    """

    def __init__(self, client: Client, model: str, *, gpu: int | None = None) -> None:
        self._client, self._model, self._gpu = client, model, gpu
        self._config = client.config(model)
        _refuse_unfit(self._config)
        self._inputs: dict[str, Region] = {}
        self._outputs: dict[str, Region] = {}
        self._lost = False
        try:
            for regions, tensors in ((self._inputs, self._config["inputs"]), (self._outputs, self._config["outputs"])):
                for tensor in tensors:
                    self._open(regions, tensor)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell the server to forget the regions, and remove them."""
        regions = [*self._inputs.values(), *self._outputs.values()]
        self._inputs, self._outputs = {}, {}
        for region in regions:
            # A request that we no longer wait for may still be answered into the region: then the server keeps its
            # mapping until it ends, as it would crash without.
            if not self._lost:
                self._forget(region)
            region.destroy()

    def _forget(self, region: Region) -> None:
        """Tell the server to forget a region. It refuses while it still puts away the request whose answer we have."""
        deadline = time.monotonic() + _FORGET_S
        while True:
            try:
                self._client.call(region.deregistration())
                return
            except GpuopsError as error:
                # A server that is gone has forgotten it, as has one that never took it.
                if "currently in use" not in str(error) or time.monotonic() > deadline:
                    return
            time.sleep(_LOOK_S)

    def infer(self, inputs: Arrays, version: str = "") -> dict[str, npt.NDArray[Any]]:
        """As `Client.infer`, for at most the model's largest batch; the answers are copies of what lies in the region.

        Raises:
            InputError: not these inputs, or closed.
            UnavailableError: as `Client.infer`. The region cannot be used any more, as the answer may still come.
            IntegrityError: the answer is not what its own header or the model's configuration says.
        """
        if self._lost:
            raise InputError("a request in this shared memory was not answered and may still be: open another")
        if not self._outputs:
            raise InputError("this shared memory is closed: open another")
        size = self._check(inputs)
        mark = secrets.token_bytes(_MARK)
        result, unwritten = self._ask(inputs, version, size, mark)
        if unwritten:  # by chance, or because the server wrote nothing: no answer is equal to both marks
            result, again = self._ask(inputs, version, size, bytes(255 - byte for byte in mark))
            if unwritten & again:
                raise IntegrityError(
                    f"{self._client.url}: model {self._model!r} answered {min(unwritten & again)!r} with too few bytes "
                    "for its shape: do not use it (python backend under NumPy 2 without DLPack?)"
                )
        return {tensor["name"]: self._read(result, tensor, size) for tensor in self._config["outputs"]}

    def _ask(self, inputs: Arrays, version: str, size: int, mark: bytes) -> tuple[Any, set[str]]:
        """(tritonclient's result, names of the outputs that still end in `mark`) of one request."""
        protocol = self._client.protocol
        asked, wanted = [], []
        for tensor in self._config["inputs"]:
            name, array = tensor["name"], inputs[tensor["name"]]
            self._inputs[name].write(array)
            sent = protocol.InferInput(name, list(array.shape), np_to_triton_dtype(np.dtype(tensor["dtype"])))
            sent.set_shared_memory(self._inputs[name].name, size * _bytes(tensor))
            asked.append(sent)
        for tensor in self._config["outputs"]:
            name = tensor["name"]
            self._outputs[name].mark(size * _bytes(tensor), mark)
            output = protocol.InferRequestedOutput(name)
            output.set_shared_memory(self._outputs[name].name, size * _bytes(tensor))
            wanted.append(output)
        # Sent once: were the first of two requests answered late, it would overwrite the answer to the next one.
        call = Call("infer", (self._model, asked, version), {"outputs": wanted}, as_result=True, repeatable=False)
        try:
            result = self._client.call(call)
        except InputError:
            raise
        except BaseException:
            self._lost = True
            raise
        outputs = {tensor["name"]: size * _bytes(tensor) for tensor in self._config["outputs"]}
        return result, {name for name, count in outputs.items() if self._outputs[name].marked(count, mark)}

    def _check(self, inputs: Arrays) -> int:
        """Number of samples; InputError unless `inputs` are what the model takes."""
        wanted = {tensor["name"]: tensor for tensor in self._config["inputs"]}
        fit = inputs.keys() == wanted.keys() and all(
            _dtype(array) == wanted[name]["dtype"] and list(array.shape[1:]) == wanted[name]["shape"]
            for name, array in inputs.items()
        )
        sizes = {len(array) for array in inputs.values() if array.ndim}
        if not fit or len(sizes) != 1:
            got = ", ".join(f"{name} {_dtype(array)} {list(array.shape)}" for name, array in inputs.items())
            raise InputError(f"{takes(self._config)}, got {got or 'nothing'}")
        size = sizes.pop()
        if not 1 <= size <= self._config["max_batch_size"]:
            raise InputError(
                f"batch of {size} samples; {self._model!r} takes 1 to {self._config['max_batch_size']}: "
                "split the request"
            )
        return size

    def _open(self, regions: dict[str, Region], tensor: Tensor) -> None:
        name, size = f"{PREFIX}{secrets.token_hex(8)}", self._config["max_batch_size"] * _bytes(tensor)
        region: Region = SystemRegion(name, size) if self._gpu is None else CudaRegion(name, size, self._gpu)
        regions[tensor["name"]] = region
        try:
            self._client.call(region.registration())
        except GpuopsError as error:
            raise UnavailableError(
                f"{error}; the server must run on this host, with --allow-client-shm from 26.04 on: or ask without"
            ) from error

    def _read(self, result: Any, tensor: Tensor, size: int) -> npt.NDArray[Any]:
        output = result.get_output(tensor["name"])
        shape = [] if output is None else list(output.shape if self._client.grpc else output["shape"])
        if shape != [size, *tensor["shape"]]:
            raise IntegrityError(
                f"{self._client.url}: model {self._model!r} answered {tensor['name']!r} with shape {shape}, its "
                f"configuration says {[size, *tensor['shape']]}: deploy it again"
            )
        return self._outputs[tensor["name"]].read(tensor["dtype"], shape)


def _dtype(array: Any) -> str:
    """NumPy's name of an array's type, which may be a tensor of torch on a GPU."""
    return str(array.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> int:
    """Bytes of one sample."""
    return int(np.prod(tensor["shape"])) * np.dtype(tensor["dtype"]).itemsize


def _refuse_unfit(config: ModelConfig) -> None:
    tensors = [*config["inputs"], *config["outputs"]]
    free = any(d < 1 for tensor in tensors for d in tensor["shape"]) or not config["max_batch_size"]
    if free or config["stateful"] or any(tensor["dtype"].startswith("TYPE_") for tensor in tensors):
        raise InputError(
            f"{config['name']!r} has free dimensions, text, no batch axis or holds state: ask it without shared memory"
        )
