"""int8 is calibrated with what was trained on, judged by what was held out, and refused where it is too much worse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import gpuops as go
from gpuops.bundle import Bundle, read_bundle
from gpuops.data.runs import Runs
from gpuops.errors import InputError, IntegrityError
from gpuops.export import int8
from gpuops.export.graph import Run, load_run, served_graph, signature
from gpuops.export.quantize import quantize
from tests.conftest import Job, run_cli


@pytest.fixture(scope="module")
def run(bundled: Job) -> Run:
    return load_run(bundled.run)


def write(run: Run, bundle: Bundle, destination: Path, **options: Any) -> dict[str, Any]:
    return int8.write(
        run,
        served_graph(run),
        signature(run, 32),
        bundle.model_file("onnx"),
        destination,
        golden=bundle.golden(),
        golden_ids=bundle.manifest["sample"]["golden_ids"],
        patterns=bundle.patterns(),
        **options,
    )


@pytest.fixture(scope="module")
def written(run: Run, bundled: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file = tmp_path_factory.mktemp("int8") / "model_int8.onnx"
    return file, write(run, read_bundle(bundled.bundle), file)


def test_training_samples_calibrate_and_none_of_the_others(run: Run, bundled: Job, written: Any) -> None:
    ids = written[1]["calibration_ids"]
    held = set(Runs.from_json(run.record["data"]["held_out_records"]).tolist())
    assert 100 < len(ids) <= int8.CALIBRATION_SAMPLES
    assert {sample // 12 for sample in ids} == set(range(32)) - held
    assert not set(ids) & set(read_bundle(bundled.bundle).manifest["sample"]["golden_ids"])


def test_golden_samples_do_not_calibrate_even_where_nothing_was_held_out(
    run: Run, bundled: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(bundled.bundle)
    golden_ids = bundle.manifest["sample"]["golden_ids"]
    monkeypatch.setattr(int8, "drawn", lambda ids, count: np.array([*golden_ids, 0, 1, 2, 3]))
    found = write(run, bundle, tmp_path / "model_int8.onnx", bound=10.0)
    assert found["calibration_ids"] == [0, 1, 2, 3]


def test_errors_are_those_of_the_answers_against_the_store(run: Run, bundled: Job, written: Any) -> None:
    """Recomputed from the stored field, unpacked by hand."""
    file, found = written
    held = Runs.from_json(run.record["data"]["held_out_records"]).tolist()
    array = np.asarray(go.open(bundled.store).variables["turbidity"].array[:])
    inputs: dict[str, list[Any]] = {"turbidity": [], "altitude": [], "month": []}
    truth = []
    altitude = np.asarray(go.open(bundled.store).variables["altitude"].array[:])
    for tile in held:
        for start in range(12):
            months = [(start + step) % 12 for step in range(7)]
            inputs["turbidity"].append(array[tile, months[:6]])
            inputs["altitude"].append(altitude[tile][None])
            inputs["month"].append([months[6] + 1])
            truth.append(array[tile, months[6:]] * 0.05)
    batch = {name: np.array(v).astype(np.int32 if name == "month" else np.uint8) for name, v in inputs.items()}
    for kind, graph in {"float32": bundled.bundle / "model.onnx", "int8": file}.items():
        answers = int8._session(graph, ["y"])(batch)["y"]
        want = np.sqrt(np.mean((answers.astype(np.float64) - np.array(truth)) ** 2))
        assert found["rmse"]["y"][kind] == pytest.approx(want, rel=1e-4)
    assert found["held_out_samples"] == len(truth)
    assert found["rmse"]["y"]["unit"] == "1"


def test_size_and_latency_are_told_beside_float32s(bundled: Job, written: Any) -> None:
    file, found = written
    assert found["bytes"] == {
        "float32": (bundled.bundle / "model.onnx").stat().st_size,
        "int8": file.stat().st_size,
    }
    assert set(found["latency_ms"]) == {"1", "32"}
    assert all(set(ms) == {"float32", "int8"} and min(ms.values()) > 0 for ms in found["latency_ms"].values())
    json.dumps(found, allow_nan=False)


def test_the_tolerance_is_a_margin_over_what_was_seen(bundled: Job, written: Any) -> None:
    file, found = written
    golden = read_bundle(bundled.bundle).golden()
    seen = golden.max_abs_diff(int8._session(file, ["y"])(golden.inputs))
    assert found["tolerance"] >= int8.MARGIN * seen > 0
    assert found["missing_tolerance"] >= found["tolerance"]


def worse(source: Path, destination: Path, calibration: Any) -> list[str]:
    """Quantise to a graph that answers half a standard deviation too much."""
    layers = quantize(source, destination, calibration)
    model = onnx.load(destination)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "model.leave.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
    onnx.save(model, destination)
    return layers


def test_an_int8_that_is_worse_than_its_bound_is_refused(
    run: Run, bundled: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "quantize", worse)
    bundle = read_bundle(bundled.bundle)
    with pytest.raises(IntegrityError, match=r"error \(RMSE\) of 'y' is .* the bound allows 2\.0% more"):
        write(run, bundle, tmp_path / "model_int8.onnx")
    found = write(run, bundle, tmp_path / "model_int8.onnx", bound=100.0)
    assert found["rmse"]["y"]["int8"] > 1.02 * found["rmse"]["y"]["float32"]
    assert found["bound"] == 100.0


@pytest.mark.parametrize(
    ("float32", "small", "passes"), [(1.0, 1.02, True), (1.0, 1.021, False), (0.0, 0.0, True), (0.0, 1e-6, False)]
)
def test_the_bound_is_a_share_of_float32s_error(
    run: Run, bundled: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: float, small: float, passes: bool
) -> None:
    error = int8._Error(float32**2 * 4, small**2 * 4, count=4, samples=4, largest=0.1)
    monkeypatch.setattr(int8, "_judged", lambda *_: {"y": error})
    monkeypatch.setattr(int8, "CALIBRATION_SAMPLES", 4)
    bundle = read_bundle(bundled.bundle)
    if passes:
        assert write(run, bundle, tmp_path / "m.onnx")["rmse"]["y"]["int8"] == pytest.approx(small)
    else:
        with pytest.raises(IntegrityError, match="leave int8 out"):
            write(run, bundle, tmp_path / "m.onnx")


def test_what_cannot_be_compared_with_the_truth_is_no_proof() -> None:
    assert all(np.isnan(int8._Error().rmse()))
    judged = int8._judged(
        [({}, {"y": np.array([1.0, np.nan])})], lambda _: {"y": np.array([np.nan, 0.0])}, lambda _: {"y": np.ones(2)}
    )
    full, small = judged["y"].rmse()
    assert np.isnan(full)
    assert small == 0.0
    assert not small <= full * 1.02


@pytest.mark.parametrize("bound", [-0.1, float("nan")])
def test_a_bound_that_is_no_share_is_refused(bundled: Job, tmp_path: Path, bound: float) -> None:
    with pytest.raises(InputError, match=r"as 0\.02"):
        go.export(bundled.run, tmp_path / "bundle", formats=["int8"], int8_bound=bound)


@pytest.mark.slow
def test_a_bundle_of_int8_alone_is_exported_loaded_and_verified(bundled: Job, tmp_path: Path) -> None:
    made = go.export(bundled.run, tmp_path / "bundle", formats=["int8"], name="forecast")
    assert made.formats == ("int8",)
    parity = made.manifest["parity"]["int8"]
    recorded = made.manifest["int8"]
    assert parity["tolerance"] == recorded["tolerance"] == made.tolerance_of("int8")
    assert all(parity[key] == recorded[key] for key in ("bound", "rmse", "bytes", "latency_ms"))
    golden = made.golden()
    answers = go.load_bundle(tmp_path / "bundle")(golden.inputs)
    assert made.tolerance < golden.max_abs_diff(answers) <= made.tolerance_of("int8")
    done = run_cli("verify", tmp_path / "bundle", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parity"]["int8"]["rmse"] == recorded["rmse"]


@pytest.mark.slow
def test_export_leaves_nothing_of_an_int8_that_is_refused(
    bundled: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "quantize", worse)
    with pytest.raises(IntegrityError, match="leave int8 out"):
        go.export(bundled.run, tmp_path / "bundle", formats=["onnx", "int8"])
    assert not list(tmp_path.iterdir())
