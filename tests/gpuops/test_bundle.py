import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.bundle import GOLDEN, MANIFEST, PATTERNS, Golden, read_bundle, write_manifest
from gpuops.errors import InputError, IntegrityError
from gpuops.lineage.version import canonical_json
from gpuops.spec import Signature, TensorSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    directory.mkdir()
    x = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Golden({"x": x}, {"y": x.astype(np.float32)}).save(directory / GOLDEN)
    (directory / "model.onnx").write_bytes(b"graph")
    signature = Signature((TensorSpec("x", "uint8", (3,)),), (TensorSpec("y", "float32", (3,)),))
    write_manifest(
        directory, {"name": "m", "version_id": "v", "signature": signature.to_json(), "tolerance": 1e-5, "parity": {}}
    )
    return directory


def test_a_whole_bundle_opens(bundle: Path) -> None:
    opened = read_bundle(bundle)
    assert opened.formats == ("onnx",)
    assert opened.version_id == "v"
    assert opened.golden().inputs["x"].dtype == np.uint8
    with pytest.raises(InputError, match="--formats pt2"):
        opened.model_file("pt2")


@pytest.mark.parametrize("name", [MANIFEST, GOLDEN, "model.onnx"])
def test_any_changed_byte_is_found(bundle: Path, name: str) -> None:
    whole = (bundle / name).read_bytes()
    for position in np.linspace(0, len(whole) - 1, 40).astype(int):
        changed = bytearray(whole)
        changed[position] ^= 1
        (bundle / name).write_bytes(bytes(changed))
        if name == MANIFEST and _same_json(whole, bytes(changed)):
            continue  # a changed blank between values changes nothing that the manifest says
        with pytest.raises(IntegrityError, match=r"export|manifest"):
            read_bundle(bundle)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_a_missing_file_is_found(bundle: Path) -> None:
    (bundle / GOLDEN).unlink()
    with pytest.raises(IntegrityError, match=GOLDEN):
        read_bundle(bundle)


def test_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gpuops export RUN"):
        read_bundle(tmp_path)


def test_a_newer_schema_is_refused(bundle: Path) -> None:
    import gpuops.bundle

    document = json.loads((bundle / MANIFEST).read_text())
    shutil.copy(bundle / MANIFEST, bundle.parent)
    for key in ("files", "sha256"):
        document.pop(key)
    write_manifest(bundle, document)
    patched = json.loads((bundle / MANIFEST).read_text())
    patched.pop("sha256")
    patched["schema"] = gpuops.bundle.SCHEMA + 1
    import hashlib

    from gpuops.lineage.version import canonical_json

    patched["sha256"] = hashlib.sha256(canonical_json(patched)).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(patched))
    with pytest.raises(InputError, match="schema"):
        read_bundle(bundle)


@given(size=st.integers(1, 40), count=st.integers(1, 9))
def test_golden_batches_repeat_the_samples_in_order(size: int, count: int) -> None:
    x = np.arange(count, dtype=np.int32)[:, None]
    batch = Golden({"x": x}, {"y": x.astype(np.float32)}).batch(size)
    assert batch.inputs["x"][:, 0].tolist() == [i % count for i in range(size)]
    assert batch.max_abs_diff(batch.outputs) == 0.0


def test_a_file_that_the_manifest_does_not_list_is_nobodys(bundle: Path) -> None:
    (bundle / "__pycache__").mkdir()
    (bundle / "signature.dsse.json").write_text("{}")
    assert set(read_bundle(bundle).manifest["files"]) == {GOLDEN, "model.onnx"}


def test_formats_are_those_whose_files_are_listed(bundle: Path) -> None:
    for file in ("model_int8.onnx", "model_aoti.pt2", "model.pt2"):
        (bundle / file).write_bytes(file.encode())
    assert read_bundle(bundle).formats == ("onnx",)
    fields = {"signature": {}, "tolerance": 1e-5, "int8": {"tolerance": 0.5}}
    write_manifest(bundle, fields)
    opened = read_bundle(bundle)
    assert opened.formats == ("pt2", "onnx", "aoti", "int8")
    assert [opened.tolerance_of(format) for format in opened.formats] == [1e-5, 1e-5, 1e-5, 0.5]
    assert opened.model_file("int8") == bundle / "model_int8.onnx"


def test_patterns_are_there_if_the_manifest_lists_them(bundle: Path) -> None:
    assert read_bundle(bundle).patterns() is None
    x = np.zeros((6, 3), np.uint8)
    Golden({"x": x}, {"y": x.astype(np.float32)}).save(bundle / PATTERNS)
    assert read_bundle(bundle).patterns() is None
    write_manifest(bundle, {"signature": {}, "tolerance": 1e-5})
    kept = read_bundle(bundle).patterns()
    assert kept is not None
    assert kept.outputs["y"].shape == (6, 3)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"sha256": "x"}', "sealed"])
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: str) -> None:
    if text == "sealed":
        manifest = {"schema": 1, "files": []}
        text = json.dumps({**manifest, "sha256": hashlib.sha256(canonical_json(manifest)).hexdigest()})
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=r"changed after export|lists no files"):
        read_bundle(bundle)


def test_rows_and_places_of_golden_samples() -> None:
    x = np.arange(6, dtype=np.int32).reshape(3, 2)
    samples = Golden({"x": x, "m": x[:, :1]}, {"y": x.astype(np.float32)})
    assert [row["x"].tolist() for row in samples.rows()] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    taken = samples.take(np.array([2, 0, 2]))
    assert taken.inputs["m"].ravel().tolist() == [4, 0, 4]
    assert taken.outputs["y"][:, 0].tolist() == [4, 0, 4]


def test_differences_count_nan_shape_and_absence() -> None:
    golden = Golden({}, {"y": np.array([[1.0, np.nan]], np.float32)})
    assert golden.max_abs_diff({"y": np.array([[1.5, np.nan]], np.float32)}) == 0.5
    assert golden.max_abs_diff({"y": np.array([[np.nan, np.nan]], np.float32)}) == np.inf
    assert golden.max_abs_diff({"y": np.array([[1.0, 0.0]], np.float32)}) == np.inf
    assert golden.max_abs_diff({"y": np.zeros((2, 2), np.float32)}) == np.inf
    assert golden.max_abs_diff({}) == np.inf
