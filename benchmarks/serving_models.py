"""The models that bench_serving and soak_serving serve: the demo's, and one whose compute is small, both untrained.

What an answer costs does not depend on the weights. `small` is a network of 25 million multiply-adds and additions on
25.6 kB of uint8: 4 channels of 80 x 80, unpacked and normalised, folded to 64 channels of 20 x 20, four convolutions,
ten numbers out. `demo` is the network of `gpuops demo` with its Preprocess: 100 kB of uint8 in, 57.6 kB of float32 out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpuops.bundle import Bundle, Golden, read_bundle, write_manifest
from gpuops.demo.forecast import Forecast
from gpuops.export.formats import write
from gpuops.spec import Arrays, Signature, TensorSpec

MAX_BATCH = 32
SAMPLES = 64
"""Different samples that requests are made of."""
TOLERANCE = 1e-3


class Small(nn.Module):
    """Stored uint8 in, ten numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(64, 32, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.leave = nn.Linear(32, 10)

    def forward(self, *stored: Tensor) -> tuple[Tensor]:
        hidden = F.relu(self.enter(F.pixel_unshuffle((stored[0].float() - 128.0) / 64.0, 4)))
        for block in self.blocks:
            hidden = F.relu(block(hidden))
        return (self.leave(hidden.mean((2, 3))),)


class Demo(nn.Module):
    """The demo's network with its normalisation and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Forecast()
        nn.init.normal_(self.net.leave.weight, std=0.05)  # it is zero at the start, and would make all answers trivial

    def forward(self, *stored: Tensor) -> tuple[Tensor]:
        turbidity, altitude, month = stored
        x = torch.cat([(turbidity.float() * 0.05 - 3.5) / 1.2, (altitude.float() * 30.0 - 400.0) / 800.0], 1)
        return (self.net(x, month) * 1.2 + 3.5,)


def make(name: str, folder: Path) -> Bundle:
    """Write and open the bundle of `small` or `demo`."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)

    def stored(*shape: int) -> npt.NDArray[np.uint8]:
        return draw.integers(20, 180, (SAMPLES, *shape), dtype=np.uint8)

    if name == "small":
        graph: nn.Module = Small()
        inputs: dict[str, npt.NDArray[Any]] = {"x": stored(4, 80, 80)}
    else:
        graph = Demo()
        month = draw.integers(1, 13, (SAMPLES, 1), dtype=np.int32)
        inputs = {"turbidity": stored(6, 120, 120), "altitude": stored(1, 120, 120), "month": month}
    graph.eval()
    golden = Golden(inputs, {"y": _answers(graph, inputs)})
    signature = Signature(
        tuple(TensorSpec(key, str(array.dtype), array.shape[1:]) for key, array in inputs.items()),
        (TensorSpec("y", "float32", golden.outputs["y"].shape[1:]),),
        MAX_BATCH,
    )
    folder.mkdir(parents=True)
    golden.save(folder / "golden.npz")
    write(graph, golden.batch(MAX_BATCH).inputs, ["y"], MAX_BATCH, folder, ["onnx"])
    document = {
        "name": name,
        "version_id": name.encode().hex().ljust(64, "0"),
        "run_id": "0" * 64,
        "identity": {},
        "signature": signature.to_json(),
        "sample": {},
        "preprocess": {},
        "tolerance": TOLERANCE,
        "served_batches": [1, MAX_BATCH],
        "parity": {},
        "environment": {},
    }
    write_manifest(folder, document)
    return read_bundle(folder)


def _answers(graph: nn.Module, inputs: Arrays) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        answers: npt.NDArray[np.float32] = graph(*(torch.from_numpy(array) for array in inputs.values()))[0].numpy()
    return answers
