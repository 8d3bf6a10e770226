"""A small served graph with everything in it that export must get right, and bundles of it; no run, no store."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpuops.bundle import FORMAT_FILES, GOLDEN, PATTERNS, Golden, write_manifest
from gpuops.export import aoti
from gpuops.export.formats import write
from gpuops.export.graph import ServedGraph, one_thread
from gpuops.export.patterns import answered, with_missing
from gpuops.export.quantize import quantize
from gpuops.lineage.version import version_id
from gpuops.preprocess.geometry import Resize
from gpuops.preprocess.steps import Clip, Fill, Normalize, Part, Preprocess, Unpack
from gpuops.spec import Signature, TensorSpec

MAX_BATCH = 5
RAIN = (Unpack(0.1, 5.0, -999), Fill(0.0), Clip(0.0, 40.0), Normalize((8.0, 9.0), (2.0, 3.0)))
HEIGHT = (Unpack(28.0, -450.0), Normalize((100.0,), (500.0,)))
INPUTS = Preprocess({"x": (Part("rain", 2, "int16", RAIN), Part("height", 1, "int16", HEIGHT))}, (Resize((8, 8)),))
TARGETS = Preprocess({"y": (Part("next", 1, "float32", (Normalize((8.0,), (2.0,)),)),)})
SIGNATURE = Signature(
    inputs=(TensorSpec("rain", "int16", (2, 6, 7), "mm", 0.1, 5.0, -999), TensorSpec("height", "int16", (1, 6, 7))),
    outputs=(TensorSpec("y", "float32", (1, 8, 8), "mm"),),
    max_batch=MAX_BATCH,
)


class Net(nn.Module):
    """A residual path round a convolution, a linear layer over positions, and one layer that answers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.mix = nn.Linear(16, 16)
        self.leave = nn.Conv2d(19, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.enter(x)).flatten(2).transpose(1, 2)
        hidden = torch.relu(self.mix(hidden)).transpose(1, 2).unflatten(2, (8, 8))
        return x[:, :1] + self.leave(torch.cat([hidden, x], dim=1))


def graph() -> ServedGraph:
    torch.manual_seed(0)
    return ServedGraph(Net(), INPUTS, TARGETS).eval()


def samples(count: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    generator = np.random.default_rng(seed)
    rain = generator.integers(-50, 350, (count, 2, 6, 7)).astype(np.int16)
    rain[generator.random(rain.shape) < 0.1] = -999
    return {"rain": rain, "height": generator.integers(0, 200, (count, 1, 6, 7)).astype(np.int16)}


def eager(served: ServedGraph, inputs: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    with torch.no_grad(), one_thread():
        (y,) = served(*(torch.from_numpy(inputs[name]) for name in served.input_names))
    return {"y": y.numpy()}


def make_bundle(path: Path, *formats: str, device: str = "cpu") -> Path:
    """Write a bundle whose seals, golden answers and patterns are right; `device` is what aoti is compiled for."""
    path.mkdir()
    served = graph()
    inputs = samples(8)
    golden = Golden(inputs, eager(served, inputs))
    golden.save(path / GOLDEN)
    lacking = with_missing(golden, SIGNATURE)
    assert lacking is not None
    answered(lacking, lambda batch: eager(served, dict(batch)), MAX_BATCH).save(path / PATTERNS)
    example = golden.batch(MAX_BATCH).inputs
    write(served, example, ["y"], MAX_BATCH, path, [format for format in formats if format != "int8"], device)
    document: dict[str, Any] = {
        "name": "small",
        "version_id": version_id(IDENTITY, "w"),
        "run_id": "2" * 64,
        "identity": {**IDENTITY, "weights": "w"},
        "signature": SIGNATURE.to_json(),
        "sample": {},
        "preprocess": {},
        "served_batches": [1, MAX_BATCH],
        "tolerance": 2e-5 if device == "cpu" else 1e-4,
        "environment": {},
        "parity": {},
    }
    if "aoti" in formats:
        document["aoti"] = aoti.facts(path / FORMAT_FILES["aoti"])
    if "int8" in formats:
        quantize(path / FORMAT_FILES["onnx"], path / FORMAT_FILES["int8"], [samples(5, seed) for seed in range(1, 9)])
        document["int8"] = {"tolerance": 0.1, "missing_tolerance": 0.1}
    write_manifest(path, document)
    return path


IDENTITY: dict[str, Any] = {
    "data": {"fingerprint": "d"},
    "code": {"commit": "c"},
    "config": {},
    "kernels": "k",
    "environment": {},
}
