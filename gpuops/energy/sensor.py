"""Where joules come from: the GPUs' own energy counters, read through NVML, or nothing at all.

A sensor that cannot measure says why, in words meant for a person; it never answers 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpuops.errors import InputError, UnavailableError

COUNTER_STEP_MS = 100.0
"""Longest published update period of the NVML energy counter; boards differ, from 10 to 100 ms.

Sources: ml.energy "Thermally Stable Profiling" (about 100 ms), PETSc manual (20 to 100 ms). NVIDIA states none.
"""

_MIG = "MIG is on: NVML counts energy for the whole board, not for an instance"


@dataclass(frozen=True, slots=True)
class Count:
    """What one GPU's counter answered."""

    energy_mj: int | None
    """Millijoules since the driver was loaded; None if it did not answer."""
    reason: str | None = None
    """Why there is no answer."""


class Sensor(Protocol):
    """Something that counts energy by GPU."""

    method: str
    """"nvml-counter", or "none"."""
    scope: str
    """What the counter includes: "gpu-board" (with its memory, and with every process on it), or "none"."""
    resolution_ms: float | None
    """Longest time between two steps of the counter; None if nothing counts."""
    reason: str | None
    """Why nothing counts; None if something does."""

    def read(self) -> dict[str, Count]:
        """Every counted GPU's counter, by UUID."""
        ...

    def tenancy(self) -> str:
        """Whether other processes use these GPUs now: "exclusive", "shared" or "unknown"."""
        ...


class NoSensor:
    """Nothing counts energy here, and this is why."""

    method = "none"
    scope = "none"
    resolution_ms: float | None = None

    def __init__(self, reason: str) -> None:
        self.reason: str | None = reason

    def read(self) -> dict[str, Count]:
        """Nothing."""
        return {}

    def tenancy(self) -> str:
        """Unknown."""
        return "unknown"


@dataclass(frozen=True, slots=True)
class _Board:
    """One GPU as NVML sees it."""

    uuid: str
    name: str
    handle: Any
    mig: bool


class NvmlSensor:
    """The energy counters of some GPUs, `nvmlDeviceGetTotalEnergyConsumption` (Volta and newer).

    A call takes up to about 10 ms on hardware: read it at the edges of a window, never inside a training step.
    """

    method = "nvml-counter"
    scope = "gpu-board"
    resolution_ms: float | None = COUNTER_STEP_MS
    reason: str | None = None

    def __init__(self, nvml: Any, boards: Sequence[_Board]) -> None:
        self._nvml = nvml
        self._boards = tuple(boards)

    def read(self) -> dict[str, Count]:
        """Every counted GPU's counter, by UUID: a board that was named twice counts once."""
        return {board.uuid: self._count(board) for board in self._boards}

    def _count(self, board: _Board) -> Count:
        if board.mig:
            return Count(None, _MIG)
        try:
            return Count(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(board.handle)))
        except self._nvml.NVMLError as error:
            return Count(None, _explain(self._nvml, error))

    def tenancy(self) -> str:
        """Whether other processes use these GPUs now, as far as NVML lists them.

        In a container NVML often lists no process, not even this one: that is "unknown", not "exclusive".
        """
        tenants = []
        for board in self._boards:
            try:
                tenants.append({p.pid for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(board.handle)})
            except self._nvml.NVMLError:
                return "unknown"
        if not all(os.getpid() in pids for pids in tenants):
            return "unknown"
        return "exclusive" if all(len(pids) == 1 for pids in tenants) else "shared"


def open_sensor(devices: Sequence[int | str] | None = None) -> Sensor:
    """The best sensor for the GPUs that this process may use, as CUDA_VISIBLE_DEVICES says.

    Args:
        devices: GPUs to count: indices as CUDA and torch number them, or UUIDs. None counts all that are visible.

    Returns:
        An `NvmlSensor`, or a `NoSensor` with the reason.

    Raises:
        InputError: a device that is not visible is asked for (only where there are GPUs at all).
    """
    try:
        import pynvml as nvml
    except ImportError:
        return NoSensor("nvidia-ml-py is not installed: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
        boards = [_board(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return NoSensor(_explain(nvml, error))
    try:
        visible = _visible(boards, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if devices is None:
            return NvmlSensor(nvml, visible)
        if not devices:
            return NoSensor("no GPU is asked for")
        if any(isinstance(device, int) for device in devices):
            _check_order(boards)
    except UnavailableError as error:
        return NoSensor(str(error))
    return NvmlSensor(nvml, [_chosen(visible, device) for device in devices])


def _board(nvml: Any, index: int) -> _Board:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # a board, or a driver, without MIG
        mig = False
    return _Board(nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), handle, mig)


def _visible(boards: Sequence[_Board], setting: str | None) -> list[_Board]:
    """Boards that CUDA shows under a value of CUDA_VISIBLE_DEVICES, in CUDA's order.

    As in CUDA, an entry is an index or the start of one UUID, and the first entry that is neither ends the list.
    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".

    Raises:
        UnavailableError: none is visible, or which ones cannot be told or counted.
    """
    if not boards:
        raise UnavailableError("the NVIDIA driver sees no GPU")
    if setting is None:
        return list(boards)
    chosen: list[_Board] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("MIG-"):
            raise UnavailableError(_MIG)
        if entry.isdecimal():
            _check_order(boards)
            matches = list(boards[int(entry) : int(entry) + 1])
        else:
            matches = [board for board in boards if entry.startswith("GPU-") and board.uuid.startswith(entry)]
        if len(matches) != 1:
            break
        chosen += matches
    if not chosen:
        raise UnavailableError(f"no GPU is visible: CUDA_VISIBLE_DEVICES is {setting!r}")
    return chosen


def _check_order(boards: Sequence[_Board]) -> None:
    """CUDA numbers unlike boards by speed, NVML by bus: an index then names two different boards."""
    if len({board.name for board in boards}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise UnavailableError(
            "GPUs of several models are numbered differently by CUDA and NVML: set CUDA_DEVICE_ORDER=PCI_BUS_ID, "
            "or name GPUs by UUID"
        )


def _chosen(visible: Sequence[_Board], device: int | str) -> _Board:
    by_name: dict[int | str, _Board] = {**dict(enumerate(visible)), **{board.uuid: board for board in visible}}
    if device not in by_name:
        known = ", ".join(f"{i} ({board.uuid})" for i, board in enumerate(visible))
        raise InputError(f"GPU {device!r} is not visible to this process: use one of {known}")
    return by_name[device]


def _explain(nvml: Any, error: Exception) -> str:
    """Why NVML did not answer, in words that say what to do where something can be done."""
    reasons = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded (see nvidia-smi)",
        nvml.NVML_ERROR_NOT_SUPPORTED: "this GPU has no energy counter (Volta and newer have one)",
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "this NVIDIA driver is too old to count energy",
        nvml.NVML_ERROR_NO_PERMISSION: "this user may not read the GPU's energy counter",
        nvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost: it fell off the bus and needs a reset",
    }
    return reasons.get(getattr(error, "value", None), f"NVML: {error}")
