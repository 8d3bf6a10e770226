"""`gpuops demo`: the commands a user would type, one after another, and a summary of what they said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpuops.atomic import new_directory
from gpuops.bundle import read_bundle
from gpuops.errors import GpuopsError, IntegrityError, UnavailableError
from gpuops.lineage.ledger import Ledger
from gpuops.lineage.version import RUN_FILE

RECIPE = ("ingest.yaml", "run.yaml", "forecast.py", "baselines.py")
"""Files of the recipe, beside this one."""
SERVE_TIMEOUT_S = 180


def copy_recipe(destination: Path) -> list[Path]:
    """Copy the recipe to a folder, to start from; files that are there already are kept and InputError says so."""
    with new_directory(destination, overwrite=False) as directory:
        for name in RECIPE:
            shutil.copyfile(Path(__file__).with_name(name), directory / name)
    return [destination / name for name in RECIPE]


def run_demo(
    out: Path, *, ranks: int | None, epochs: int, tritonserver: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Ingest, train, export, verify, deploy, serve, infer and report; returns what `summary.json` holds.

    Args:
        out: folder that everything is written to; what an earlier demo left there is replaced.
        ranks: training processes; one a GPU, 2 without one, if None.
        epochs: epochs of training.
        tritonserver: path of the server's binary, or None.
        say: told each command before it runs.

    Raises:
        GpuopsError: a stage failed; its own message went to stderr.
        IntegrityError: the forecast does not beat both baselines.
    """
    ranks = ranks or _default_ranks()
    job = _Job(out, say)
    for left in ("run", "repository", "report.html", "summary.json", "ledger.sqlite"):
        _remove(out / left)
    recipe = Path(__file__).parent
    store, run, bundle, repository = (str(out / name) for name in ("store", "run", "bundle", "repository"))
    with job.stage("ingest"):
        data = job.json("ingest", str(recipe / "ingest.yaml"), "--url", store, "--overwrite", "--json")
    with job.stage("train"):
        overrides = {"data.init_args.url": store, "trainer.default_root_dir": run, "trainer.max_epochs": epochs}
        job.torchrun(ranks, "--config", str(recipe / "run.yaml"), *(f"--{k}={v}" for k, v in overrides.items()))
    with job.stage("export"):
        job.run("export", run, bundle, "--name", "forecast", "--overwrite")
    with job.stage("verify"):
        job.run("verify", bundle)
    with job.stage("deploy"):
        job.run("deploy", bundle, repository)
    served = {}
    with job.stage("serve"), job.server(repository, tritonserver) as urls:
        for protocol, url in urls.items():
            asked = ("infer", "forecast", "--from", store, "--server", url, "--check", bundle, "--json")
            served[protocol] = job.json(*asked)
            (out / f"{protocol}.json").write_text(json.dumps(served[protocol], indent=1) + "\n")
    with job.stage("report"):
        answers = [str(out / f"{protocol}.json") for protocol in served]
        job.run("report", run, "--bundle", bundle, "--infer", *answers, "--out", str(out / "report.html"))
    with Ledger(out / "ledger.sqlite") as ledger:
        events, head = ledger.verify(), ledger.head()
    summary = _summary(out, data, served, job.seconds)
    summary["ledger"] = {"events": events, "head": head}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _check_skill(summary["train"])
    return summary


class _Job:
    """Runs commands in processes of their own, as a user would, and times them."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        self._environment = {**os.environ, "GPUOPS_LEDGER": str(out / "ledger.sqlite")}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)

    def run(self, *arguments: str) -> None:
        self._call([sys.executable, "-m", "gpuops.cli", *arguments], "gpuops", arguments)

    def json(self, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "gpuops.cli", *arguments]
        document: dict[str, Any] = json.loads(self._call(command, "gpuops", arguments, stdout=subprocess.PIPE))
        return document

    def torchrun(self, ranks: int, *arguments: str) -> None:
        train = ["-m", "gpuops.training.main", "fit", *arguments]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *train]
        self._environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
        self._call(command, f"torchrun --nproc-per-node {ranks}", train)

    @contextmanager
    def server(self, repository: str, tritonserver: str | None) -> Iterator[dict[str, str]]:
        """A served repository: URL by protocol while the block runs."""
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        arguments = ["serve", repository, *ports, "--log", str(self._out / "tritonserver.log")]
        arguments += [] if tritonserver is None else ["--tritonserver", tritonserver]
        self._tell("gpuops", arguments)
        process = subprocess.Popen(
            [sys.executable, "-m", "gpuops.cli", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(3)]
            if not all(lines):
                raise UnavailableError("the server did not start: its message is above")
            yield {"http": lines[0], "grpc": lines[1]}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(SERVE_TIMEOUT_S)

    def _call(self, command: Sequence[str], shown: str, arguments: Sequence[str], stdout: int | None = None) -> str:
        self._tell(shown, arguments)
        done = subprocess.run(command, env=self._environment, stdout=stdout, text=True, check=False)
        if done.returncode:
            raise GpuopsError(f"`{shown} {arguments[0]}` failed with exit code {done.returncode}: its message is above")
        return done.stdout or ""

    def _tell(self, shown: str, arguments: Sequence[str]) -> None:
        self._say(f"\n$ {shown} {' '.join(arguments)}")


def _summary(
    out: Path, data: Mapping[str, Any], served: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    run = json.loads((out / "run" / RUN_FILE).read_text())
    bundle = read_bundle(out / "bundle")
    metrics = run["metrics"]
    http = served["http"]
    answered = {p: {k: served[p][k] for k in ("max_abs_diff", "p50_ms", "p99_ms")} for p in served}
    energy = {key: run["energy"][key] for key in ("joules", "method", "reason")}
    rmse = {name: metrics[name] for name in ("val_rmse", "persistence_rmse", "extrapolation_rmse", "ar6_rmse")}
    return {
        "data": {**data, "samples": data["records"] * 12},
        "train": {
            "run_id": run["run_id"],
            "world_size": run["world_size"],
            "epochs": run["epochs"],
            "samples_seen": run["samples_seen"],
            **rmse,
            "energy": energy,
        },
        "bundle": {
            "version_id": bundle.version_id,
            "formats": {f: {"max_abs_diff": p["max_abs_diff"]} for f, p in bundle.manifest["parity"].items()},
            "served_batches": bundle.manifest["served_batches"],
        },
        "serve": {"server_version": http["server_version"], **answered, "energy": http["energy"]},
        "report": str(out / "report.html"),
        "seconds": dict(seconds),
    }


def _check_skill(train: Mapping[str, Any]) -> None:
    for rival in ("persistence_rmse", "extrapolation_rmse"):
        if not train["val_rmse"] < train[rival]:
            raise IntegrityError(f"held-out error {train['val_rmse']:.3f} does not beat {rival} {train[rival]:.3f}")


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
