"""From disk to a training step on a GPU, each stage against its own ceiling; run by `benchmarks/gpu.sh loader`.

Stages, in bytes as they are stored (int16, zstd, one 256 KiB sample an inner chunk, random batches of 64):
  read     the reader alone, into pinned slots;            ceiling: the limit of bench_loader.py on this machine
  upload   one large pinned copy after another, which is the ceiling of the copying stream
  prepare  the loader whole, to model-ready bfloat16;      ceiling: the slower of read and upload
  train    the loader under a convolutional net and AdamW; ceiling: the same step on one batch again and again

The share of the training time in which the step waits for data is the row `stall_share`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Row
from loader_cases import LARGE, VARIABLE, Case, contents, write
from torch import nn

import gpuops as go
from gpuops.data.loader import ZarrLoader, pinned
from gpuops.data.order import Order
from gpuops.data.reading.reader import Reader
from gpuops.data.sample import Field
from gpuops.preprocess.module import PreprocessModule

CASE = "gpu-zstd-256KiB-shuffle"
BATCH = 64
PACKAGES = ("numpy", "zarr", "zstandard", "torch", "triton")


class Block(nn.Module):
    """Two convolutions and the way round them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def main() -> None:
    parser = harness.arguments(__doc__ or "", "gpu-loader")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "torch sees no CUDA device: run benchmarks/gpu.sh loader on a machine with one\n")
    samples, rounds = (512, 3) if options.quick else (4096, 7)
    with tempfile.TemporaryDirectory(prefix="gpuops-bench-") as scratch:
        case = Case(CASE, "zstd", LARGE)
        store = write(case, Path(scratch), contents(case, samples))
        rows = measure(str(store), samples * case.sample_bytes, rounds)
    found = {f"{row.metric}": (row.value, row.unit) for row in rows if row.subject == "limit"}
    harness.report(options.out, packages=PACKAGES, limits=found, rows=rows)


def measure(store: str, epoch_bytes: int, rounds: int) -> list[Row]:
    device = torch.device("cuda", 0)
    module = go.ZarrDataModule(store, {"x": [Field(VARIABLE)]}, {}, global_batch=BATCH)
    module.setup()
    orders = [Order(len(module.train_ids), 0, epoch, "benchmark", BATCH) for epoch in range(1000)]
    inputs, targets = (PreprocessModule(module.preprocess[side], torch.bfloat16) for side in ("inputs", "targets"))
    loader = ZarrLoader(
        Reader(module.source, module.bound, allocate=pinned),
        module.train_ids,
        orders.__getitem__,
        rank=0,
        ranks=1,
        epoch=None,
        inputs=inputs,
        targets=targets,
        device=device,
    )
    batch = next(iter(loader))["inputs"]["x"].clone()
    net = nn.Sequential(
        nn.PixelUnshuffle(4), nn.Conv2d(16, 96, 1), *(Block(96) for _ in range(6)), nn.Conv2d(96, 16, 1)
    ).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = (net(x) - nn.functional.pixel_unshuffle(x, 4)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    steps = len(loader)
    whole = torch.empty(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    subjects: dict[str, Callable[[int], None]] = {
        "read": lambda r: drain(loader.reader.iterate((module.train_ids[p], v) for p, v in orders[r].shares(0, 0, 1))),
        "upload": lambda r: repeat(steps, lambda: batch_like(whole, device)),
        "prepare": lambda r: drain(loader),
        "step": lambda r: repeat(steps, lambda: step(batch)),
        "train": lambda r: drain(step(b["inputs"]["x"]) for b in loader),
    }
    for subject in subjects.values():
        subject(0)  # compile, pin, warm
    timings = harness.interleave({n: synchronised(s) for n, s in subjects.items()}, rounds)
    took = {name: statistics.median(timing.wall_s) for name, timing in timings.items()}
    rate = {name: epoch_bytes / took[name] / 1e6 for name in ("read", "prepare", "train")}
    rate["upload"] = steps * whole.nbytes / took["upload"] / 1e6
    ceiling = min(rate["read"], rate["upload"])
    note = f"stored bytes, {steps} batches of {BATCH}, {rounds} rounds"
    share = 1 - took["step"] / took["train"]
    return [
        Row(CASE, "gpuops", "read", rate["read"], "MB/s", note=note),
        Row(CASE, "limit", "upload", rate["upload"], "MB/s", note="one pinned copy of 64 MiB after another"),
        Row(CASE, "gpuops", "prepare", rate["prepare"], "MB/s", rate["prepare"] / ceiling, note=note),
        Row(CASE, "limit", "step", epoch_bytes / took["step"] / 1e6, "MB/s", note="the same batch in every step"),
        Row(CASE, "gpuops", "train", rate["train"], "MB/s", took["step"] / took["train"], note=note),
        Row(CASE, "gpuops", "stall_share", max(share, 0.0), "share", note="of the time of a training step"),
    ]


def batch_like(pinned: torch.Tensor, device: torch.device) -> None:
    pinned.to(device, non_blocking=True)


def drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def repeat(times: int, work: Callable[[], None]) -> None:
    for _ in range(times):
        work()


def synchronised(subject: Callable[[int], None]) -> Callable[[int], None]:
    def timed(number: int) -> None:
        torch.cuda.synchronize()
        subject(number)
        torch.cuda.synchronize()

    return timed


if __name__ == "__main__":
    begin = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begin:.0f} s")
