"""The health of a server, by its golden requests: for a container's health check and for Kubernetes' probes.

    python3 -m gpuops_serving.health /models --server http://127.0.0.1:8000 [--probe readiness|liveness]

    readiness   (the default; also for startup) fails unless every version that the repository names is served with the
                version id that it names there, and answers its golden request within tolerance
    liveness    fails only where a start is likely to mend what is wrong: the server or a model's process is dead or
                stands still, or answers wrongly what it answered rightly when it was started

So liveness passes where a restart would harm. Too many requests: each restart would lose those that wait. A repository
that names other versions than the server has: every server that reads it would be restarted in the same moment.

One line says what was found; exit code 0 or 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonclient.utils import InferenceServerException

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.probe import probe
from gpuops_serving.repository import ServedVersion, served_versions

TIMEOUT_S = 15.0
"""Longest wait for one golden answer; a probe's own timeout must be longer."""
_TURNED_AWAY = ("429", "503", "StatusCode.UNAVAILABLE", "StatusCode.RESOURCE_EXHAUSTED")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that keeps a server from being healthy."""

    reason: str
    """What is wrong, one line."""
    restart: bool
    """Whether a start is likely to mend it."""
    late: bool = False
    """Whether an answer was waited for in vain."""


def examine(repository: Path, url: str, timeout_s: float = TIMEOUT_S) -> tuple[int, list[Trouble]]:
    """Hold a server against its repository.

    Args:
        repository: Model repository that `deploy` wrote. Its signatures are not checked again: that is done before a
            server is started (gpuops_serving.command).
        url: The server's, as for `Client`.
        timeout_s: Longest wait for one answer, seconds. After one that did not come the others are not asked.

    Returns:
        Number of versions that the repository names, and what is wrong.

    Raises:
        InputError: the URL is none.
    """
    found: list[Trouble] = []
    with Client(url, timeout_s) as client:
        try:
            before = _executions(client)
        except GpuopsError as error:  # one that refuses to tell lives
            return 0, [Trouble(str(error), restart=isinstance(error, UnavailableError))]
        try:
            wanted = served_versions(repository, keys=())
        except (GpuopsError, OSError) as error:
            return 0, [Trouble(str(error), restart=False)]
        for served in wanted:
            if (trouble := _ask(client, served, before)) is not None:
                found.append(trouble)
                if trouble.late:
                    break
    return len(wanted), found


def _ask(client: Client, served: ServedVersion, before: dict[tuple[str, str], int]) -> Trouble | None:
    """What is wrong with one version."""
    name, number = served.name, str(served.version)
    label = f"version {number} of {name!r}"
    try:
        if client.version_id(name, number) != served.version_id:
            return Trouble(f"{label} has another version id than the repository names: start again", restart=False)
    except InputError as error:
        return Trouble(f"{label} is named in the repository and not served: start again ({error})", restart=False)
    except GpuopsError as error:
        return Trouble(f"{label}: {error}", restart=False)
    try:
        probe(client, name, served.golden, served.tolerance, version=number)
    except (InputError, IntegrityError) as error:  # refused or wrong, and it was neither when the server was started
        return Trouble(f"{label}: {error}", restart=True)
    except UnavailableError as error:
        cause = error.__cause__
        status = str(cause.status()) if isinstance(cause, InferenceServerException) else ""
        if not isinstance(cause, TimeoutError) and status != "StatusCode.DEADLINE_EXCEEDED":
            return Trouble(f"{label}: {error}", restart=status not in _TURNED_AWAY)
        stands = _stands_still(client, served, before)
        state = "ran nothing meanwhile" if stands else "is busy with other requests"
        return Trouble(f"{label} did not answer its golden request in time and {state}", restart=stands, late=True)
    return None


def _stands_still(client: Client, served: ServedVersion, before: dict[tuple[str, str], int]) -> bool:
    """Whether a version ran nothing while its golden request waited."""
    key = (served.name, str(served.version))
    try:
        return _executions(client).get(key) == before.get(key)
    except GpuopsError:
        return True


def _executions(client: Client) -> dict[tuple[str, str], int]:
    """Batches that were run, by model and version."""
    return {(str(e["name"]), str(e["version"])): int(e.get("execution_count", 0)) for e in client.statistics()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see above."""
    parser = argparse.ArgumentParser(
        prog="python3 -m gpuops_serving.health", description="Golden requests for every version that is to be served."
    )
    parser.add_argument("repository", type=Path, help="model repository, as the server reads it")
    parser.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    parser.add_argument("--probe", choices=("readiness", "liveness"), default="readiness", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        count, found = examine(options.repository, options.server, options.timeout)
    except InputError as error:  # no URL
        count, found = 0, [Trouble(str(error), restart=True)]
    grave = found if options.probe == "readiness" else [trouble for trouble in found if trouble.restart]
    if grave:
        more = f" (and {len(grave) - 1} more)" if len(grave) > 1 else ""
        sys.stdout.write(f"unhealthy: {grave[0].reason}{more}\n")
        return 1
    if found:
        sys.stdout.write(f"alive, but not ready: {found[0].reason}\n")
    else:
        sys.stdout.write(f"healthy: golden requests of {count} versions answered rightly\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
