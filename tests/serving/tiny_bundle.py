"""A small real bundle, made without torch: a graph of five nodes, its answers in NumPy, its seals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from gpuops.bundle import Golden, write_manifest
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.repository import deploy

SIGNATURE = Signature(
    inputs=(TensorSpec("a", "uint8", (3, 8, 8)), TensorSpec("m", "int32", (1,))),
    outputs=(TensorSpec("y", "float32", (1, 8, 8), unit="K"),),
    max_batch=5,
)
SAMPLE = {"dims": ["tile", "y", "x"], "window": 3}
TABLE = np.linspace(-1.0, 1.0, 12, dtype=np.float32)
"""What the graph adds for each m; any other m makes onnxruntime fail, as values can in a real model."""


def answers(a: npt.NDArray[Any], m: npt.NDArray[Any], gain: float = 0.5) -> npt.NDArray[Any]:
    """The graph in NumPy."""
    return (gain * a.astype(np.float32)).sum(axis=1, keepdims=True) + TABLE[m].reshape(-1, 1, 1, 1)


def write_graph(path: Path, gain: float) -> None:
    """y = sum over channels of gain * a, + TABLE[m]."""
    one = np.ones(3, np.int64)
    nodes = [
        helper.make_node("Cast", ["a"], ["a32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a32", "gain"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled", "channel"], ["summed"], keepdims=1),
        helper.make_node("Gather", ["table", "m"], ["added"]),
        helper.make_node("Unsqueeze", ["added", "last"], ["wide"]),
        helper.make_node("Add", ["summed", "wide"], ["y"]),
    ]
    constants = {"gain": np.float32(gain), "table": TABLE, "channel": one[:1], "last": np.array([2, 3], np.int64)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, ["batch", 3, 8, 8]),
            helper.make_tensor_value_info("m", TensorProto.INT32, ["batch", 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def golden(seed: int = 0, gain: float = 0.5, count: int = 8) -> Golden:
    generator = np.random.default_rng(seed)
    a = generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    m = generator.integers(0, 12, (count, 1), dtype=np.int32)
    return Golden({"a": a, "m": m}, {"y": answers(a, m, gain)})


def make_bundle(path: Path, *, version_id: str = "1" * 64, gain: float = 0.5, golden_gain: float | None = None) -> Path:
    """Write a bundle; with `golden_gain`, one whose golden answers are another model's but whose seals are right."""
    path.mkdir(parents=True)
    write_graph(path / "model.onnx", gain)
    golden(gain=gain if golden_gain is None else golden_gain).save(path / "golden.npz")
    document = {
        "name": "tiny",
        "version_id": version_id,
        "run_id": "2" * 64,
        "identity": {},
        "signature": SIGNATURE.to_json(),
        "sample": SAMPLE,
        "preprocess": {},
        "tolerance": 1e-3,
        "served_batches": list(range(1, SIGNATURE.max_batch + 1)),
        "parity": {},
        "environment": {"onnxruntime": onnxruntime.__version__},
    }
    write_manifest(path, document)
    return path


def edit_manifest(folder: Path, **fields: object) -> None:
    """Change a deployed manifest as someone without the bundle would."""
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def deployed(path: Path, **options: Any) -> Path:
    """A repository with one model, from a bundle of its own."""
    deploy(make_bundle(path / "bundle", **options), path / "repository")
    return path / "repository"
