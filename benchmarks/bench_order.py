"""The order of an epoch against a stored permutation: state, seek, and throughput.

Subjects:
  gpuops              gpuops.data.order.Order: a keyed permutation, nothing stored
  numpy-permutation   numpy.random.Generator.permutation, where it fits in memory: 8 bytes a sample

`state_bytes` is what a checkpoint must hold to go on (the fields of the order and the batch's number, as JSON);
`seek_ms` the time from those to the ids of a batch of 64 anywhere in the epoch; `permute` whole batches in a row.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import harness
import numpy as np
from harness import Row

from gpuops.data.order import Order

HUGE = 10**12
BATCH = 64
BLOCK = 4096
"""Samples a global batch when throughput is measured."""
SEEKS = 200


def main() -> None:
    options = harness.arguments(__doc__ or "", "order").parse_args()
    rounds = 3 if options.quick else 9
    fitting = 10**6 if options.quick else 10**7
    rows = [*state_rows(), *seek_rows(rounds), *speed_rows(fitting, rounds)]
    harness.report(options.out, packages=("numpy",), limits={}, rows=rows)


def _order(size: int, batch: int, epoch: int = 0) -> Order:
    return Order(size, seed=0, epoch=epoch, fingerprint="0" * 64, global_batch=batch)


def state_rows() -> list[Row]:
    """Bytes of state; for numpy what the permutation itself would take."""
    state = json.dumps(asdict(_order(HUGE, BATCH)) | {"batch": HUGE // BATCH}).encode()
    case = f"order-{HUGE:.0e}"
    return [
        Row(case, "gpuops", "state_bytes", len(state), "bytes", vs={"numpy-permutation": len(state) / (8 * HUGE)}),
        Row(case, "numpy-permutation", "state_bytes", 8 * HUGE, "bytes", note="computed: 8 bytes a sample, not made"),
    ]


def seek_rows(rounds: int) -> list[Row]:
    """Seconds from the state to the ids of one batch, each time at another place."""
    order, places = _order(HUGE, BATCH), np.random.default_rng(0).integers(0, HUGE // BATCH, rounds * SEEKS)
    taken_ms = []
    for place in places.tolist():
        begin = time.perf_counter()
        order.batch(place, 0, 1)
        taken_ms.append((time.perf_counter() - begin) * 1e3)
    note = f"{len(taken_ms)} seeks, {harness.spread(taken_ms)}, worst {max(taken_ms):.3g}"
    return [Row(f"order-{HUGE:.0e}", "gpuops", "seek_ms", statistics.median(taken_ms), "ms", note=note)]


def speed_rows(fitting: int, rounds: int) -> list[Row]:
    """Ids a second, and again at a size that no stored permutation reaches."""
    blocks = fitting // BLOCK

    def ours(size: int, number: int) -> None:
        order = _order(size, BLOCK, number)
        for k in range(blocks):
            order.batch(k, 0, 1)

    def stored(number: int) -> None:
        positions = np.random.default_rng([0, number]).permutation(fitting)
        for k in range(blocks):
            positions[k * BLOCK : (k + 1) * BLOCK].copy()

    subjects: dict[str, Callable[[int], None]] = {
        "gpuops": partial(ours, fitting),
        "numpy-permutation": stored,
        "gpuops, 1e12": partial(ours, HUGE),
    }
    timings = harness.interleave(subjects, rounds)
    rates = {name: [blocks * BLOCK / s / 1e6 for s in timing.wall_s] for name, timing in timings.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    notes = {name: f"{rounds} rounds of {blocks * BLOCK} ids, {harness.spread(rates[name])}" for name in rates}
    ratio = {"numpy-permutation": median["gpuops"] / median["numpy-permutation"]}
    case = f"order-{fitting:.0e}"
    unit = "million ids/s"
    return [
        Row(case, "gpuops", "permute", median["gpuops"], unit, vs=ratio, note=notes["gpuops"]),
        Row(
            case,
            "numpy-permutation",
            "permute",
            median["numpy-permutation"],
            unit,
            note=notes["numpy-permutation"] + ", the epoch's whole permutation first",
        ),
        Row(f"order-{HUGE:.0e}", "gpuops", "permute", median["gpuops, 1e12"], unit, note=notes["gpuops, 1e12"]),
    ]


if __name__ == "__main__":
    main()
