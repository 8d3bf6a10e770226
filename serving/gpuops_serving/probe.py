"""The health check of a served model: its golden request, answered rightly.

`/v2/health/ready` is wrong both ways: it stays true after a model's process has died, and turns false when a new
version was rejected while the old one serves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from gpuops.bundle import Golden
from gpuops.errors import IntegrityError
from gpuops_serving.client import Client


@dataclass(frozen=True, slots=True)
class Probe:
    """One golden request that was answered within tolerance."""

    model: str
    """Model name."""
    version: str
    """Version number that answered."""
    max_abs_diff: float
    """Largest absolute difference from the golden answers, in physical units."""
    ms: float
    """Time from request to answer, in milliseconds."""


def probe(client: Client, model: str, golden: Golden, tolerance: float, *, version: str = "") -> Probe:
    """Send the golden samples and compare the answers.

    Args:
        client: Connection to the server.
        model: Model name.
        golden: Samples and the training pipeline's answers.
        tolerance: Largest absolute difference that passes, in physical units.
        version: Version number to ask; empty is the one the server chooses.

    Raises:
        InputError, UnavailableError: the server does not answer such a request.
        IntegrityError: it answers something else, or another version does.
    """
    # In another order each time: a response cache must not answer for a model that is dead.
    golden = golden.take(np.random.default_rng().permutation(len(next(iter(golden.inputs.values())))))
    start = time.perf_counter()
    answer = client.answer(model, golden.inputs, version)
    ms = (time.perf_counter() - start) * 1e3
    if version and answer.version != version:
        raise IntegrityError(f"{client.url}: version {answer.version} of {model!r} answers in place of {version}")
    difference = golden.max_abs_diff(answer.outputs)
    if not golden.agrees(answer.outputs, tolerance):
        raise IntegrityError(
            f"{client.url}: version {answer.version} of {model!r} differs from its golden answers by {difference:g} "
            f"(tolerance {tolerance:g}): do not use it; deploy its bundle again"
        )
    return Probe(model, answer.version, difference, ms)
