"""`export`: a run's best weights as a bundle that has been proved before it exists."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gpuops.atomic import new_directory
from gpuops.bundle import FORMAT_FILES, GOLDEN, PATTERNS, Bundle, Golden, read_bundle, write_manifest
from gpuops.errors import InputError
from gpuops.export import aoti, int8
from gpuops.export.formats import DEFAULT_FORMATS, check_formats, write
from gpuops.export.graph import ServedGraph, load_run, one_thread, served_graph, signature
from gpuops.export.patterns import answered, with_missing
from gpuops.export.samples import golden
from gpuops.export.verify import verify_format
from gpuops.lineage.version import version_id, weights_identity
from gpuops.spec import Arrays

TOLERANCE = 1e-5
"""Smallest default for the largest absolute difference from the training pipeline's answers, in physical units."""
ROUNDINGS = 4
"""float32 roundings that the default allows at the largest golden answer: 1e-5 K does not exist at 300 K."""


def export(
    run: str | Path,
    bundle: str | Path,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    name: str | None = None,
    max_batch: int = 32,
    tolerance: float | None = None,
    device: str = "cpu",
    int8_bound: float = int8.BOUND,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Write a run's served graph as a bundle: files, golden vectors, parity proved in a fresh process, manifest.

    Args:
        run: the run directory.
        bundle: where the bundle goes.
        formats: of `gpuops.bundle.FORMAT_FILES`.
        name: name to serve it under; the model class's, lower case, if None.
        max_batch: largest batch served.
        tolerance: largest absolute difference allowed, in physical units; if None, `TOLERANCE` or `ROUNDINGS` at the
            largest golden answer, whichever is larger.
        device: what an aoti package is compiled for, "cpu" or "cuda".
        int8_bound: share by which the error (RMSE) of an int8 graph on held-out samples may exceed float32's.
        overwrite: replace the bundle that is there, once the new one is proved.
        say: told what is being done.

    Raises:
        InputError: the run is unfinished, a format or device is unknown, a number is out of range, the model answers
            no finite number or cannot be exported, or the bundle exists.
        UnavailableError: a format needs a package, a compiler or a device that is not here.
        IntegrityError: the model's code or data changed since the run, a format does not answer as training does, or
            int8 is worse than its bound.
    """
    destination = Path(bundle)
    check_formats(formats, device)
    int8.check_bound(int8_bound)
    if max_batch < 1:
        raise InputError(f"largest batch {max_batch}: give at least 1")
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise InputError(f"tolerance {tolerance}: give the largest difference allowed, physical units, at least 0")
    with new_directory(destination, overwrite=overwrite) as directory, tempfile.TemporaryDirectory() as scratch:
        loaded = load_run(run)
        graph = served_graph(loaded)
        record = loaded.record
        say(f"golden answers of {type(loaded.model).__name__} on held-out samples")
        vectors, ids = golden(loaded, graph)
        vectors.save(directory / GOLDEN)
        wire = signature(loaded, max_batch)
        patterns, lacking = None, with_missing(vectors, wire)
        if lacking is not None:
            patterns = answered(lacking, lambda inputs: _eager(graph, inputs), max_batch)
            patterns.save(directory / PATTERNS)
        finite = largest_finite(vectors)
        if tolerance is None:
            tolerance = max(TOLERANCE, ROUNDINGS * finite * float(np.finfo(np.float32).eps))
        say(f"writing {', '.join(formats)}")
        example = vectors.batch(max(2, max_batch)).inputs
        written = [format for format in formats if format != "int8"]
        if written:
            write(graph, example, graph.output_names, max_batch, directory, written, device)
        weights = weights_identity(_weights(loaded.model))
        document = {
            "name": name or type(loaded.model).__name__.lower(),
            "version_id": version_id(record["identity"], weights),
            "run_id": record["run_id"],
            "identity": {**record["identity"], "weights": weights},
            "metrics": record["metrics"],
            "signature": wire.to_json(),
            "sample": {**record["sample"], "golden_ids": ids},
            "preprocess": record["preprocess"],
            "served_batches": [1, max_batch],
            "tolerance": tolerance,
            "environment": record["identity"]["environment"],
            "parity": {},
        }
        if "aoti" in formats:
            document["aoti"] = aoti.facts(directory / FORMAT_FILES["aoti"])
        if "int8" in formats:
            say("quantising with training samples, judging by held-out ones")
            write(graph, example, graph.output_names, max_batch, Path(scratch), ["onnx"])
            document["int8"] = int8.write(
                loaded,
                graph,
                wire,
                Path(scratch) / FORMAT_FILES["onnx"],
                directory / FORMAT_FILES["int8"],
                golden=vectors,
                golden_ids=ids,
                patterns=patterns,
                bound=int8_bound,
            )
        write_manifest(directory, document)
        for format in formats:
            say(f"verifying {format} in a fresh process, batches 1 to {max_batch}")
            document["parity"][format] = verify_format(directory, format)
        write_manifest(directory, document)
    return read_bundle(destination)


def _eager(graph: ServedGraph, inputs: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    """Answers of the graph before any export."""
    with torch.no_grad(), one_thread():
        answers = graph(*(torch.from_numpy(inputs[name]) for name in graph.input_names))
    return {name: answer.numpy() for name, answer in zip(graph.output_names, answers, strict=True)}


def largest_finite(vectors: Golden) -> float:
    """Largest finite golden answer, physical units; InputError where an output has none."""
    largest = 0.0
    for name, answer in vectors.outputs.items():
        finite = np.abs(answer[np.isfinite(answer)])
        if not finite.size:
            raise InputError(
                f"the model answers no finite {name!r} to held-out samples: fill missing values in `preprocess`, or "
                "train it again"
            )
        largest = max(largest, float(finite.max()))
    return largest


def _weights(model: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """(name, dtype, shape, bytes) of a module's state."""
    for name, tensor in model.state_dict().items():
        array = tensor.detach().cpu().contiguous()
        content = array.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, str(array.dtype), tuple(array.shape), content
