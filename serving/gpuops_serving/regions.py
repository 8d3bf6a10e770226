"""Memory that a client and a server of one host both see, of the system or of a GPU; one tensor lies in each region."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tritonclient.utils import shared_memory

from gpuops.errors import UnavailableError
from gpuops_serving.operations import Call


class Region(Protocol):
    """Room for one tensor at the largest batch."""

    name: str

    def registration(self) -> Call:
        """What tells the server of it."""

    def deregistration(self) -> Call:
        """What makes the server forget it."""

    def write(self, array: Any) -> None:
        """Put a tensor there."""

    def read(self, dtype: npt.DTypeLike, shape: list[int]) -> npt.NDArray[Any]:
        """A copy of the tensor that lies there."""

    def mark(self, count: int, token: bytes) -> None:
        """Write `token` where an answer of `count` bytes must overwrite it."""

    def marked(self, count: int, token: bytes) -> bool:
        """Whether it is still there."""

    def destroy(self) -> None:
        """Give the memory back."""


class SystemRegion:
    """A region in /dev/shm, which only its owner may read."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self._size = name, size
        try:
            self._handle = shared_memory.create_shared_memory_region(name, f"/{name}", size, create_only=True)
        except shared_memory.SharedMemoryException as error:
            raise UnavailableError(f"no shared memory of {size} bytes ({error}): make /dev/shm larger") from error

    def registration(self) -> Call:
        """See `Region`, as for all of these."""
        return Call("register_system_shared_memory", (self.name, f"/{self.name}", self._size), as_result=True)

    def deregistration(self) -> Call:
        """Inverse of `registration`."""
        return Call("unregister_system_shared_memory", (self.name,), as_result=True)

    def write(self, array: npt.NDArray[Any]) -> None:
        """Arrays of any layout."""
        shared_memory.set_shared_memory_region(self._handle, [array])

    def read(self, dtype: npt.DTypeLike, shape: list[int]) -> npt.NDArray[Any]:
        """A copy."""
        return np.array(shared_memory.get_contents_as_numpy(self._handle, np.dtype(dtype), shape))

    def mark(self, count: int, token: bytes) -> None:
        """At the end, so that an answer that is too short is seen as well as none."""
        end = np.frombuffer(token[:count], np.uint8)
        shared_memory.set_shared_memory_region(self._handle, [end], count - len(end))

    def marked(self, count: int, token: bytes) -> bool:
        """Inverse of `mark`."""
        length = min(len(token), count)
        found = shared_memory.get_contents_as_numpy(self._handle, np.uint8, (length,), count - length)
        return bool(found.tobytes() == token[:length])

    def destroy(self) -> None:
        """Remove it."""
        shared_memory.destroy_shared_memory_region(self._handle)


class CudaRegion:
    """A region of a GPU. Tensors that lie on it are taken as they are (DLPack), arrays of the host are copied there."""

    def __init__(self, name: str, size: int, gpu: int) -> None:
        self.name, self._size, self._gpu = name, size, gpu
        self._cuda = _cuda()
        try:
            self._handle: Any = self._cuda.create_shared_memory_region(name, size, gpu)
        except self._cuda.CudaSharedMemoryException as error:
            raise UnavailableError(
                f"no shared memory of {size} bytes on GPU {gpu} ({error.__cause__ or error}): name another GPU, or ask "
                "with system shared memory"
            ) from error

    def registration(self) -> Call:
        """See `Region`, as for all of these."""
        handle = self._cuda.get_raw_handle(self._handle)
        return Call("register_cuda_shared_memory", (self.name, handle, self._gpu, self._size), as_result=True)

    def deregistration(self) -> Call:
        """Inverse of `registration`."""
        return Call("unregister_cuda_shared_memory", (self.name,), as_result=True)

    def write(self, array: Any) -> None:
        """Anything with DLPack; arrays that are not contiguous are copied first."""
        if isinstance(array, np.ndarray):
            self._cuda.set_shared_memory_region(self._handle, [array])
        else:
            self._cuda.set_shared_memory_region_from_dlpack(self._handle, [array])

    def read(self, dtype: npt.DTypeLike, shape: list[int]) -> npt.NDArray[Any]:
        """A copy in the host's memory."""
        return np.asarray(self._cuda.get_contents_as_numpy(self._handle, np.dtype(dtype), shape))

    def mark(self, count: int, token: bytes) -> None:
        """At the beginning: tritonclient writes nowhere else."""
        self._cuda.set_shared_memory_region(self._handle, [np.frombuffer(token[:count], np.uint8)])

    def marked(self, count: int, token: bytes) -> bool:
        """Inverse of `mark`."""
        length = min(len(token), count)
        return bool(self.read(np.uint8, [length]).tobytes() == token[:length])

    def destroy(self) -> None:
        """Free it."""
        handle, self._handle = self._handle, None
        self._cuda.destroy_shared_memory_region(handle)


def _cuda() -> ModuleType:
    try:
        from tritonclient.utils import cuda_shared_memory
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(
            f"shared memory of a GPU needs cuda-python ({error}): pip install 'tritonclient[cuda]'"
        ) from error
    module: ModuleType = cuda_shared_memory
    return module
