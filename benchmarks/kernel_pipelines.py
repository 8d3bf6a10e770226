"""The pipelines that the kernels compute, in plain torch: what eager runs and torch.compile compiles."""

from __future__ import annotations

import torch

SHAPE = 32, 8, 512, 512
"""Samples, channels, height and width of what is read."""
WINDOW = 224
"""Height and width of a window."""
MISSING = -32768
"""Stored value that means no data."""


def affine(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = x.float() * a.view(-1, 1, 1) + b.view(-1, 1, 1)
    return torch.where(x == MISSING, 0.0, y.clamp(-5.0, 5.0))


def transform(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return affine(x, a, b).to(torch.bfloat16)


def transform_asinh(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = torch.asinh((x.float() * a.view(-1, 1, 1) + b.view(-1, 1, 1)).clamp(-5.0, 5.0))
    return torch.where(x == MISSING, 0.0, y).to(torch.bfloat16)


def transform_stats(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = affine(x, a, b)
    valid = x != MISSING
    count = valid.sum((0, 2, 3))
    mean = torch.where(valid, y, 0.0).sum((0, 2, 3)) / count
    m2 = torch.where(valid, (y - mean.view(-1, 1, 1)).square(), 0.0).sum((0, 2, 3))
    low = torch.where(valid, y, torch.inf).amin((0, 2, 3))
    high = torch.where(valid, y, -torch.inf).amax((0, 2, 3))
    return y.to(torch.bfloat16), count, mean, m2, low, high


def window_slab(slab: torch.Tensor, table: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(WINDOW, device=slab.device)
    rows = (table[:, 1, None] + steps)[:, None, :, None]
    cols = (table[:, 2, None] + steps)[:, None, None, :]
    channels = torch.arange(slab.shape[1], device=slab.device)[None, :, None, None]
    return transform(slab[table[:, 0].view(-1, 1, 1, 1), channels, rows, cols], a, b)


def window_chunks(table: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *chunks: torch.Tensor) -> torch.Tensor:
    return window_slab(torch.stack(chunks), table, a, b)


def histogram(x: torch.Tensor) -> torch.Tensor:
    return torch.histc(x.float(), 256, -32768, 32767)


def resize(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.interpolate(affine(x, a, b), (WINDOW, WINDOW), mode="bilinear", antialias=True)
    return y.to(torch.bfloat16)
