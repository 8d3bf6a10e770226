"""Models of a repository joined to one that clients ask, as a bundle: deployed, proved and rolled out like any other.

    steps = [Step("denoise", {"raw": "raw"}, {"clean": "clean"}), Step("forecast", {"clean": "clean"}, {"y": "y"})]
    ensemble_bundle("out/chain", "out/repository", "chain", steps, golden)
    deploy("out/chain", "out/repository")

The bundle names a version of each step and its version id, so the ensemble's answers do not change when a step gets a
new version: make the ensemble again, and roll that out. A repository goes on serving the versions that its ensembles
name. What crosses the ensemble's wire follows from what crosses that of its steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpuops.atomic import new_directory
from gpuops.bundle import GOLDEN, Golden, write_manifest
from gpuops.errors import InputError
from gpuops.lineage.version import canonical_json
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.config import CONFIG, ENSEMBLE, read_config, served_version_ids
from gpuops_serving.folders import read_manifest
from gpuops_serving.scheduling import Step


def ensemble_bundle(
    path: str | Path,
    repository: str | Path,
    name: str,
    steps: Sequence[Step],
    golden: Golden,
    tolerance: float = 1e-3,
    *,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write the bundle of an ensemble of models that a repository serves.

    Its inputs are the names that no step answers.

    Args:
        path: Bundle directory to make.
        repository: Model repository that serves the steps.
        name: Model name of the ensemble.
        steps: The models, in any order that their tensors allow.
        golden: Samples and answers of the whole.
        tolerance: Largest absolute difference from them that passes, in physical units.
        outputs: Names that the ensemble answers with; what no step takes if empty.
        overwrite: Replace a directory that is there.

    Returns:
        The bundle's directory.

    Raises:
        InputError: the repository does not serve a step, or the tensors do not fit together.
    """
    served = [_served(Path(repository), step) for step in steps]
    signature = _joined(name, steps, [manifest for _, manifest in served], outputs)
    for spec in signature.inputs:
        if spec.name not in golden.inputs:
            raise InputError(f"ensemble {name!r} takes {spec.name!r}, the golden samples have {sorted(golden.inputs)}")
        spec.check(golden.inputs[spec.name])
    if missing := {spec.name for spec in signature.outputs} ^ set(golden.outputs):
        raise InputError(f"ensemble {name!r}: output {min(missing)!r} is not both in the steps and the golden answers")
    joined = [
        {**_document(step), "version": version, "version_id": manifest["version_id"]}
        for step, (version, manifest) in zip(steps, served, strict=True)
    ]
    takers = [
        manifest["sample"] for step, (_, manifest) in zip(steps, served, strict=True) if _takes(step, signature.inputs)
    ]
    document = {
        "name": name,
        "version_id": hashlib.sha256(canonical_json([joined, [s.name for s in signature.outputs]])).hexdigest(),
        "run_id": None,
        "identity": {},
        "signature": signature.to_json(),
        "sample": takers[0] if len(takers) == 1 else None,
        "preprocess": {},
        "tolerance": tolerance,
        "served_batches": list(range(1, signature.max_batch + 1)),
        "parity": {},
        "environment": {},
        ENSEMBLE: joined,
    }
    with new_directory(Path(path), overwrite=overwrite) as temporary:
        golden.save(temporary / GOLDEN)
        write_manifest(temporary, document)
    return Path(path)


def _served(repository: Path, step: Step) -> tuple[int, dict[str, Any]]:
    """Number and manifest of the version that a step names."""
    config = repository / step.model / CONFIG
    served = served_version_ids(read_config(config)) if config.is_file() else {}
    version = step.version or max(served, default=0)
    if version not in served:
        raise InputError(f"{repository} does not serve version {version or 'any'} of {step.model!r}: deploy it first")
    return version, read_manifest(repository / step.model / str(version))


def _document(step: Step) -> dict[str, Any]:
    return {"model": step.model, "inputs": dict(step.inputs), "outputs": dict(step.outputs)}


def _takes(step: Step, inputs: Sequence[TensorSpec]) -> bool:
    return bool({spec.name for spec in inputs} & set(step.inputs.values()))


def _joined(name: str, steps: Sequence[Step], manifests: Sequence[dict[str, Any]], outputs: Sequence[str]) -> Signature:
    """What crosses the ensemble's wire; InputError if its steps do not fit together."""
    signatures = [Signature.from_json(manifest["signature"]) for manifest in manifests]
    made: dict[str, TensorSpec] = {}
    taken: dict[str, TensorSpec] = {}
    for step, signature in zip(steps, signatures, strict=True):
        for own, spec in _named(name, step, "output", step.outputs, signature.outputs):
            if own in made:
                raise InputError(f"ensemble {name!r}: two steps answer {own!r}; name one of them otherwise")
            made[own] = replace(spec, name=own)
    for step, signature in zip(steps, signatures, strict=True):
        if left := {spec.name for spec in signature.inputs} - set(step.inputs):
            raise InputError(f"ensemble {name!r}: input {min(left)!r} of {step.model!r} gets nothing: name its source")
        for own, spec in _named(name, step, "input", step.inputs, signature.inputs):
            for source in (made.get(own), taken.get(own)):
                if source is not None and (source.dtype, source.shape) != (spec.dtype, spec.shape):
                    raise InputError(
                        f"ensemble {name!r}: {own!r} is {source.dtype} {list(source.shape)}, and {spec.name!r} of "
                        f"{step.model!r} takes {spec.dtype} {list(spec.shape)}: join others"
                    )
            taken[own] = replace(spec, name=own)
    if unknown := sorted(set(outputs) - set(made)):
        raise InputError(f"ensemble {name!r}: no step answers {unknown[0]!r}; they answer {sorted(made)}")
    answered = tuple(outputs) or tuple(own for own in made if own not in taken)
    inputs = tuple(spec for own, spec in taken.items() if own not in made)
    if not inputs or not answered:
        raise InputError(f"ensemble {name!r} takes or answers nothing: its steps only feed each other; name outputs")
    _require_order(name, steps, {spec.name for spec in inputs})
    if unused := sorted(set(made) - set(taken) - set(answered)):
        raise InputError(f"ensemble {name!r}: nobody takes {unused[0]!r}; leave it out of its step's outputs")
    largest = min(signature.max_batch for signature in signatures)
    return Signature(inputs, tuple(made[own] for own in answered), largest)


def _named(name: str, step: Step, side: str, names: Any, specs: Sequence[TensorSpec]) -> list[tuple[str, TensorSpec]]:
    """(name in the ensemble, tensor of the step) of what a step names on one side."""
    known = {spec.name: spec for spec in specs}
    if unknown := sorted(set(names) - set(known)):
        raise InputError(f"ensemble {name!r}: {step.model!r} has no {side} {unknown[0]!r}, it has {sorted(known)}")
    return [(own, known[theirs]) for theirs, own in names.items()]


def _require_order(name: str, steps: Sequence[Step], ready: set[str]) -> None:
    """Raise InputError if steps wait for each other."""
    waiting = list(steps)
    while runnable := [step for step in waiting if set(step.inputs.values()) <= ready]:
        ready |= {own for step in runnable for own in step.outputs.values()}
        waiting = [step for step in waiting if step not in runnable]
    if waiting:
        raise InputError(f"ensemble {name!r}: {waiting[0].model!r} waits for its own answer; give it another source")
