"""`verify` proves each format in a process of its own, and finds what a good seal hides."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gpuops.bundle import FORMAT_FILES, GOLDEN, Golden, read_bundle, write_manifest
from gpuops.errors import IntegrityError, UnavailableError
from gpuops.export.verify import check_identity, verify, verify_format


@pytest.fixture
def onnx_only(small: Path, tmp_path: Path) -> Path:
    """The formats that a process proves without torch."""
    copy = tmp_path / "bundle"
    shutil.copytree(small, copy)
    (copy / "model.pt2").unlink()
    reseal(copy)
    return copy


def reseal(bundle: Path, **fields: Any) -> None:
    """Whoever made this bundle sealed it as it is."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    kept = {key: value for key, value in manifest.items() if key not in ("files", "sha256", "schema")}
    write_manifest(bundle, {**kept, **fields})


def nudge(file: Path, name: str) -> None:
    """Change one weight a little."""
    model = onnx.load(file)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += values.dtype.type(0.01) if values.dtype.kind == "f" else values.dtype.type(90)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, file)


def test_a_good_bundle_is_proved_anew(onnx_only: Path) -> None:
    parity = verify(onnx_only)
    assert set(parity) == {"onnx", "int8"}
    assert parity["onnx"]["tolerance"] == 2e-5
    assert parity["int8"]["tolerance"] == 0.1
    assert 1e-3 < parity["int8"]["max_abs_diff"] < 0.1
    check_identity(read_bundle(onnx_only))


def test_what_int8_cost_at_export_is_told_again(onnx_only: Path) -> None:
    recorded = {"bound": 0.02, "rmse": {"y": {"unit": "mm", "float32": 1.0, "int8": 1.01}}}
    reseal(onnx_only, int8={"tolerance": 0.1, "missing_tolerance": 0.1, **recorded})
    assert recorded.items() <= verify_format(onnx_only, "int8").items()


def test_a_changed_byte_is_found_before_any_process_starts(onnx_only: Path) -> None:
    nudge(onnx_only / "model.onnx", "model.leave.weight")
    with pytest.raises(IntegrityError, match=r"model\.onnx is missing or differs"):
        verify(onnx_only)


def damaged_weight(file: Path) -> None:
    nudge(file, "model.leave.weight")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize("damage", [damaged_weight, cut_short])
def test_a_format_that_was_sealed_broken_is_found(onnx_only: Path, damage: Callable[[Path], None]) -> None:
    damage(onnx_only / "model.onnx")
    reseal(onnx_only)
    with pytest.raises(IntegrityError, match=r"^onnx: .+"):
        verify(onnx_only)


def test_golden_answers_that_are_another_models_are_found(onnx_only: Path) -> None:
    golden = Golden.load(onnx_only / GOLDEN)
    Golden(golden.inputs, {"y": golden.outputs["y"] + np.float32(0.001)}).save(onnx_only / GOLDEN)
    reseal(onnx_only)
    with pytest.raises(IntegrityError, match=r"onnx: answers differ from the training pipeline's by 0\.001"):
        verify(onnx_only)


@pytest.mark.parametrize(
    ("tolerances", "says"),
    [((1e-4, 0.1), r"int8: answers differ .* allowed is 0\.0001"), ((0.1, 1e-6), "int8: all missing")],
)
def test_int8_is_held_to_its_own_tolerances(onnx_only: Path, tolerances: tuple[float, float], says: str) -> None:
    reseal(onnx_only, int8=dict(zip(("tolerance", "missing_tolerance"), tolerances, strict=True)))
    verify_format(onnx_only, "onnx")
    with pytest.raises(IntegrityError, match=says):
        verify_format(onnx_only, "int8")


def test_a_damaged_int8_weight_is_found(onnx_only: Path) -> None:
    """Its tolerance is what int8 itself needs: the bundle's fixture allows twice what it differs by."""
    nudge(onnx_only / "model_int8.onnx", "model.enter.weight_quantized")
    reseal(onnx_only)
    with pytest.raises(IntegrityError, match="int8: answers differ"):
        verify_format(onnx_only, "int8")


def test_what_cannot_run_here_is_not_called_wrong(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(small, copy)
    shutil.copy(copy / "model.pt2", copy / FORMAT_FILES["aoti"])
    reseal(copy, aoti={"architecture": "sparc64", "torch": "2.0", "isa": "", "cuda_arch": None})
    with pytest.raises(UnavailableError, match=r"aoti: .* was compiled by torch 2\.0"):
        verify_format(copy, "aoti")


def test_a_process_that_dies_in_silence_proves_nothing(onnx_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(IntegrityError, match="onnx: exit code 1"):
        verify_format(onnx_only, "onnx")
