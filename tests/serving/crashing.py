"""Rollouts in processes that are killed at a chosen moment; run as a program by test_rollout_kills.py.

Imports take a second and kills are many, so one process imports everything and forks one child for each rollout. A
moment is the one before a change of the repository (rename, removal), before and after an order to the server (load,
unload), or before and after an event in the ledger. Each line of input is a JSON object with the arguments and `kill`,
the number of the moment to die at (0: live); each line of output says how the child ended and how many moments it saw.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faulty import sabotage

from gpuops.lineage.ledger import Ledger
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits
from gpuops_serving.rollout import rollout


class Moments:
    """Counts moments, and ends the process at one of them as a power cut would."""

    def __init__(self, kill: int, repository: str) -> None:
        self.kill, self.repository, self.seen = kill, repository, 0
        sys.addaudithook(self.hear)

    def pass_one(self) -> None:
        self.seen += 1
        if self.seen == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if changes and self.repository in str(arguments[0]):  # what rmtree removes one by one has no folder in its name
            self.pass_one()

    def around(self, owner: type, name: str) -> None:
        done: Callable[..., Any] = getattr(owner, name)

        def told(*arguments: Any, **options: Any) -> Any:
            self.pass_one()
            found = done(*arguments, **options)
            self.pass_one()
            return found

        setattr(owner, name, told)


def child(asked: dict[str, Any]) -> int:
    moments = Moments(asked["kill"], str(Path(asked["repository"]).parent))
    for owner, name in ((Client, "load"), (Client, "unload"), (Ledger, "append")):
        moments.around(owner, name)
    client = Client(asked["url"], access=asked["access"])
    if asked["sabotage"]:
        load, folder = client.load, Path(asked["repository"])

        def broken(model: str) -> None:
            sabotage(folder / model, asked["sabotage"])
            load(model)

        client.load = broken  # type: ignore[method-assign]
    with client, Ledger(asked["ledger"]) as ledger:
        limits = Limits(p50=1e3, p99=1e3, distance=asked["distance"])
        rollout(asked["bundle"], asked["repository"], client, ledger=ledger, name=asked["name"], count=4, limits=limits)
    return moments.seen


def main() -> None:
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            seen = child(json.loads(line))
            os.write(writing, str(seen).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as told:
            seen_text = told.read()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(json.dumps({"code": os.waitstatus_to_exitcode(status), "seen": int(seen_text or 0)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
