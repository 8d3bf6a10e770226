"""The arguments of every command but those of serving (gpuops.cli.serving_arguments)."""

from __future__ import annotations

from typing import Any


class Commands:
    """The commands under one parser; a command's options are added to what `add` returns."""

    def __init__(self, parser: Any) -> None:
        self._commands = parser.add_subcommands(required=False, metavar="COMMAND")

    def add(self, name: str, help: str, example: str) -> Any:
        """A command with its one line of help and an example."""
        from jsonargparse import ArgumentParser

        sub = ArgumentParser(description=f"{help} Example: {example}")
        self._commands.add_subcommand(name, sub, help=help)
        return sub


def parser() -> Any:
    """The whole command line."""
    from jsonargparse import ArgumentParser

    import gpuops
    from gpuops.cli import serving_arguments

    made = ArgumentParser(
        prog="gpuops", description="Zarr in, a metered Triton endpoint out.", version=gpuops.__version__
    )
    commands = Commands(made)
    _data_and_training(commands)
    serving_arguments.add(commands)
    _report(commands)
    return made


def flag(sub: Any, name: str, help: str) -> None:
    """An option that is there or not."""
    sub.add_argument(name, action="store_true", help=help)


def ledger(sub: Any) -> None:
    """Where the command tells what it did."""
    sub.add_argument("--ledger", help="ledger that is told of it ($GPUOPS_LEDGER, else ledger.sqlite)")


def _derived(sub: Any) -> None:
    sub.add_argument("--carbon", type=float, metavar="G", help="your grid's g CO2e per kWh: shown as derived")
    sub.add_argument("--price", type=float, metavar="X", help="your price per kWh: shown as derived")


def _data_and_training(commands: Commands) -> None:
    sub = commands.add("demo", "The main job on real data: ingest, train, export, serve, infer, report.", "gpuops demo")
    sub.add_argument("--out", default="out/demo", help="folder that everything is written to")
    sub.add_argument("--ranks", type=int, help="training processes; one a GPU, 2 without one, if left out")
    sub.add_argument("--epochs", type=int, default=3, help="epochs of training")
    sub.add_argument("--tritonserver", help="path of the server's binary, if it is not found by itself")
    sub.add_argument(
        "--recipe", metavar="DIR", help="only copy ingest.yaml, run.yaml and the model there, to start from"
    )

    sub = commands.add(
        "doctor", "What this machine, or a store, can do, and every slow path it would take.", "gpuops doctor"
    )
    sub.add_argument("url", nargs="?", help="Zarr group or Icechunk repository")
    flag(sub, "--json", "print JSON")

    sub = commands.add(
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

    sub = commands.add(
        "inspect",
        "Variables, layout, snapshots, identity, quality, statistics, and what a re-ingest would gain.",
        "gpuops inspect out/linke",
    )
    sub.add_argument("url", help="Zarr group or Icechunk repository")
    sub.add_argument("--snapshot", help="Icechunk snapshot id, tag, branch or ISO time; the newest if left out")
    flag(sub, "--json", "print JSON")

    commands.add(
        "train",
        "Train on one process; what follows goes to LightningCLI's `fit` unread.",
        "gpuops train --config run.yaml. "
        "Several processes: torchrun --nproc-per-node 8 -m gpuops.training.main fit --config run.yaml",
    )

    sub = commands.add(
        "energy",
        "Joules, seconds, watts and utilisation of any command and its children, by GPU; the command's exit code.",
        "gpuops energy -- python train.py. Text goes to stderr; what nothing counts is null, and says why.",
    )
    flag(sub, "--json", "print JSON, alone on stdout; what the command prints there goes to stderr")
    sub.add_argument("--out", metavar="FILE", help="write JSON there, and leave the command's output as it is")
    _derived(sub)


def _report(commands: Commands) -> None:
    sub = commands.add(
        "report", "One self-contained HTML page of a run, with the plots.", "gpuops report out/run --bundle out/bundle"
    )
    sub.add_argument("run", help="run directory")
    sub.add_argument("--bundle", help="its bundle, for the maps and the parity table")
    sub.add_argument(
        "--infer", nargs="*", default=[], metavar="FILE", help="JSON of `gpuops infer --json`, for the latencies"
    )
    sub.add_argument("--out", help="file to write; report.html in the run directory if left out")
    _derived(sub)
