"""What Triton says of models, for servers that a test scripts; in the form that the real one was seen to use."""

from typing import Any

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def config(**fields: Any) -> dict[str, Any]:
    """A configuration; by default of a model on every GPU."""
    return {"instance_group": [{"kind": "KIND_GPU", "count": 1, "gpus": []}], "parameters": {}, **fields}


ON_CPU = config(instance_group=[{"kind": "KIND_CPU", "count": 1, "gpus": []}])
STREAMING = config(model_transaction_policy={"decoupled": True})
ENSEMBLE = config(platform="ensemble", ensemble_scheduling={"step": []}, instance_group=[])


def on_gpu(*numbers: int, count: int = 1, **fields: Any) -> dict[str, Any]:
    return config(instance_group=[{"kind": "KIND_GPU", "count": count, "gpus": list(numbers)}], **fields)


def stats(
    name: str, requests: int = 0, busy_ms: float = 0.0, *, executions: int | None = None, cached: int = 0, fail: int = 0
) -> dict[str, Any]:
    """Statistics of NAME:VERSION, all batches of size 1."""
    model, _, version = name.partition(":")
    executions = requests - cached - fail if executions is None else executions
    ns = int(busy_ms * 1e6)
    counts = {"success": requests - fail, "fail": fail, "cache_hit": cached, "cache_miss": 0}
    table = {kind: {"count": count, "ns": count} for kind, count in counts.items()}
    batch = {"batch_size": 1, **{part: {"count": executions, "ns": 0} for part in PARTS[1:]}}
    batch["compute_infer"] = {"count": executions, "ns": ns}
    return {
        "name": model,
        "version": version or "1",
        "last_inference": 0,
        "inference_count": requests - cached - fail,
        "execution_count": executions,
        "inference_stats": table | {part: {"count": executions, "ns": 0} for part in PARTS},
        "response_stats": {},
        "batch_stats": [batch] if executions else [],
        "memory_usage": [],
    }
