"""The command line: one subcommand a verb; a command imports what it needs and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from gpuops.cli import connection
from gpuops.cli.arguments import parser
from gpuops.errors import GpuopsError, InputError, UnavailableError

_EXTRAS = {
    "zarr": "data", "icechunk": "data", "dask": "data", "xarray": "data", "numcodecs": "data", "h5py": "data",
    "h5netcdf": "data", "scipy": "data", "obstore": "data", "distributed": "data", "zstandard": "data",
    "torch": "train", "lightning": "train", "triton": "train", "onnx": "onnx", "onnxruntime": "onnx",
    "matplotlib": "report", "pvlib": "demo", "cryptography": "sign",
}  # fmt: skip
"""Extra that brings each package which a command may lack."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; our own errors are one line on stderr and an exit code (gpuops.errors)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if odd := next((text for text in given if not text.isprintable() and not _encodable(text)), None):
        _fail(InputError(f"{odd!r} is not UTF-8, as this would have to be written down: name it otherwise"))
    signal.signal(signal.SIGTERM, _terminated)  # so that half-written directories are removed
    if given[:1] == ["train"] and not {"-h", "--help"} & set(given[1:2]):
        _train(given[1:])
    command = None
    if given[:1] == ["energy"] and "--" in given:
        given, command = given[: given.index("--")], given[given.index("--") + 1 :]
    parsed = parser().parse_args(given)
    if parsed.subcommand is None:
        parser().print_help()
        raise SystemExit(2)
    options = vars(parsed[parsed.subcommand])
    if parsed.subcommand == "energy":
        options["command"] = command
    if (path := options.pop("ledger", None)) is not None:
        os.environ["GPUOPS_LEDGER"] = path
    try:
        _run(parsed.subcommand, options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output (`| head`) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered still goes there at exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except GpuopsError as error:
        _fail(error)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _fail(UnavailableError("what was said could not be written: the disk behind the output is full"))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        _fail(UnavailableError(f"{package} is not installed: pip install 'gpuops[{_EXTRAS[package]}]'"))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


_HOMES = {
    "export": "bundles", "verify": "bundles", "keygen": "bundles", "sign": "bundles",
    "deploy": "serving", "serve": "serving", "publish": "stores", "fetch": "stores",
    "rollout": "rollouts", "rollback": "rollouts", "compare": "rollouts",
}  # fmt: skip
"""Module of each command that is not in one of its own name."""


def _run(command: str, options: dict[str, Any]) -> None:
    """Import the command's module and call it."""
    import importlib

    module = importlib.import_module(f"gpuops.cli.{_HOMES.get(command, command)}")
    if set(connection.OPTIONS) <= options.keys():
        options["connection"] = connection.Connection.taken_from(options)
    getattr(module, command)(**options)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _train(arguments: list[str]) -> None:
    """Become LightningCLI's `fit`, which reads the arguments itself."""
    os.execv(sys.executable, [sys.executable, "-m", "gpuops.training.main", "fit", *arguments])


def _fail(error: GpuopsError) -> None:
    sys.stderr.write(f"gpuops: error: {error}\n")
    raise SystemExit(error.exit_code) from None


def _terminated(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise SystemExit(128 + number)
