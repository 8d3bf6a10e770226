"""The command line: one subcommand a verb; a command imports what it needs and nothing else."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from gpuops.errors import GpuopsError, UnavailableError

_EXTRAS = {
    "zarr": "data", "icechunk": "data", "dask": "data", "xarray": "data", "numcodecs": "data", "h5py": "data",
    "h5netcdf": "data", "scipy": "data", "obstore": "data", "distributed": "data", "zstandard": "data",
    "torch": "train", "lightning": "train", "triton": "train", "onnx": "onnx", "onnxruntime": "onnx",
    "matplotlib": "report", "pvlib": "demo",
}  # fmt: skip
"""Extra that brings each package which a command may lack."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; our own errors are one line on stderr and an exit code (gpuops.errors)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminated)  # so that half-written directories are removed
    if given[:1] == ["train"] and not {"-h", "--help"} & set(given[1:2]):
        _train(given[1:])
    command = None
    if given[:1] == ["energy"] and "--" in given:
        given, command = given[: given.index("--")], given[given.index("--") + 1 :]
    parsed = _parser().parse_args(given)
    if parsed.subcommand is None:
        _parser().print_help()
        raise SystemExit(2)
    options = vars(parsed[parsed.subcommand])
    if parsed.subcommand == "energy":
        options["command"] = command
    if (path := options.pop("ledger", None)) is not None:
        os.environ["GPUOPS_LEDGER"] = path
    try:
        _run(parsed.subcommand, options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output (`| head`) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered still goes there at exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except GpuopsError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        _fail(UnavailableError(f"{package} is not installed: pip install 'gpuops[{_EXTRAS[package]}]'"))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(command: str, options: dict[str, Any]) -> None:
    """Import the command's module and call it."""
    import importlib

    home = {"deploy": "serving", "serve": "serving", "export": "bundles", "verify": "bundles"}.get(command, command)
    module = importlib.import_module(f"gpuops.cli.{home}")
    getattr(module, command)(**options)


def _train(arguments: list[str]) -> None:
    """Become LightningCLI's `fit`, which reads the arguments itself."""
    os.execv(sys.executable, [sys.executable, "-m", "gpuops.training.main", "fit", *arguments])


def _fail(error: GpuopsError) -> None:
    sys.stderr.write(f"gpuops: error: {error}\n")
    raise SystemExit(error.exit_code) from None


def _terminated(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise SystemExit(128 + number)


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    import gpuops

    parser = ArgumentParser(
        prog="gpuops", description="Zarr in, a metered Triton endpoint out.", version=gpuops.__version__
    )
    commands = parser.add_subcommands(required=False, metavar="COMMAND")

    def command(name: str, help: str, example: str) -> Any:
        sub = ArgumentParser(description=f"{help} Example: {example}")
        commands.add_subcommand(name, sub, help=help)
        return sub

    def flag(sub: Any, name: str, help: str) -> None:
        sub.add_argument(name, action="store_true", help=help)

    def ledger(sub: Any) -> None:
        sub.add_argument("--ledger", help="ledger that is told of it ($GPUOPS_LEDGER, else ledger.sqlite)")

    def derived(sub: Any) -> None:
        sub.add_argument("--carbon", type=float, metavar="G", help="your grid's g CO2e per kWh: shown as derived")
        sub.add_argument("--price", type=float, metavar="X", help="your price per kWh: shown as derived")

    sub = command("demo", "The main job on real data: ingest, train, export, serve, infer, report.", "gpuops demo")
    sub.add_argument("--out", default="out/demo", help="folder that everything is written to")
    sub.add_argument("--ranks", type=int, help="training processes; one a GPU, 2 without one, if left out")
    sub.add_argument("--epochs", type=int, default=3, help="epochs of training")
    sub.add_argument("--tritonserver", help="path of the server's binary, if it is not found by itself")
    sub.add_argument(
        "--recipe", metavar="DIR", help="only copy ingest.yaml, run.yaml and the model there, to start from"
    )

    sub = command(
        "doctor", "What this machine, or a store, can do, and every slow path it would take.", "gpuops doctor"
    )
    sub.add_argument("url", nargs="?", help="Zarr group or Icechunk repository")
    flag(sub, "--json", "print JSON")

    sub = command(
        "ingest", "HDF5, NetCDF or Zarr into a sharded, checked, committed store.", "gpuops ingest ingest.yaml"
    )
    sub.add_argument(
        "recipe",
        help="YAML recipe (`gpuops demo --recipe DIR` writes one to start from), or FILE[#DATASET] or a store, "
        "whose variables are taken as they are",
    )
    sub.add_argument("--url", help="where to write, in place of the recipe's url: a directory or s3://BUCKET/PREFIX")
    flag(sub, "--append", "add the records behind those of the store that is there")
    sub.add_argument("--scheduler", default="threads", help="threads, or the address of a Dask cluster")
    sub.add_argument("--tolerance", type=float, help="pack floats as integers within this error, physical units")
    sub.add_argument("--codec", help="zstd, blosc-lz4, blosc-zstd or none, in place of the recipe's")
    sub.add_argument("--format", help="icechunk or zarr, in place of the recipe's")
    flag(sub, "--overwrite", "replace the store that is there, once the new one is complete")
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = command(
        "inspect",
        "Variables, layout, snapshots, identity, quality, statistics, and what a re-ingest would gain.",
        "gpuops inspect out/linke",
    )
    sub.add_argument("url", help="Zarr group or Icechunk repository")
    sub.add_argument("--snapshot", help="Icechunk snapshot id, tag, branch or ISO time; the newest if left out")
    flag(sub, "--json", "print JSON")

    command(
        "train",
        "Train on one process; what follows goes to LightningCLI's `fit` unread.",
        "gpuops train --config run.yaml. "
        "Several processes: torchrun --nproc-per-node 8 -m gpuops.training.main fit --config run.yaml",
    )

    sub = command(
        "energy",
        "Joules, seconds, watts and utilisation of any command and its children, by GPU; the command's exit code.",
        "gpuops energy -- python train.py. Text goes to stderr; what nothing counts is null, and says why.",
    )
    flag(sub, "--json", "print JSON, alone on stdout; what the command prints there goes to stderr")
    sub.add_argument("--out", metavar="FILE", help="write JSON there, and leave the command's output as it is")
    derived(sub)

    sub = command("export", "A run's best weights as a proved bundle.", "gpuops export out/run out/bundle")
    sub.add_argument("run", help="run directory (trainer.default_root_dir)")
    sub.add_argument("bundle", help="directory to write")
    sub.add_argument("--formats", default="pt2,onnx", help="formats, separated by commas")
    sub.add_argument("--name", help="name to serve it under; the model class's if left out")
    sub.add_argument("--max-batch", type=int, default=32, help="largest batch served")
    sub.add_argument("--tolerance", type=float, help="largest difference allowed, physical units; rounding if left out")
    flag(sub, "--overwrite", "replace the bundle that is there, once the new one is proved")
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = command(
        "verify", "Prove a bundle again: bytes, identity, answers at every batch size.", "gpuops verify out/bundle"
    )
    sub.add_argument("bundle", help="bundle directory")
    flag(sub, "--json", "print JSON")

    sub = command("deploy", "Publish a bundle in a Triton model repository.", "gpuops deploy out/bundle out/repository")
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("repository", help="model repository; made if it is not there")
    sub.add_argument("--name", help="model name; the bundle's if left out")
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = command("serve", "Serve a repository on loopback until interrupted.", "gpuops serve out/repository")
    sub.add_argument("repository", help="model repository")
    for protocol, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        sub.add_argument(f"--{protocol}-port", type=int, default=port, help=f"{protocol} port; 0 takes a free one")
    sub.add_argument("--tritonserver", help="path of the server's binary, if it is not found by itself")
    sub.add_argument("--log", help="file for the server's log")
    ledger(sub)

    sub = command(
        "infer",
        "Send raw samples from a store to a served model.",
        "gpuops infer forecast --from out/linke --server grpc://127.0.0.1:8001",
    )
    sub.add_argument("model", help="model name")
    sub.add_argument(
        "--from",
        dest="source",
        metavar="[NAME=]URL",
        action="append",
        required=True,
        help="store that the samples are cut from; NAME=URL for each of several that the model was trained on",
    )
    sub.add_argument("--align", metavar="DIM", help="dimension that several stores are aligned on")
    sub.add_argument("--server", default="http://127.0.0.1:8000", help="http://HOST:PORT or grpc://HOST:PORT")
    sub.add_argument(
        "--samples", type=int, help="send this many, evenly spaced; the bundle's golden samples if left out"
    )
    sub.add_argument("--requests", type=int, default=100, help="timed requests of one sample each")
    sub.add_argument("--check", metavar="BUNDLE", help="compare the golden samples' answers with the bundle's")
    sub.add_argument("--out", metavar="FILE", help="write the answers as .npz")
    flag(sub, "--json", "print JSON")

    sub = command(
        "report", "One self-contained HTML page of a run, with the plots.", "gpuops report out/run --bundle out/bundle"
    )
    sub.add_argument("run", help="run directory")
    sub.add_argument("--bundle", help="its bundle, for the maps and the parity table")
    sub.add_argument(
        "--infer", nargs="*", default=[], metavar="FILE", help="JSON of `gpuops infer --json`, for the latencies"
    )
    sub.add_argument("--out", help="file to write; report.html in the run directory if left out")
    derived(sub)
    return parser
