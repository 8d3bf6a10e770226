"""The declared preprocessing as a torch module: the only caller of `torch.ops.gpuops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gpuops.errors import InputError
from gpuops.preprocess import geometry
from gpuops.preprocess.fold import fold, inverse
from gpuops.preprocess.steps import Fill, Preprocess
from gpuops_kernels import transform, window
from gpuops_kernels.resample import resample, weights


@dataclass(frozen=True, slots=True)
class Draw:
    """What random steps are drawn from."""

    ids: npt.NDArray[np.int64]
    """Sample ids of the batch, int64 [n]."""
    seed: int
    """The run's seed."""
    epoch: int
    """Epoch, from 0."""


class PreprocessModule(nn.Module):
    """Stored tensors in, model-ready tensors out, one launch a tensor (a resize is a second step).

    In training the reader's slot already holds each tensor's variables side by side, so `packed` runs the kernel
    directly (`launch`, without the dispatcher). In a served graph the variables arrive by name, and `forward` joins
    them first and calls the registered op, which torch.export keeps and the bundle's formats decompose.
    """

    def __init__(self, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> None:
        """Lower `preprocess`; outputs have `dtype` (float32, bfloat16 or float16)."""
        super().__init__()
        self.preprocess = preprocess
        self.dtype = dtype
        self._functions: dict[str, str] = {}
        self._random = preprocess.random
        last = preprocess.geometry[-1] if preprocess.geometry else None
        self._resize = last if isinstance(last, geometry.Resize) else None
        self._moves = len(preprocess.geometry) > (self._resize is not None)
        for name in preprocess.tensors:
            folded = fold(preprocess, name)
            if folded is None:
                continue
            self._functions[name] = folded.functions
            self.register_buffer(f"table_{name}", torch.from_numpy(folded.table), persistent=False)
            self.register_buffer(f"missing_{name}", torch.from_numpy(folded.missing), persistent=False)

    def packed(self, slot: Mapping[str, Tensor], draw: Draw | None = None) -> dict[str, Tensor]:
        """Tensors by name, each stored as [n, channels, *spatial], to model-ready ones.

        Args:
            slot: stored tensors.
            draw: what random steps are drawn from; None where there are none.

        Raises:
            InputError: random steps without a draw, or a crop that does not fit.
        """
        if draw is None and self._random:
            raise InputError("random steps need sample ids, seed and epoch: pass a Draw, or prepare with eval()")
        ready = {}
        for name, parts in self.preprocess.tensors.items():
            if name not in slot:
                raise InputError(f"tensor {name!r} is missing: got {', '.join(slot) or 'none'}")
            stored = slot[name]
            if stored.dtype != getattr(torch, parts[0].dtype, None):
                raise InputError(f"tensor {name!r} is {stored.dtype}, declared as {parts[0].dtype}: pass stored values")
            if draw is not None and len(draw.ids) != len(stored):
                raise InputError(
                    f"tensor {name!r} has {len(stored)} samples, the draw {len(draw.ids)} ids: pass one each"
                )
            if stored.dim() > 3 and self._resize is not None:
                if name not in self._functions:
                    raise InputError(f"tensor {name!r} is raw, and labels have no values in between: leave resize out")
                ready[name] = self._resized(name, self._placed(name, stored, draw, torch.float32))
            else:
                ready[name] = self._placed(name, stored, draw, self.dtype)
        return ready

    def forward(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw inputs by wire name, each stored as [n, channels, ...], to model-ready tensors by tensor name."""
        joined = {
            name: torch.cat([raw[part.name] for part in parts], dim=1) if len(parts) > 1 else raw[parts[0].name]
            for name, parts in self.preprocess.tensors.items()
        }
        return self.packed(joined)

    def physical(self, name: str, values: Tensor) -> Tensor:
        """Normalised values [n, channels, ...] of one tensor back to physical units, float32."""
        values = values.float()
        per_channel = (1, -1) + (1,) * (values.ndim - 2)
        for stage in inverse(self.preprocess, name):
            scale, offset = (
                torch.as_tensor(np.array(v), dtype=torch.float32).to(values.device).view(per_channel)
                for v in (stage.scale, stage.offset)
            )
            values = values * scale + offset
            if "log" in stage.undo:
                chosen = torch.tensor([undo == "log" for undo in stage.undo], device=values.device).view(per_channel)
                values = torch.where(chosen, torch.exp(values), values)
            if "asinh" in stage.undo:
                chosen = torch.tensor([undo == "asinh" for undo in stage.undo], device=values.device).view(per_channel)
                values = torch.where(chosen, torch.sinh(values), values)
        return values

    def _placed(self, name: str, stored: Tensor, draw: Draw | None, dtype: torch.dtype) -> Tensor:
        """One tensor before it is resized: gathered and prepared in one launch."""
        if self._moves and stored.dim() > 3:
            return self._moved(name, stored, draw, dtype)
        if name not in self._functions:
            return stored
        run = torch.ops.gpuops.transform if torch.compiler.is_compiling() else transform.launch
        ready: Tensor = run(stored, *self._coefficients(name), dtype, self._functions[name])
        return ready

    def _resized(self, name: str, values: Tensor) -> Tensor:
        """The second op: two matrix products, which no kernel of ours beats."""
        assert self._resize is not None
        (height, width), method = self._resize.size, self._resize.method
        rows, cols = weights(values.shape[-2], height, method), weights(values.shape[-1], width, method)
        filled = all(any(isinstance(step, Fill) for step in part.steps) for part in self.preprocess.tensors[name])
        return resample(values, rows.float(), cols.float(), missing=not filled).to(self.dtype)

    def _moved(self, name: str, stored: Tensor, draw: Draw | None, dtype: torch.dtype) -> Tensor:
        """One tensor that is cropped, mirrored or turned."""
        steps, spatial = self.preprocess.geometry, stored.shape[2:]
        size = geometry.window_shape(steps, spatial)
        if torch.compiler.is_compiling():  # a served sample is one window, known when the graph is made
            for axis, (whole, length) in enumerate(zip(spatial, size, strict=True), 2):
                stored = stored.narrow(axis, (whole - length) // 2, length)
            stored = stored.contiguous()
            if name not in self._functions:
                return stored
            functions = self._functions[name]
            ready: Tensor = torch.ops.gpuops.transform(stored, *self._coefficients(name), dtype, functions)
            return ready
        ids = np.arange(len(stored)) if draw is None else draw.ids
        seed, epoch = (0, 0) if draw is None else (draw.seed, draw.epoch)
        table = torch.from_numpy(geometry.table(steps, ids, seed, epoch, spatial))
        if name not in self._functions:
            return _gather(stored, table, size)
        coefficients = self._coefficients(name)
        return window.launch(stored, table, *coefficients, dtype, size, "error", self._functions[name])

    def _coefficients(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"table_{name}"), getattr(self, f"missing_{name}")


def _gather(stored: Tensor, table: Tensor, size: tuple[int, ...]) -> Tensor:
    """What the window kernel takes, of values that stay as they are stored: labels, indices."""
    axes, count = len(size), len(table)
    entries = table.to(stored.device, torch.int64, non_blocking=True)
    flip, rot = (entries[:, column].view(-1, *(1,) * axes) for column in (-2, -1))
    # The element of the unturned, unmirrored window that each element of the result is.
    grid = list(torch.meshgrid(*[torch.arange(length, device=stored.device) for length in size], indexing="ij"))
    rows, cols = (grid[axis].expand(count, *size) for axis in (-2, -1))
    height, width = size[-2:]
    turned = (rot % 2) == 1
    y, x = torch.where(turned, cols, rows), torch.where(turned, rows, cols)
    y = torch.where((rot == 2) | (rot == 3), height - 1 - y, y)
    x = torch.where((rot == 1) | (rot == 2), width - 1 - x, x)
    places = [*[axis.expand(count, *size) for axis in grid[:-2]], y, x]
    index = []
    for axis, (place, length) in enumerate(zip(places, size, strict=True)):
        mirrored = (flip >> (axes - 1 - axis)) % 2 == 1
        start = entries[:, 1 + axis].view(-1, *(1,) * axes)
        index.append((start + torch.where(mirrored, length - 1 - place, place)).unsqueeze(1))
    sample = entries[:, 0].view(-1, 1, *(1,) * axes)
    channel = torch.arange(stored.shape[1], device=stored.device).view(1, -1, *(1,) * axes)
    return stored[(sample, channel, *index)]
