"""Patches of two aligned stores through the whole job: trained, exported, deployed, served, reported."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from gpuops.bundle import read_bundle
from gpuops.export.formats import load_bundle
from gpuops_serving.server import TritonServer
from tests.conftest import run_cli

MODEL = '''
import torch
from lightning.pytorch import LightningModule


class Rain(LightningModule):
    """Rain on a patch, from the weather on it and around it."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(2, 1, 5)

    def forward(self, x):
        return {"y": self.net(x)}

    def training_step(self, batch, index):
        return torch.nn.functional.mse_loss(self(**batch["inputs"])["y"], batch["targets"]["y"])

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)
'''
RUN = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val_loss"}},
        ],
    },
    "model": {"class_path": "rain.Rain"},
    "data": {
        "class_path": "gpuops.ZarrDataModule",
        "init_args": {
            "global_batch": 4,
            "inputs": {"x": [{"variable": "weather/t"}, {"variable": "weather/height"}]},
            "targets": {"y": [{"variable": "radar/rain"}]},
            "patch": {"size": {"y": 6, "x": 8}, "halo": {"y": 2, "x": 2}},
            "holdout": {"start": "2020-01-01T06"},
        },
    },
}


def write(folder: Path) -> dict[str, str]:
    """Weather every hour with a static height, and a radar every two hours: 10 x 16 points, 4 patches a record."""
    generator = np.random.default_rng(0)
    hours = np.datetime64("2020-01-01", "ns") + np.arange(12) * np.timedelta64(1, "h")
    weather = generator.normal(280, 5, (12, 10, 16)).astype(np.float32)
    height = generator.normal(0, 1, (10, 16)).astype(np.float32)
    dims = ("time", "y", "x")
    datasets = {
        "weather": xr.Dataset({"t": (dims, weather), "height": (dims[1:], height)}, {"time": hours}),
        "radar": xr.Dataset({"rain": (dims, weather[::2] * height)}, {"time": hours[::2]}),
    }
    for name, dataset in datasets.items():
        encoding = {v: {"chunks": (1, 10, 16)} for v, array in dataset.data_vars.items() if array.dims == dims}
        dataset.to_zarr(folder / name, zarr_format=3, consolidated=False, encoding=encoding)
    return {name: str(folder / name) for name in datasets}


@pytest.mark.slow
def test_patches_of_aligned_stores_are_served(tmp_path: Path) -> None:
    urls = write(tmp_path)
    (tmp_path / "rain.py").write_text(MODEL)
    RUN["data"]["init_args"]["url"] = urls  # type: ignore[index]
    RUN["trainer"]["default_root_dir"] = str(tmp_path / "run")  # type: ignore[index]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    ledger = {"GPUOPS_LEDGER": str(tmp_path / "ledger.sqlite")}

    def gpuops(*arguments: object) -> str:
        done = run_cli(*map(str, arguments), cwd=tmp_path, **ledger)
        assert done.returncode == 0, done.stderr
        return done.stdout

    gpuops("train", "--config", "run.yaml")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["url"] == urls
    assert record["data"]["align"] == "time"
    gpuops("export", "run", "bundle", "--name", "rain")
    gpuops("verify", "bundle")
    inputs = {spec.name: spec.shape for spec in read_bundle(tmp_path / "bundle").signature.inputs}
    assert inputs == {"weather/t": (1, 10, 12), "weather/height": (1, 10, 12)}
    allowed = read_bundle(tmp_path / "bundle").tolerance
    gpuops("deploy", "bundle", "repository")
    stores = [f"--from={name}={url}" for name, url in urls.items()]
    with TritonServer(tmp_path / "repository", log=tmp_path / "log") as server:
        for url in (server.http_url, server.grpc_url):
            asked = ("infer", "rain", *stores, "--server", url, "--check", "bundle", "--requests", 2, "--json")
            assert json.loads(gpuops(*asked))["max_abs_diff"] <= allowed
    golden = read_bundle(tmp_path / "bundle").golden()
    answers = load_bundle(tmp_path / "bundle")(golden.inputs)
    assert golden.max_abs_diff(answers) <= allowed
    gpuops("report", "run", "--bundle", "bundle", "--out", "report.html")
    assert re.search(r"over held-out record 3; RMSE", (tmp_path / "report.html").read_text())
