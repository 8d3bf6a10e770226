"""The meter on a real GPU: the counter's step, the meter against the raw counter, its overhead, joules a sample.

Run by `benchmarks/gpu.sh energy`; writes benchmarks/results/<GPU>/energy-gpu.json. Absolute accuracy needs a meter at
the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import harness
import torch
from harness import Row
from torch import nn

from gpuops.energy.meter import Meter
from gpuops.energy.nvml import open_gpus

LONG_S = 60.0


def main() -> None:
    options = harness.arguments(__doc__ or "", "energy-gpu").parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run this on a GPU machine")
    seconds = 5.0 if options.quick else LONG_S
    rows = [*against_counter(seconds), *overhead(seconds / 4)]
    for dtype in (torch.float32, torch.bfloat16):
        rows += samples(dtype, seconds / 3)
    harness.report(options.out, packages=("torch", "nvidia-ml-py"), limits={}, rows=rows)


def busy(seconds: float) -> int:
    """Keep the device busy; how many products were put on it."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
        count += 20
    return count


def against_counter(seconds: float) -> list[Row]:
    """The meter and the raw counter's difference over the same time."""
    (sensor,) = open_gpus([0]).sensors
    with Meter([0]) as meter:
        before = sensor.count().energy_mj
        busy(seconds)
        after = sensor.count().energy_mj
    reading = meter.reading
    if reading.energy_mj is None or before is None or after is None:
        raise SystemExit(f"no joules: {reading.reason}")
    raw, note = (after - before) / 1000, f"{seconds:.0f} s busy, {reading.method}, {reading.tenancy}"
    return [
        Row("counter", "gpuops", "step", reading.resolution_ms or 0.0, "ms", note="time between two steps, found"),
        Row(
            "window",
            "gpuops",
            "energy",
            reading.energy_mj / 1000,
            "J",
            vs={"counter": reading.energy_mj / 1000 / raw},
            note=note,
        ),
        Row("window", "counter", "energy", raw, "J"),
        Row("thread", "gpuops", "one core", 100 * meter.sampler.cpu_s / reading.seconds, "%"),
    ]


def overhead(seconds: float) -> list[Row]:
    """Products a second with and without the reading thread, in turn."""
    rates: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(6):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            meter = Meter([0]) if name == "with" else None
            if meter is not None:
                meter.mark()
            begun = time.perf_counter()
            rates[name].append(busy(seconds / 6) / (time.perf_counter() - begun))
            if meter is not None:
                meter.close()
    ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    note = f"six pairs, {harness.spread(ratios)}"
    value = statistics.median(rates["with"])
    return [Row("overhead", "gpuops", "products", value, "1/s", vs={"without": statistics.median(ratios)}, note=note)]


def resnet50_size() -> nn.Module:
    """Bottlenecks in ResNet-50's numbers and widths (He et al. 2015, table 1), about 25 million parameters."""

    def block(inputs: int, width: int, stride: int) -> nn.Module:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                layers: list[nn.Module] = []
                for i, o, k, s in ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)):
                    layers += [nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
                self.body = nn.Sequential(*layers[:-1])
                self.skip = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.relu(self.body(x) + self.skip(x))

        return Block()

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            layers.append(block(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def samples(dtype: torch.dtype, seconds: float) -> list[Row]:
    """Joules a training sample of a model of ResNet-50's size."""
    model, batch = resnet50_size().cuda().to(memory_format=torch.channels_last), 64
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch,), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    _repeat(step, 3)
    with Meter([0]) as meter:
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            _repeat(step, 5)
            count += 5 * batch
    reading = meter.reading
    if reading.joules is None:
        raise SystemExit(f"no joules: {reading.reason}")
    case, note = f"ResNet-50 size, {str(dtype).removeprefix('torch.')}", f"batch {batch}, {reading.watts:.0f} W mean"
    return [
        Row(case, "gpuops", "energy", reading.joules / count, "J a sample", note=note),
        Row(case, "gpuops", "throughput", count / reading.seconds, "samples/s"),
    ]


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
