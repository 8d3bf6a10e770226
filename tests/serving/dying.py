"""A program whose forks die at every step of a deployment, each in a copy of the same folder.

    python dying.py FOLDER WORK ACTION killed    before its n-th change of the file system, n = 0, 1, ...
    python dying.py FOLDER WORK ACTION torn      within a write, at byte n of a file
    python dying.py FOLDER WORK ACTION full      no file can be larger than n bytes, and writing says so

WORK/<n> is the copy in which the n-th died; the last one did not die. A line of JSON each is printed: {"n", "status"}.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore

from gpuops.bundle import read_bundle
from gpuops.errors import UnavailableError
from gpuops_serving.config import Options
from gpuops_serving.objects import publish_repository
from gpuops_serving.repository import deploy, publish, withdraw

REFUSED = 7
"""Exit status of a fork that was told that it cannot write."""

ACTIONS: dict[str, Callable[[Path], object]] = {
    "deploy": lambda at: deploy(at / "new", at / "models"),
    "options": lambda at: deploy(at / "old", at / "models", options=Options(threads=2)),
    "warm-up": lambda at: deploy(at / "new", at / "models", options=Options("onnxruntime")),
    "again": lambda at: publish(read_bundle(at / "new"), at / "models", "tiny", Options(), number=2),
    "withdraw": lambda at: withdraw(at / "models" / "tiny", 2),
    "upload": lambda at: publish_repository(at / "models", f"file://{at / 'store'}"),
}
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.link", "os.symlink", "os.truncate"}


def changes(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    """Whether an audit event is about to change something below a folder."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and str(path).startswith(folder)
    return event in CHANGES and any(str(argument).startswith(folder) for argument in arguments)


def die_at(step: int, folder: str) -> None:
    """Kill this process before its `step`-th change of the file system below a folder."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if changes(event, arguments, folder):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    upload = obstore.put  # compiled, so no audit event tells of it

    def put(store: object, path: str, content: object, **how: object) -> object:
        hook("os.rename", (f"{folder}/{path}",))
        return upload(store, path, content, **how)

    obstore.put = put


def limit_at(size: int, *, fatal: bool) -> None:
    """Let no file of this process grow beyond a size: it dies there, or is told."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run(action: str, how: str, number: int, at: Path) -> int:
    """Exit status of a fork; negative for the signal that ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        if how == "killed":
            die_at(number, str(at))
        else:
            limit_at(number, fatal=how == "torn")
        ACTIONS[action](at)
        code = 0
    except UnavailableError:
        code = REFUSED
    finally:
        os._exit(code)


def numbers(how: str) -> Iterator[int]:
    number = 0
    while True:
        yield number
        number = number + 1 if how == "killed" else number * 2 + 1


def main(folder: Path, work: Path, action: str, how: str) -> None:
    for number in numbers(how):
        at = work / str(number)
        shutil.copytree(folder, at)
        status = run(action, how, number, at)
        sys.stdout.write(json.dumps({"n": number, "status": status}) + "\n")
        if status == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
