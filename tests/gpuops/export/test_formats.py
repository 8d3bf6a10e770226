"""Every format of a bundle, loaded in this process: right answers, the same refusals, no trace of where it was made."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small import MAX_BATCH, SIGNATURE, graph, samples
from torch import nn

import gpuops as go
from gpuops.bundle import FORMAT_FILES, Bundle, read_bundle, write_manifest
from gpuops.errors import InputError, UnavailableError
from gpuops.export.formats import check_formats, default_format, runner, write
from gpuops.export.parity import sweep

FAST = ("pt2", "onnx", "int8")


@pytest.mark.parametrize("format", FAST)
def test_every_format_passes_the_same_sweep(small: Path, format: str) -> None:
    bundle = read_bundle(small)
    infer = go.load_bundle(small, format)
    parity = sweep(infer, bundle.golden(), SIGNATURE, bundle.tolerance_of(format), patterns=bundle.patterns())
    assert parity.batches == MAX_BATCH
    assert set(parity.missing) == {"all missing", "checkerboard missing", "first sample missing"}  # type: ignore[arg-type]
    assert "batch 6" in parity.refused
    assert (parity.max_abs_diff > 1e-3) == (format == "int8")


@pytest.mark.parametrize("format", FAST)
def test_answers_are_the_callers_to_keep(small: Path, format: str) -> None:
    infer = go.load_bundle(small, format)
    first = infer(samples(2, 1))["y"]
    kept = first.copy()
    infer(samples(2, 2))
    assert np.array_equal(first, kept)
    first[:] = 0


def test_one_input_may_be_given_bare_and_several_may_not(small: Path) -> None:
    with pytest.raises(InputError, match="rain, height: pass"):
        go.load_bundle(small)(samples(1)["rain"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says; this one has it")
@pytest.mark.parametrize("format", FAST)
def test_cuda_is_refused_where_there_is_none(small: Path, format: str) -> None:
    with pytest.raises(UnavailableError, match="use device cpu"):
        go.load_bundle(small, format, "cuda")


def test_unknown_formats_and_devices_are_refused(small: Path) -> None:
    with pytest.raises(InputError, match="use cpu or cuda"):
        go.load_bundle(small, "onnx", "tpu")
    with pytest.raises(InputError, match="--formats aoti"):
        go.load_bundle(small, "aoti")
    with pytest.raises(InputError, match="use cpu or cuda"):
        check_formats(["onnx"], "tpu")
    for formats in ([], ["tflite"]):
        with pytest.raises(InputError, match="there are pt2, onnx, aoti, int8"):
            check_formats(formats, "cpu")


@pytest.mark.parametrize(
    ("present", "chosen"),
    [(("pt2", "onnx", "int8"), "onnx"), (("pt2", "aoti"), "pt2"), (("aoti", "int8"), "aoti"), (("int8",), "int8")],
)
def test_the_most_exact_portable_format_is_the_default(present: tuple[str, ...], chosen: str) -> None:
    files = {FORMAT_FILES[format]: "" for format in present}
    assert default_format(Bundle(Path("bundle"), {"files": files})) == chosen


def test_a_missing_runtime_says_what_to_install(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"gpuops\[onnx\]"):
        go.load_bundle(small, "onnx")
    with pytest.raises(UnavailableError, match=r"gpuops\[onnx\]"):
        check_formats(["int8"], "cpu")


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_process_or_the_place(small: Path, tmp_path: Path) -> None:
    """Another process exports the same model from sources that lie elsewhere, two lines further down."""
    (tmp_path / "small.py").write_text("\n\n" + Path(sys.modules["small"].__file__ or "").read_text())
    code = "import pathlib, small; small.make_bundle(pathlib.Path('bundle'), 'pt2', 'onnx')"
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, env=environment)
    first, second = (json.loads((path / "manifest.json").read_text())["files"] for path in (small, tmp_path / "bundle"))
    assert set(second) == {"golden.npz", "patterns.npz", "model.pt2", "model.onnx"}
    assert {name: first[name] for name in second} == second


def test_no_file_says_where_it_was_made(small: Path) -> None:
    root = str(Path(__file__).parents[3]).encode()
    assert root not in (small / "model.onnx").read_bytes()
    with zipfile.ZipFile(small / "model.pt2") as archive:
        assert not [
            name for name in archive.namelist() if root in archive.read(name) or b'.py\\"' in archive.read(name)
        ]


def test_a_linear_layer_over_positions_keeps_its_weights_constant(small: Path) -> None:
    """Decomposed to aten alone, its weights are expanded to the batch at every request, and cannot be quantised."""
    model = onnx.load(small / "model.onnx")
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert [node.input[1] in weights for node in products if "linear" in str(node.metadata_props)] == [True]
    assert "Expand" not in {node.op_type for node in model.graph.node}


def test_a_largest_batch_of_one_is_exported(tmp_path: Path) -> None:
    """torch knows no dynamic size of at most 1, and takes an example of one sample for a batch that is always one."""
    write(graph(), samples(2), ["y"], 1, tmp_path, ["pt2"])
    manifest = write_manifest(tmp_path, {"signature": {**SIGNATURE.to_json(), "max_batch": 1}, "tolerance": 0.0})
    infer = runner(Bundle(tmp_path, manifest), "pt2")
    assert infer(samples(1))["y"].shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match="takes 1 to 1"):
        infer(samples(2))


class Branching(nn.Module):
    def forward(self, *raw: torch.Tensor) -> tuple[torch.Tensor]:
        return (raw[0].float() if raw[0].sum() > 0 else raw[0].float() * 2,)


def test_a_model_that_torch_cannot_export_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch cannot capture the model as a graph .*without branches on values"):
        write(Branching(), {"x": np.ones((2, 3), np.float32)}, ["y"], 2, tmp_path, ["pt2"])
    assert not list(tmp_path.iterdir())
