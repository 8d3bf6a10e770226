"""`gpuops energy -- COMMAND`: like perf stat, in joules."""

from __future__ import annotations

import contextlib
import json as json_module
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpuops.energy.derived import derive
from gpuops.energy.meter import Meter
from gpuops.energy.nvml import open_gpus
from gpuops.energy.rapl import open_host
from gpuops.errors import InputError

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126  # as a shell says


def energy(
    command: Sequence[str] | None, json: bool, out: str | None, carbon: float | None, price: float | None
) -> None:
    """Run a command and tell what it drew; exits as the command did."""
    if not command:
        raise InputError("which command? gpuops energy [--json | --out FILE] -- COMMAND ...")
    derive(None, carbon=carbon, price=price)  # refuse wrong figures before the command runs
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise InputError(f"{Path(out).parent} is not a directory: make it first, so that no measurement is lost")
    process_ids: set[int] = set()
    gpus = Meter(found=open_gpus(own=lambda: process_ids | _descendants(process_ids)))
    host = Meter(found=open_host())
    try:
        begun = gpus.mark(), host.mark()
        code = _run(command, process_ids, stdout_to_stderr=json)
        ended = gpus.mark(), host.mark()
        total = gpus.between(begun[0], ended[0])
        by_host = host.by_sensor([(begun[1], ended[1])])
        told = {
            "command": list(command),
            "exit_code": code,
            **total.to_json(),
            "watts": total.watts,
            "gpus": _gpus(gpus, begun[0], ended[0]),
            "host": {
                "reason": host.between(begun[1], ended[1]).reason,
                "domains": [{"id": id, "name": host.names()[id], **r.to_json()} for id, r in by_host.items()],
            },
            "derived": derive(total.joules, carbon=carbon, price=price),
        }
    finally:
        gpus.close()
        host.close()
    document = json_module.dumps(told, indent=1)
    if out is not None:
        Path(out).write_text(document + "\n")
    if json:
        sys.stdout.write(document + "\n")
        sys.stdout.flush()
    else:
        sys.stderr.write(_text(told))
    raise SystemExit(code)


def _run(command: Sequence[str], process_ids: set[int], *, stdout_to_stderr: bool) -> int:
    """Exit code of a command, 128 and the signal if one ended it; signals to us go on to it."""
    try:
        child = subprocess.Popen(command, stdout=sys.stderr.fileno() if stdout_to_stderr else None)
    except FileNotFoundError:
        sys.stderr.write(f"gpuops: error: {command[0]}: no such command\n")
        return _NOT_FOUND
    except OSError as error:
        sys.stderr.write(f"gpuops: error: {command[0]}: not executable ({error.strerror})\n")
        return _NOT_EXECUTABLE
    process_ids.add(child.pid)
    with _forwarded(child):
        code = child.wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While the command runs, it is the one to end: we stay and tell what it drew."""
    # The terminal sends an interrupt to both of us.
    handlers: dict[signal.Signals, Any] = {signal.SIGINT: signal.SIG_IGN}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        handlers[number] = lambda number, frame: child.send_signal(number)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _descendants(roots: set[int]) -> set[int]:
    """Processes that some processes started, and theirs (from /proc)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # "pid (name) state ppid ..."; the name may hold blanks and brackets
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    grown = set(roots)
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown} - found
        found |= grown
    return found


def _gpus(meter: Meter, begun: int, ended: int) -> list[dict[str, Any]]:
    usage, names = meter.usage([(begun, ended)]), meter.names()
    return [
        {"uuid": id, "name": names[id], **reading.to_json(), "watts": reading.watts, "usage": asdict(usage[id])}
        for id, reading in meter.by_sensor([(begun, ended)]).items()
    ]


def _text(told: Mapping[str, Any]) -> str:
    """For people."""
    lines = ["", f" Energy of {shlex.join(told['command'])!r}:", ""]
    lines += [f"   {gpu['uuid']} {gpu['name']}: {_figures(gpu)}" for gpu in told["gpus"]]
    if len(told["gpus"]) != 1:
        lines.append(f"   GPUs together: {_figures(told)}")
    lines += [f"   {domain['id']} {domain['name']}: {_figures(domain)}" for domain in told["host"]["domains"]]
    if not told["host"]["domains"]:
        lines.append(f"   host: null ({told['host']['reason']})")
    if (derived := told["derived"]) is not None and derived["kwh"] is not None:
        parts = [f"{derived['kwh']:.6g} kWh"]
        parts += [f"{derived['carbon_g']:.4g} g CO2e"] if "carbon_g" in derived else []
        parts += [f"cost {derived['cost']:.4g}"] if "cost" in derived else []
        lines.append(f"   derived from your figures: {', '.join(parts)}")
    lines += ["", f"   {told['seconds']:.3f} s elapsed, exit code {told['exit_code']}", "", ""]
    return "\n".join(lines)


def _figures(told: Mapping[str, Any]) -> str:
    if told["joules"] is None:
        return f"null ({told['reason']})"
    bound = "" if told["bound_joules"] is None else f" (counter steps: +-{told['bound_joules']:.3g})"
    text = f"{told['joules']:.3f} J{bound}, {told['joules'] / told['seconds']:.1f} W mean"
    usage = told.get("usage") or {}
    if usage.get("peak_power_w") is not None:
        text += f", {usage['peak_power_w']:.0f} W peak"
    if usage.get("busy_share") is not None:
        text += f", {usage['busy_share']:.0%} busy"
    if usage.get("peak_memory_mb") is not None:
        text += f", {usage['peak_memory_mb']:.0f} MB"
    lost = f", {told['lost_s']:.2f} s lost" if told["lost_s"] else ""
    return f"{text}; {told['method']}, {told['tenancy']}{lost}"
