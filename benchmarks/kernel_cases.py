"""Every kernel with the arguments of a real launch, for compiling it where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpuops_kernels import epilogue, histogram, rrc, transform, transform_stats, window

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100, B200."""


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One kernel and what it is launched with, on tensors without memory."""

    name: str
    """Op, variant, dtypes."""
    kernel: Any
    arguments: tuple[Any, ...]
    elements: int
    """Elements that a program, or one turn of its loop, computes."""
    registers: int = 64
    """Most registers a thread that leave enough programs on a multiprocessor: 64 for 1024 threads."""
    options: tuple[tuple[str, Any], ...] = (("enable_fp_fusion", False),)


def cases() -> Iterator[KernelCase]:
    """Every kernel by dtype and variant."""
    for x in epilogue.INPUT_DTYPES:
        for y in epilogue.OUTPUT_DTYPES:
            yield _transform("aligned", x, y)
    for functions in ("log", "asinh", "each"):
        yield _transform(functions, torch.int16, torch.bfloat16, functions=functions)
        yield _transform(functions, torch.float32, torch.float32, functions=functions)
    yield _transform("odd plane", torch.int16, torch.bfloat16, shape=(4, 8, 255, 257), registers=168)
    yield _transform("NHWC->NCHW 3", torch.uint8, torch.bfloat16, shape=(4, 256, 256, 3), layout="NHWC->NCHW")
    yield _transform(
        "NHWC->NCHW 16", torch.int16, torch.bfloat16, shape=(4, 256, 256, 16), layout="NHWC->NCHW", registers=80
    )
    yield _transform("NCHW->NHWC 16", torch.int16, torch.bfloat16, shape=(4, 16, 256, 256), layout="NCHW->NHWC")
    for x in epilogue.INPUT_DTYPES:
        for y in (torch.bfloat16, torch.float32):
            yield _window("slab", x, y)
    plain = torch.int16, torch.bfloat16
    yield _window("chunks", *plain, separate=True)
    yield _window("aligned", *plain, size=(256, 256), start=(3, 16))
    yield _window("aligned chunks", *plain, size=(256, 256), start=(3, 16), separate=True)
    yield _window("turned", *plain, turn=(1, 1))
    yield _window("pad", *plain, start=(-3, 5), rule="pad")
    yield _window("wrap", *plain, start=(-3, 5), rule="wrap")
    yield _window("pad turned", *plain, start=(-3, 5), rule="pad", turn=(1, 1))
    yield _window("volume", *plain, chunk=(16, 512, 512), size=(8, 224, 224), start=(1, 3, 5))
    for x in epilogue.INPUT_DTYPES:
        yield _stats("", x, torch.bfloat16)
    yield _stats("", torch.float32, torch.float32)
    yield _stats("with bins", torch.int16, torch.bfloat16, bins=True)
    for x in epilogue.INPUT_DTYPES:
        yield _histogram(x)
    for y in epilogue.OUTPUT_DTYPES:
        yield _rrc(y)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(op: str, variant: str, x: torch.dtype, y: torch.dtype | None = None) -> str:
    dtypes = " to ".join(str(dtype).removeprefix("torch.") for dtype in (x, y) if dtype is not None)
    return f"{op} {variant}, {dtypes}" if variant else f"{op}, {dtypes}"


def _tables(channels: int, functions: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _meta((epilogue.rows(functions), channels), torch.float32), _meta((2, channels), torch.int32)


def _transform(
    variant: str,
    x: torch.dtype,
    y: torch.dtype,
    shape: tuple[int, ...] = (4, 8, 256, 256),
    functions: str = "",
    layout: str = "keep",
    registers: int = 64,
) -> KernelCase:
    kernel, _, arguments = transform.plan(_meta(shape, x), _meta(shape, y), *_tables(8, functions), functions, layout)
    rows, cols = arguments[-5:-3]
    return KernelCase(_name("transform", variant, x, y), kernel, arguments, rows * cols, registers)


def _window(
    variant: str,
    x: torch.dtype,
    y: torch.dtype,
    chunk: tuple[int, ...] = (512, 512),
    size: tuple[int, ...] = (224, 224),
    start: tuple[int, ...] = (3, 5),
    turn: tuple[int, int] = (0, 0),
    rule: str = "error",
    separate: bool = False,
) -> KernelCase:
    table = torch.tensor([[0, *start, *turn]], dtype=torch.int32)
    reading = window.read(table, 4, chunk, size, rule)
    chunks = [torch.empty((8, *chunk), dtype=x) for _ in range(4)] if separate else [_meta((4, 8, *chunk), x)]
    result = _meta((32, 8, *size), y)
    kernel, _, arguments = window.plan(chunks, (8, *chunk), result, reading, *_tables(8, ""))
    rows, cols = arguments[-5:-3]
    return KernelCase(_name("window", variant, x, y), kernel, arguments, rows * cols, 64 if rule == "error" else 96)


def _stats(variant: str, x: torch.dtype, y: torch.dtype, bins: bool = False) -> KernelCase:
    shape = 32, 8, 512, 512
    edges = _meta((2, 8), torch.float32) if bins else None
    kernel, _, arguments = transform_stats.plan(_meta(shape, x), _meta(shape, y), *_tables(8, ""), edges)
    rows, cols = arguments[12:14]
    name, registers = _name("transform_stats", variant, x, y), 128 if bins else 96
    return KernelCase(name, kernel, arguments, rows * cols, registers, (("enable_fp_fusion", True),))


def _histogram(x: torch.dtype) -> KernelCase:
    shape = 32, 8, 512, 512
    scale, missing, counts = _meta((3, 8), torch.float32), _meta((2, 8), torch.int32), _meta((8, 259), torch.int64)
    kernel, _, arguments = histogram.plan(_meta(shape, x), scale, missing, counts)
    rows, cols = arguments[-2:]
    return KernelCase(_name("histogram", "", x), kernel, arguments, rows * cols, 128)


def _rrc(y: torch.dtype) -> KernelCase:
    images, boxes, channel = (
        _meta((32, 256, 256, 3), torch.uint8),
        _meta((32, 5), torch.float32),
        _meta((3,), torch.float32),
    )
    kernel, _, arguments = rrc.plan(images, boxes, channel, channel, _meta((32, 3, 224, 224), y))
    rows, cols = arguments[-3:-1]
    return KernelCase(_name("rrc", "", torch.uint8, y), kernel, arguments, rows * cols, 128)
