"""What the meter gets wrong and what it costs, over a scripted driver whose truth is known.

Error: windows of 1 to 200 counter steps at random phases, under a load that jumps from 70 W to 600 W. The peer is what
other meters do: the counter after less the counter before. The limit is the truth. Cost: processor time of the reading
thread over the time it ran. Split: 1.3 million spans a minute in flight, eight at a time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from harness import Row

ROOT = Path(__file__).resolve().parents[1]
FAKE = ROOT / "tests" / "gpuops" / "energy"
STEPS_MS = (10, 20, 100)
CLASSES = (("1 to 19 steps", 1, 20), ("20 to 49 steps", 20, 50), ("50 to 200 steps", 50, 201))
COST_S = 20.0

CHILD = """
import json, sys, time
sys.path[:0] = [sys.argv[1]]
from tests.gpuops.energy.play import play
asked = json.load(sys.stdin)
sys.stdout.write(json.dumps(play(**asked)))
"""
COST = """
import json, sys, time
from gpuops.energy.meter import Meter
with Meter() as meter:
    begun = time.perf_counter()
    time.sleep(float(sys.argv[1]))
    share = meter.sampler.cpu_s / (time.perf_counter() - begun)
print(json.dumps({"share": share, "step_ms": meter.reading.resolution_ms}))
"""


def main() -> None:
    options = harness.arguments(__doc__ or "", "energy").parse_args()
    rows: list[Row] = []
    if os.path.exists("/dev/nvidiactl"):
        print("a real driver is here: errors over the scripted one are not measured")
    else:
        with tempfile.TemporaryDirectory() as folder:
            environment = _driver(Path(folder))
            for step_ms in STEPS_MS:
                rows += errors(step_ms, environment, windows=20 if options.quick else 200)
            rows += cost(environment, 3.0 if options.quick else COST_S)
    rows += splitting(10_000 if options.quick else 200_000)
    harness.report(options.out, packages=("numpy", "nvidia-ml-py"), limits={}, rows=rows)


def _driver(folder: Path) -> dict[str, str]:
    """Environment with the scripted libnvidia-ml.so.1."""
    built = folder / "libnvidia-ml.so.1"
    flags = ["-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["cc", *flags, str(FAKE / "fake_nvml.c"), "-o", str(built)], check=True)
    found = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(folder / "script"), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **found, "FAKE_NVML_CLOCK": str(folder / "clock")}


def load(seed: int, seconds: float) -> list[tuple[float, float]]:
    """(time, milliwatt) of a load that jumps."""
    draw, at, points = random.Random(seed), 0.0, []
    while at < seconds:
        points.append((round(at, 6), float(draw.choice([70_000, draw.randint(150_000, 600_000)]))))
        at += draw.choice([0.005, 0.03, 0.11, 0.4, 1.0]) * draw.uniform(0.5, 1.5)
    return points


def energy_mj(points: list[tuple[float, float]], begin: float, end: float) -> float:
    """The truth."""
    ends = [*points[1:], (float("inf"), 0.0)]
    return sum(mw * max(min(to, end) - max(t, begin), 0) for (t, mw), (to, _) in zip(points, ends, strict=True))


def errors(step_ms: int, environment: dict[str, str], windows: int) -> list[Row]:
    """Largest and median relative error by length of window."""
    points, draw = load(step_ms, 60.0), random.Random(step_ms)
    script = f"gpu GPU-a H100 step_ms={step_ms}\n" + "".join(f"power 0 {t} {mw}\n" for t, mw in points)
    rows = []
    for name, low, high in CLASSES:
        asked = []
        for _ in range(windows):
            seconds = draw.randrange(low, high) * step_ms / 1000
            begin = round(draw.uniform(2, 55 - seconds), 6)
            asked.append((begin, round(begin + seconds, 6)))
        document = json.dumps({"script": script, "windows": asked, "devices": None, "jitter": 0.5})
        command = [sys.executable, "-c", CHILD, str(ROOT)]
        done = subprocess.run(command, env=environment, input=document, capture_output=True, text=True, check=True)
        ours, theirs, nulls = [], [], 0
        for (begin, end), reading in zip(asked, json.loads(done.stdout), strict=True):
            truth = energy_mj(points, begin, end)
            held = [energy_mj(points, 0, int(at * 1000 / step_ms + 1e-9) * step_ms / 1000) for at in (begin, end)]
            theirs.append(abs(held[1] - held[0] - truth) / truth)
            if reading["joules"] is None:
                nulls += 1
            else:
                ours.append(abs(reading["joules"] * 1000 - truth) / truth)
        case = f"counter every {step_ms} ms, {name}"
        note = f"{windows} windows, {nulls} null (too short); median {100 * statistics.median(ours):.2f} %"
        worst = max(ours), max(theirs)
        rows.append(
            Row(case, "gpuops", "largest error", 100 * worst[0], "%", vs={"difference": worst[0] / worst[1]}, note=note)
        )
        note = f"median {100 * statistics.median(theirs):.2f} %"
        rows.append(Row(case, "difference", "largest error", 100 * worst[1], "%", note=note))
    return rows


def cost(environment: dict[str, str], seconds: float) -> list[Row]:
    """Share of one core that the reading thread takes."""
    rows = []
    real = {name: value for name, value in environment.items() if name != "FAKE_NVML_CLOCK"}
    for step_ms in STEPS_MS:
        Path(environment["FAKE_NVML"]).write_text(f"gpu GPU-a H100 step_ms={step_ms}\npower 0 0 250000 80 4000\n")
        command = [sys.executable, "-c", COST, str(seconds)]
        done = subprocess.run(command, env=real, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        note = f"{seconds:.0f} s, counter found to step every {told['step_ms']:.1f} ms; NVML itself is scripted"
        rows.append(Row(f"counter every {step_ms} ms", "gpuops", "one core", 100 * told["share"], "%", note=note))
    return rows


def splitting(spans: int) -> list[Row]:
    """Spans a second that the conserving split takes, and how well it conserves."""
    from gpuops.energy.attribute import Span, split

    draw = random.Random(1)
    made = []
    for stream in range(8):
        at = 0
        for number in range(spans // 8):
            made.append(Span((stream, number), at, at + 60_000_000, draw.choice([1.0, 0.25])))
            at += draw.randrange(60_000_000, 65_000_000)
    last = max(span.end_ns for span in made)
    reads = [(at, at // 20_000) for at in range(0, last, 100_000_000)]
    begun = time.perf_counter()
    done = split(reads, made)
    seconds = time.perf_counter() - begun
    rise_uj = 1000 * (reads[-1][1] - reads[0][1])
    relative = abs(done.total_uj - rise_uj) / rise_uj
    note = f"{len(made)} spans, eight at a time; shares + idle + lost against the counter: {relative:.1e} relative"
    return [Row("split", "gpuops", "spans", len(made) / seconds, "1/s", note=note)]


if __name__ == "__main__":
    main()
