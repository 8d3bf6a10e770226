"""The main job in small, made once a session by the commands themselves: store, run, bundle."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

DEMO = Path(__file__).parents[1] / "gpuops" / "demo"


def run_cli(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one gpuops command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gpuops.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=300,
    )


def run_torchrun(ranks: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run training under torchrun on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launch, "-m", "gpuops.training.main", "fit", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def write_atlas(folder: Path) -> Path:
    """An atlas like the demo's, 80 x 160 points: a recipe and its two HDF5 files."""
    generator = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(80), np.arange(160)) / 4
    months = smooth[..., None] + 20 * np.sin(2 * np.pi * (np.arange(12) / 12 + smooth[..., None] / 60))
    with h5py.File(folder / "turbidity.h5", "w") as file:
        noisy = months + generator.normal(0, 1, months.shape) + 40
        file["LinkeTurbidity"] = np.clip(noisy, 20, 180).astype(np.uint8)
    with h5py.File(folder / "altitude.h5", "w") as file:
        file["Altitude"] = np.where(smooth > 25, smooth, 255).astype(np.uint8)
    recipe = yaml.safe_load((DEMO / "ingest.yaml").read_text())
    recipe["variables"]["turbidity"]["source"] = f"{folder / 'turbidity.h5'}#LinkeTurbidity"
    recipe["variables"]["altitude"]["source"] = f"{folder / 'altitude.h5'}#Altitude"
    recipe["tiling"] |= {"size": 20, "region": 2}
    recipe["url"] = str(folder / "store")
    path = folder / "ingest.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def training_arguments(store: Path, run: Path) -> list[str]:
    """The demo's config on another store, with a net small enough for a test."""
    return [
        f"--config={DEMO / 'run.yaml'}",
        f"--data.init_args.url={store}",
        f"--trainer.default_root_dir={run}",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.init_args.width=8",
        "--model.init_args.depth=1",
    ]


@dataclass(frozen=True)
class Job:
    """Folders of the small main job."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "ingest.yaml"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A store that `gpuops ingest` wrote."""
    job = Job(tmp_path_factory.mktemp("job"))
    write_atlas(job.root)
    done = run_cli("ingest", job.recipe, GPUOPS_LEDGER=str(job.ledger))
    assert done.returncode == 0, done.stderr
    return job


@pytest.fixture(scope="session")
def trained(stored: Job) -> Job:
    """... and a run that torchrun trained on two ranks."""
    os.environ["GPUOPS_LEDGER"] = str(stored.ledger)
    try:
        done = run_torchrun(2, *training_arguments(stored.store, stored.run), cwd=stored.root)
    finally:
        del os.environ["GPUOPS_LEDGER"]
    assert done.returncode == 0, done.stderr
    return stored


@pytest.fixture(scope="session")
def bundled(trained: Job) -> Job:
    """... and the bundle that `gpuops export` proved."""
    done = run_cli("export", trained.run, trained.bundle, "--name", "forecast", GPUOPS_LEDGER=str(trained.ledger))
    assert done.returncode == 0, done.stderr
    return trained
