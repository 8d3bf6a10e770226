"""The energy counters of NVIDIA GPUs, through the NVML of the driver (nvidia-ml-py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gpuops.energy.sensor import Count, Found, Vitals
from gpuops.errors import InputError, UnavailableError

COUNTER_STEP_MS = 100.0
"""Longest published update period of the NVML energy counter; boards differ, from 10 to 100 ms.

Sources: ml.energy "Thermally Stable Profiling" (about 100 ms), PETSc manual (20 to 100 ms). NVIDIA states none.
"""
MEAN_POWER_MS = 1000.0
"""`nvmlDeviceGetPowerUsage` is the mean of the last second on Ampere (but GA100) and newer (nvml.h)."""
POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT, the power now on every architecture (nvml.h)."""

_MIG = "MIG is on: NVML counts energy for the whole board, not for an instance"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Board:
    """One GPU as NVML lists it."""

    uuid: str
    name: str
    handle: Any
    mig: bool


class NvmlSensor:
    """One GPU: its energy counter (Volta and newer), else its power, for whoever reads it to integrate.

    A call takes up to about 10 ms on hardware: read it from a thread of its own, never inside a training step.
    """

    scope = "gpu-board"

    def __init__(self, nvml: Any, board: Board, own: Callable[[], set[int]]) -> None:
        """Find out how this board can be measured; a board that cannot says so when it is read.

        Args:
            nvml: the module pynvml, initialised.
            board: the GPU.
            own: tells the ids of the processes whose work is measured.
        """
        self._nvml, self._board, self._own = nvml, board, own
        self.id, self.name = board.uuid, board.name
        self.method, self.step_ms = "nvml-counter", COUNTER_STEP_MS
        self._read: Callable[[], Count] = self._energy
        if board.mig:
            self._read = lambda: Count(None, reason=_MIG)
        elif not self._counts():
            if self._instant_mw() is not None:
                self.method, self._read = "nvml-power-integrated", lambda: Count(None, self._instant_mw())
            elif self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(board.handle)) is not None:
                self.method, self.step_ms = "nvml-mean-power-integrated", MEAN_POWER_MS
                self._read = lambda: Count(None, int(nvml.nvmlDeviceGetPowerUsage(board.handle)))

    def count(self) -> Count:
        """The counter, or the power, now."""
        try:
            return self._read()
        except self._nvml.NVMLError as error:
            return Count(None, reason=explain(self._nvml, error))

    def vitals(self) -> Vitals:
        """Power, time busy, memory, temperature, clock and tenancy now."""
        nvml, handle = self._nvml, self._board.handle
        power_mw = self._instant_mw()
        if power_mw is None:
            power_mw = self._ask(lambda: int(nvml.nvmlDeviceGetPowerUsage(handle)))
        return Vitals(
            power_mw,
            self._ask(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            self._ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used)),
            self._ask(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            self._ask(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            self._tenancy(),
        )

    def _energy(self) -> Count:
        return Count(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board.handle)))

    def _counts(self) -> bool:
        """Whether this board and driver have an energy counter at all; another error may pass."""
        try:
            self._energy()
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound):
            return False
        except self._nvml.NVMLError:
            return True
        return True

    def _instant_mw(self) -> int | None:
        values = self._ask(lambda: self._nvml.nvmlDeviceGetFieldValues(self._board.handle, [POWER_INSTANT]))
        if values is None or values[0].nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        return int(values[0].value.uiVal)

    def _ask(self, call: Callable[[], _T]) -> _T | None:
        try:
            return call()
        except self._nvml.NVMLError:
            return None

    def _tenancy(self) -> str:
        """Whether others use this GPU now, as far as NVML lists them.

        In a container NVML often lists no process, not even this one: that is "unknown", not "exclusive".
        """
        processes = self._ask(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._board.handle))
        pids = {process.pid for process in processes or ()}
        own = self._own()
        if not pids & own:
            return "unknown"
        return "exclusive" if pids <= own else "shared"


def this_process() -> set[int]:
    """Whose work is measured, unless told otherwise."""
    return {os.getpid()}


def open_gpus(devices: Sequence[int | str] | None = None, own: Callable[[], set[int]] = this_process) -> Found:
    """The sensors of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES says.

    Args:
        devices: GPUs to count: indices as CUDA and torch number them, or UUIDs. None counts all that are visible.
        own: tells the ids of the processes whose work is measured: with others on a GPU, its tenancy is "shared".

    Raises:
        InputError: a device that is not visible is asked for (only where there are GPUs at all).
    """
    try:
        import pynvml as nvml
    except ImportError:
        return Found((), "nvidia-ml-py is not installed: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
        boards = [_board(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return Found((), explain(nvml, error))
    try:
        chosen = visible(boards, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if devices is not None:
            if not devices:
                return Found((), "no GPU is asked for")
            if any(isinstance(device, int) for device in devices):
                _check_order(boards)
            chosen = [_chosen(chosen, device) for device in devices]
    except UnavailableError as error:
        return Found((), str(error))
    # A board that was named twice counts once.
    return Found([NvmlSensor(nvml, board, own) for board in {board.uuid: board for board in chosen}.values()])


def _board(nvml: Any, index: int) -> Board:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # a board, or a driver, without MIG
        mig = False
    return Board(nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), handle, mig)


def visible(boards: Sequence[Board], setting: str | None) -> list[Board]:
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
    chosen: list[Board] = []
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


def _check_order(boards: Sequence[Board]) -> None:
    """CUDA numbers unlike boards by speed, NVML by bus: an index then names two different boards."""
    if len({board.name for board in boards}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise UnavailableError(
            "GPUs of several models are numbered differently by CUDA and NVML: set CUDA_DEVICE_ORDER=PCI_BUS_ID, "
            "or name GPUs by UUID"
        )


def _chosen(visible: Sequence[Board], device: int | str) -> Board:
    by_name: dict[int | str, Board] = {**dict(enumerate(visible)), **{board.uuid: board for board in visible}}
    if device not in by_name:
        known = ", ".join(f"{i} ({board.uuid})" for i, board in enumerate(visible))
        raise InputError(f"GPU {device!r} is not visible to this process: use one of {known}")
    return by_name[device]


def explain(nvml: Any, error: Exception) -> str:
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
