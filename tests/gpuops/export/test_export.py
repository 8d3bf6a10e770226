"""A run becomes a bundle that answers as training does, in every format and without our package."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gpuops as go
from gpuops.bundle import Golden, read_bundle
from gpuops.data.runs import Runs
from gpuops.errors import InputError, IntegrityError
from gpuops.export.bundling import largest_finite
from gpuops.export.graph import load_run, one_thread, served_graph
from gpuops.export.samples import golden as golden_answers
from gpuops.export.verify import verify
from gpuops.lineage.version import version_id
from tests.conftest import Job, run_cli


def test_the_bundle_says_what_it_is(bundled: Job) -> None:
    bundle = read_bundle(bundled.bundle)
    manifest = bundle.manifest
    run = json.loads((bundled.run / "run.json").read_text())
    assert bundle.formats == ("pt2", "onnx")
    assert manifest["run_id"] == run["run_id"]
    assert manifest["version_id"] != manifest["run_id"]
    assert [(s.name, s.dtype, s.shape) for s in bundle.signature.inputs] == [
        ("turbidity", "uint8", (6, 20, 20)),
        ("altitude", "uint8", (1, 20, 20)),
        ("month", "int32", (1,)),
    ]
    assert [(s.name, s.dtype, s.shape) for s in bundle.signature.outputs] == [("y", "float32", (1, 20, 20))]
    assert manifest["served_batches"] == [1, 32]
    assert all(p["batches"] == 32 and p["max_abs_diff"] <= 1e-5 for p in manifest["parity"].values())


def test_the_version_id_covers_the_weights_and_the_rest(bundled: Job) -> None:
    manifest = read_bundle(bundled.bundle).manifest
    identity = {key: value for key, value in manifest["identity"].items() if key != "weights"}
    assert version_id(identity, manifest["identity"]["weights"]) == manifest["version_id"]
    assert version_id(identity, "other weights") != manifest["version_id"]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_loaded_bundle_answers_golden_samples(bundled: Job, format: str) -> None:
    bundle = read_bundle(bundled.bundle)
    infer = go.load_bundle(bundled.bundle, format)
    golden = bundle.golden()
    for size in (1, 3, 32):
        batch = golden.batch(size)
        assert batch.max_abs_diff(infer(batch.inputs)) <= bundle.tolerance
    with pytest.raises(InputError, match="send stored values"):
        infer({**golden.inputs, "turbidity": golden.inputs["turbidity"].astype(np.float32)})
    with pytest.raises(InputError, match="takes 1 to 32"):
        infer(golden.batch(33).inputs)


def test_golden_answers_are_the_training_pipelines_own(bundled: Job) -> None:
    """Recomputed from the store with plain NumPy preprocessing and the checkpoint's module."""
    bundle = read_bundle(bundled.bundle)
    run = load_run(bundled.run)
    golden, manifest = bundle.golden(), bundle.manifest
    steps = {p["name"]: {s["step"]: s for s in p["steps"]} for p in manifest["preprocess"]["inputs"]["x"]}
    channels = []
    for name in ("turbidity", "altitude"):
        unpack, normalize = steps[name]["unpack"], steps[name]["normalize"]
        stored = golden.inputs[name]
        value = stored.astype(np.float64) * unpack["scale"] + unpack["offset"]
        if unpack["missing"] is not None:
            value = np.where(stored == unpack["missing"], steps[name]["fill"]["value"], value)
        channels.append((value - normalize["mean"][0]) / normalize["std"][0])
    x = torch.from_numpy(np.concatenate(channels, axis=1)).float()
    with torch.no_grad():
        y = run.model(x=x, month=torch.from_numpy(golden.inputs["month"])).double().numpy()
    target = {s["step"]: s for s in manifest["preprocess"]["targets"]["y"][0]["steps"]}["normalize"]
    assert np.abs(y * target["std"][0] + target["mean"][0] - golden.outputs["y"]).max() < 1e-4


def test_golden_samples_are_held_out_and_come_from_the_store(bundled: Job) -> None:
    manifest = read_bundle(bundled.bundle).manifest
    record = json.loads((bundled.run / "run.json").read_text())
    golden = read_bundle(bundled.bundle).golden()
    array = go.open(bundled.store).variables["turbidity"].array
    for k, sample in enumerate(manifest["sample"]["golden_ids"]):
        tile, start = divmod(sample, 12)
        assert tile in Runs.from_json(record["data"]["held_out_records"]).tolist()
        months = [(start + i) % 12 for i in range(6)]
        assert np.array_equal(golden.inputs["turbidity"][k], np.asarray(array[tile])[months])


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_format_needs_nothing_of_ours(bundled: Job, format: str, tmp_path: Path) -> None:
    code = """
import sys, numpy as np
stored = np.load("golden.npz")
raw = [stored[f"input/{name}"] for name in ("turbidity", "altitude", "month")]
if sys.argv[1] == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, dict(zip(("turbidity", "altitude", "month"), raw)))
else:
    import torch
    (y,) = (t.detach().numpy() for t in torch.export.load("model.pt2").module()(*map(torch.from_numpy, raw)))
assert not [name for name in sys.modules if name.startswith("gpuops")]
print(np.abs(y - stored["output/y"]).max())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, format], cwd=bundled.bundle, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_exporting_again_gives_the_same_bytes(bundled: Job, tmp_path: Path, threads: str) -> None:
    """Also on a machine with other cores: the answers are sums, and threads would add in another order."""
    again = ("export", bundled.run, tmp_path / "again", "--name", "forecast")
    done = run_cli(*again, cwd=tmp_path, OMP_NUM_THREADS=threads)
    assert done.returncode == 0, done.stderr
    first, second = (read_bundle(path).manifest for path in (bundled.bundle, tmp_path / "again"))
    assert first["files"] == second["files"]
    assert first["version_id"] == second["version_id"]


def test_verify_finds_an_identity_that_is_not_the_version_ids(bundled: Job, tmp_path: Path) -> None:
    from gpuops.bundle import write_manifest

    copy = tmp_path / "bundle"
    shutil.copytree(bundled.bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["identity"]["data"]["fingerprint"] = "another"
    write_manifest(copy, {k: v for k, v in manifest.items() if k not in ("files", "sha256", "schema")})
    with pytest.raises(IntegrityError, match="recorded identity"):
        verify(copy)


def test_a_changed_model_file_is_refused(trained: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    record = json.loads((run / "run.json").read_text())
    changed = tmp_path / "forecast.py"
    changed.write_text(Path(record["model"]["file"]).read_text() + "\n# changed since\n")
    record["model"]["file"] = str(changed)
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="changed since the run"):
        go.export(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_unfinished_run_is_refused(trained: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    record = json.loads((run / "run.json").read_text()) | {"status": "running"}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="no finished fit"):
        go.export(run, tmp_path / "bundle")


def test_unknown_format_and_existing_bundle_are_refused(bundled: Job, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tflite"):
        go.export(bundled.run, tmp_path / "bundle", formats=["tflite"])
    with pytest.raises(InputError, match="--overwrite"):
        go.export(bundled.run, bundled.bundle)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batch": 0}, "give at least 1"),
        ({"tolerance": -1e-3}, "at least 0"),
        ({"tolerance": float("nan")}, "at least 0"),
        ({"tolerance": float("inf")}, "at least 0"),
    ],
)
def test_numbers_that_prove_nothing_are_refused(
    bundled: Job, tmp_path: Path, options: dict[str, float], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        go.export(bundled.run, tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_infinite_answers_do_not_widen_the_tolerance() -> None:
    answers = np.array([[1.0, np.inf], [-3.0, np.nan]], np.float32)
    assert largest_finite(Golden({}, {"y": answers})) == 3.0
    with pytest.raises(InputError, match="answers no finite 'z' to held-out samples"):
        largest_finite(Golden({}, {"y": answers, "z": np.full((2, 2), np.nan, np.float32)}))


def test_the_served_graph_equals_the_packed_path(bundled: Job) -> None:
    graph = served_graph(load_run(bundled.run))
    golden = read_bundle(bundled.bundle).golden()
    with torch.no_grad(), one_thread():
        (answer,) = graph(*(torch.from_numpy(golden.inputs[name]) for name in graph.input_names))
    assert np.array_equal(answer.numpy(), golden.outputs["y"])


class Shapeless(torch.nn.Module):
    """Answers without the channel axis that its target has."""

    def forward(self, x: torch.Tensor, month: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


class Misnamed(torch.nn.Module):
    def forward(self, fields: torch.Tensor, month: torch.Tensor) -> torch.Tensor:
        return fields[:, :1]


@pytest.mark.parametrize(
    ("model", "message"),
    [(Shapeless(), r"answered 'y' as \[20, 20\] a sample"), (Misnamed(), "declared input tensors are x, month")],
)
def test_a_model_that_does_not_fit_the_declared_tensors(trained: Job, model: torch.nn.Module, message: str) -> None:
    run = dataclasses.replace(load_run(trained.run), model=model)
    with pytest.raises(InputError, match=message):
        golden_answers(run, served_graph(run))
