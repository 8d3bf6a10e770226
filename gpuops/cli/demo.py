"""`gpuops demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuops.cli.output import fields, say
from gpuops.demo.job import copy_recipe, run_demo


def demo(out: str, ranks: int | None, epochs: int, tritonserver: str | None, recipe: str | None) -> None:
    """Run the main job, or copy its recipe."""
    if recipe is not None:
        for file in copy_recipe(Path(recipe)):
            sys.stdout.write(f"{file}\n")
        return
    summary = run_demo(Path(out), ranks=ranks, epochs=epochs, tritonserver=tritonserver, say=say)
    train, serve = summary["train"], summary["serve"]
    sys.stdout.write("\n")
    fields(
        {
            "held-out RMSE": f"{train['val_rmse']:.3f} (persistence {train['persistence_rmse']:.3f}, "
            f"extrapolation {train['extrapolation_rmse']:.3f}, AR(6) {train['ar6_rmse']:.3f})",
            "served, max abs diff": ", ".join(f"{p} {serve[p]['max_abs_diff']:.1e}" for p in ("http", "grpc")),
            "energy": "unknown: " + train["energy"]["reason"]
            if train["energy"]["joules"] is None
            else f"{train['energy']['joules']:,.0f} J of training",
            "version id": summary["bundle"]["version_id"],
            "seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items()),
            "summary": str(Path(out) / "summary.json"),
            "report": summary["report"],
        }
    )
