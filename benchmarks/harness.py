"""What every benchmark shares: the machine's description, interleaved timing, the JSON shape and the printed table.

A benchmark is a script `bench_<thing>.py` in this folder; scripts run with their own folder on `sys.path`, so they
import this file as `harness`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value. Ratios are value / other value: above 1 is good for a rate, bad for a cost."""

    case: str
    """What was done."""
    subject: str
    """"gpuops", "limit" or the peer's name."""
    metric: str
    """What was measured."""
    value: float
    """The median, or a count."""
    unit: str
    """Unit of `value`."""
    of_limit: float | None = None
    """value / the limit's value in the same run."""
    vs: Mapping[str, float] = field(default_factory=dict)
    """value / each peer's value in the same run."""
    note: str = ""
    """What a reader must know to judge the value."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one subject took, round by round."""

    wall_s: list[float]
    """Elapsed seconds."""
    cpu_s: list[float]
    """Processor seconds of this process, all threads."""


def interleave(
    subjects: Mapping[str, Callable[[int], None]], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, Timing]:
    """Time every subject once a round, each called with the round's number, after an untimed `before`.

    The machine's slow moments then fall on all subjects alike. Each round begins with the next subject, so that none
    always runs behind the same one.
    """
    timings = {name: Timing([], []) for name in subjects}
    names = list(subjects)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before()
            wall, cpu = time.perf_counter(), time.process_time()
            subjects[name](number)
            timings[name].cpu_s.append(time.process_time() - cpu)
            timings[name].wall_s.append(time.perf_counter() - wall)
    return timings


def spread(values: Iterable[float]) -> str:
    """The middle half of repeated values, for a row's note."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"middle half {low:.4g} to {high:.4g}"


def gpu_name() -> str | None:
    """Name of the first GPU as its driver says it; None on a machine without one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def device() -> str:
    """Name of this machine's folder under results/: its GPU's name, else `cpu-<usable cores>`."""
    name = gpu_name()
    return f"cpu-{cores()}" if name is None else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and GPU; nothing that names the machine itself."""
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    system = platform.freedesktop_os_release()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "os": system.get("PRETTY_NAME", "Linux"),
        "kernel": platform.release(),
        "gpu": gpu_name(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions, Python's first; None for a package that is not here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def arguments(description: str, thing: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds and less data: to see that it works, not to cite"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=RESULTS / device() / f"{thing}.json",
        help=f"JSON to write (default: benchmarks/results/{device()}/{thing}.json)",
    )
    return parser


def report(out: Path, *, packages: Iterable[str], limits: Mapping[str, tuple[float, str]], rows: Iterable[Row]) -> None:
    """Print the table and write the JSON: losing rows stay in both."""
    rows = list(rows)
    script = Path(sys.argv[0])
    document = {
        "bench": script.stem.removeprefix("bench_"),
        "command": shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(packages),
        "limits": {name: {"value": _rounded(value), "unit": unit} for name, (value, unit) in limits.items()},
        "rows": [_rounded(asdict(row)) for row in rows],
    }
    _print(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {out}")


def _print(rows: list[Row]) -> None:
    table = Table(*("case", "subject", "metric", "value", "unit", "of limit", "against peers"))
    before = ""
    for row in rows:
        if row.case != before:
            table.add_section()
        ratios = "  ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row.vs.items())
        share = "" if row.of_limit is None else f"{row.of_limit:.2f}"
        table.add_row(
            row.case if row.case != before else "", row.subject, row.metric, f"{row.value:.4g}", row.unit, share, ratios
        )
        before = row.case
    # Into a file or a pipe the table must not be cut at 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _rounded(value: Any) -> Any:
    """Floats to five significant digits, in any nesting."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
