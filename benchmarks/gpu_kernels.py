"""The kernels on a GPU: bandwidth as a share of a device copy, against eager and three ways to compile the pipeline.

All subjects run in one process on the same buffers, in turn, round after round; each works through several inputs, so
that nothing is read from the L2 cache. Bytes are counted by hand: what must be read once and written once.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import kernel_pipelines as pipelines
import torch

from gpuops.energy.meter import Meter
from gpuops_kernels import histogram, transform, transform_stats, window

PACKAGES = ("torch", "triton", "numpy")
PEERS = ("nvidia.dali", "kornia", "triton_augment")
"""Libraries that do some of it; a row says so where one is not installed."""
INPUTS = 4
"""Sets of buffers a case works through: more than the 50 MB of an H100's L2 cache at every size that is cited."""
BURST = 20
"""Launches between two events."""
ENERGY_S = 2.0
"""Seconds that a subject runs for its joules: many steps of the energy counter."""

Call = Callable[[int], Any]
"""Runs a subject on one of the inputs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One pipeline at one size, and everybody who computes it."""

    name: str
    moved_bytes: int
    """Bytes that must be read and written, counted by hand."""
    subjects: dict[str, Call]
    """gpuops first."""
    check: Callable[[], None] = field(default=lambda: None)
    """Raises if ours and eager disagree."""


def compiled(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A pipeline in eager mode and compiled in three ways."""
    tuned = {"max_autotune": True, "triton.cooperative_reductions": True}
    return {
        "eager": function,
        "torch.compile": torch.compile(function, fullgraph=True, dynamic=False),
        "torch.compile, tuned": torch.compile(function, fullgraph=True, dynamic=False, options=tuned),
        "torch.compile, dynamic": torch.compile(function, fullgraph=True, dynamic=True),
    }


def over(functions: dict[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]]) -> dict[str, Call]:
    """Each function as a call on one of the inputs."""

    def on(function: Callable[..., Any]) -> Call:
        return lambda number: function(*inputs[number % len(inputs)])

    return {name: on(function) for name, function in functions.items()}


def packed(shape: tuple[int, ...], dtype: torch.dtype = torch.int16) -> list[torch.Tensor]:
    """Random stored numbers, a percent of them missing."""
    low, high = (-20000, 20000) if dtype == torch.int16 else (0, 256)
    found = []
    for seed in range(INPUTS):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int32)
        x[torch.rand(shape, generator=generator, device="cuda") < 0.01] = pipelines.MISSING
        found.append(x.to(dtype))
    return found


def tables(channels: int, functions: str = "") -> tuple[torch.Tensor, ...]:
    """(a, b) of the pipelines and (coefficients, missing) of the kernels that say the same."""
    a = torch.linspace(1e-4, 3e-4, channels)
    b = torch.linspace(-0.5, 0.5, channels)
    one, zero, infinity = torch.ones(channels), torch.zeros(channels), torch.full((channels,), torch.inf)
    rows = [a, b, -5 * one, 5 * one]
    for _ in functions.split(",") if functions else []:
        rows += [zero, one, zero, -infinity, infinity]
    coefficients = torch.stack([*rows, zero, torch.full((channels,), torch.nan)])
    missing = torch.tensor([[pipelines.MISSING] * channels, [1] * channels], dtype=torch.int32)
    return a.cuda(), b.cuda(), coefficients.cuda(), missing.cuda()


def cases(quick: bool) -> Iterator[Case]:
    """Every pipeline; the first also at the size of one batch of windows, where the host is what counts."""
    shape = (8, 8, 256, 256) if quick else pipelines.SHAPE
    yield transform_case("transform int16 to bfloat16", shape, "")
    yield transform_case("transform int16 to bfloat16, ragged", (*shape[:3], shape[3] - 32), "")
    yield transform_case("transform int16 to bfloat16, 13 MB", (4, 8, 256, 208), "")
    yield transform_case("transform asinh int16 to bfloat16", shape, "asinh")
    yield stats_case(shape)
    yield from window_cases(windows=32 if quick else 192, chunks=8 if quick else 64)
    yield histogram_case(shape)


def transform_case(name: str, shape: tuple[int, ...], functions: str) -> Case:
    a, b, coefficients, missing = tables(shape[1], functions)
    xs = packed(shape)
    eager = pipelines.transform_asinh if functions else pipelines.transform
    ours = over(
        {"gpuops": lambda x: transform.launch(x, coefficients, missing, torch.bfloat16, functions)}, [(x,) for x in xs]
    )
    peers = over(compiled(eager), [(x, a, b) for x in xs])

    def check() -> None:
        torch.testing.assert_close(ours["gpuops"](0), peers["eager"](0), rtol=2**-7, atol=1e-5)

    return Case(name, math.prod(shape) * 4, ours | peers, check)


def stats_case(shape: tuple[int, ...]) -> Case:
    a, b, coefficients, missing = tables(shape[1])
    xs = packed(shape)
    call = {"gpuops": lambda x: transform_stats.launch(x, coefficients, missing, torch.bfloat16)}
    ours, peers = over(call, [(x,) for x in xs]), over(compiled(pipelines.transform_stats), [(x, a, b) for x in xs])

    def check() -> None:
        y, found, _ = ours["gpuops"](0)
        want, count, mean, m2, low, high = peers["eager"](0)
        torch.testing.assert_close(y, want, rtol=2**-7, atol=1e-5)
        for column, values in enumerate((count, mean, m2, low, high)):
            torch.testing.assert_close(found[:, column], values.double(), rtol=1e-3, atol=1e-4)

    return Case("transform_stats int16 to bfloat16", math.prod(shape) * 4, ours | peers, check)


def window_cases(windows: int, chunks: int) -> Iterator[Case]:
    """Out of one slab, out of chunks that were allocated apart, and mirrored and turned."""
    channels, height, width = pipelines.SHAPE[1:]
    size = pipelines.WINDOW
    a, b, coefficients, missing = tables(channels)
    slabs = packed((chunks, channels, height, width))
    apart = [[chunk.clone() for chunk in slab] for slab in slabs]
    entries = []
    for seed in range(INPUTS):
        generator = torch.Generator().manual_seed(seed)
        columns = [
            torch.randint(0, limit, (windows,), generator=generator) for limit in (chunks, height - size, width - size)
        ]
        entries.append(torch.stack([*columns, torch.zeros_like(columns[0]), torch.zeros_like(columns[0])], 1).int())
    on_gpu = [table[:, :3].long().cuda() for table in entries]
    moved = windows * channels * size * size * 4
    rest = coefficients, missing, torch.bfloat16, (size, size)

    ours = over(
        {"gpuops": lambda slab, table: window.launch(slab, table, *rest)}, list(zip(slabs, entries, strict=True))
    )
    inputs = [(slab, table, a, b) for slab, table in zip(slabs, on_gpu, strict=True)]
    peers = over(compiled(pipelines.window_slab), inputs)

    def check() -> None:
        torch.testing.assert_close(ours["gpuops"](0), peers["eager"](0), rtol=2**-7, atol=1e-5)

    yield Case("window, slab", moved, ours | peers, check)
    theirs = over(
        {"gpuops": lambda chunks, table: window.launch_chunks(chunks, table, *rest)},
        list(zip(apart, entries, strict=True)),
    )
    lists = [(table, a, b, *chunks) for chunks, table in zip(apart, on_gpu, strict=True)]
    yield Case("window, chunks", moved, theirs | over(compiled(pipelines.window_chunks), lists))
    for table in (turned := [table.clone() for table in entries]):
        table[:, 3], table[:, 4] = table[:, 0] % 4, table[:, 1] % 4
    mixed = over(
        {"gpuops": lambda slab, table: window.launch(slab, table, *rest)}, list(zip(slabs, turned, strict=True))
    )
    yield Case("window, mirrored and turned", moved, mixed)


def histogram_case(shape: tuple[int, ...]) -> Case:
    xs = packed(shape)
    missing = tables(shape[1])[3] * 0
    scale = torch.tensor([[1 / 256], [128.0], [torch.nan]]).repeat(1, shape[1]).cuda()
    ours = over({"gpuops": lambda x: histogram.launch(x, scale, missing)}, [(x,) for x in xs])
    functions = {"torch.histc": pipelines.histogram, "torch.compile": torch.compile(pipelines.histogram)}
    return Case("histogram int16, 256 bins", math.prod(shape) * 2, ours | over(functions, [(x,) for x in xs]))


def copy_of(moved_bytes: int) -> Call:
    """A device copy that moves as many bytes: the 100 % line."""
    pairs = [[torch.empty(moved_bytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2)] for _ in range(INPUTS)]
    return lambda number: pairs[number % INPUTS][0].copy_(pairs[number % INPUTS][1])


def microseconds(call: Call, first: int) -> float:
    """Device time of one call, over a burst of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # so that the host is ahead, and the device never waits for a launch
    begin.record()
    for number in range(first, first + BURST):
        call(number)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / BURST


def host_microseconds(call: Call) -> float:
    """What a call costs the host, which does not wait for the device."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for number in range(BURST):
        call(number)
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent * 1e6 / BURST


def launches(call: Call) -> int:
    """Kernels and copies that one call puts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def microjoules(call: Call, spent_us: float) -> float | None:
    """Energy of one call by the GPU's own counter; None where there is none."""
    calls = max(BURST, int(ENERGY_S * 1e6 / spent_us))
    torch.cuda.synchronize()
    with Meter([0]) as meter:
        for number in range(calls):
            call(number)
        torch.cuda.synchronize()
    return None if meter.reading.joules is None else meter.reading.joules * 1e6 / calls


def measure(case: Case, rounds: int, energy: bool) -> Iterator[harness.Row]:
    """Every subject's rows."""
    case.check()
    subjects: dict[str, Call] = {"limit": copy_of(case.moved_bytes), **case.subjects}
    for call in subjects.values():
        for number in range(INPUTS):
            call(number)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for number in range(rounds):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            times[name].append(microseconds(subjects[name], number))
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, call in subjects.items():
        bandwidth = case.moved_bytes / middle[name] / 1e3
        peers = {} if name != "gpuops" else {p: middle[p] / middle[name] for p in names if p not in ("gpuops", "limit")}
        share = middle["limit"] / middle[name]
        note = f"{case.moved_bytes / 1e6:.0f} MB moved; {harness.spread(times[name])} us"
        yield harness.Row(case.name, name, "bandwidth", bandwidth, "GB/s", share, peers, note)
        yield harness.Row(case.name, name, "time", middle[name], "us")
        yield harness.Row(case.name, name, "host time", host_microseconds(call), "us")
        yield harness.Row(case.name, name, "launches", launches(call), "a call")
        joules = microjoules(call, middle[name]) if energy else None
        if joules is not None:
            yield harness.Row(case.name, name, "energy", joules, "uJ a call", note="counter of the whole GPU")


def run(out: Path, *, quick: bool) -> None:
    """Measure everything and write it to `out`."""
    absent = [name for name in PEERS if importlib.util.find_spec(name.split(".")[0]) is None]
    if absent:
        print(f"not installed here, and not run: {', '.join(absent)}")
    rows: list[harness.Row] = []
    for case in cases(quick):
        print(case.name, flush=True)
        torch._dynamo.reset()
        rows += measure(case, 3 if quick else 15, energy=not quick)
    limits = {row.case: (row.value, row.unit) for row in rows if (row.subject, row.metric) == ("limit", "bandwidth")}
    harness.report(out, packages=PACKAGES, limits=limits, rows=rows)
