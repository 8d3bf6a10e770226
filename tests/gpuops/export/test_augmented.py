"""A run that was augmented becomes a bundle that crops the middle itself: raw samples in, cropped answers out."""

from pathlib import Path

import pytest

from gpuops.bundle import read_bundle
from tests.conftest import Job, run_cli, training_arguments


@pytest.mark.slow
def test_an_augmented_run_is_exported_and_verified(stored: Job, tmp_path: Path) -> None:
    run, bundle, ledger = tmp_path / "run", tmp_path / "bundle", {"GPUOPS_LEDGER": str(tmp_path / "ledger.sqlite")}
    augment = "--data.init_args.augment={crop: [12, 12], flip: [x, y], turn: true}"
    done = run_cli("train", *training_arguments(stored.store, run), augment, **ledger)
    assert done.returncode == 0, done.stderr
    done = run_cli("export", run, bundle, "--formats", "pt2,onnx", **ledger)
    assert done.returncode == 0, done.stderr
    made = read_bundle(bundle)
    assert [(s.name, s.shape) for s in made.signature.inputs][:2] == [
        ("turbidity", (6, 20, 20)),
        ("altitude", (1, 20, 20)),
    ]
    assert [(s.name, s.shape) for s in made.signature.outputs] == [("y", (1, 12, 12))]
    assert all(p["max_abs_diff"] <= made.tolerance for p in made.manifest["parity"].values())
    done = run_cli("verify", bundle, **ledger)
    assert done.returncode == 0, done.stderr
