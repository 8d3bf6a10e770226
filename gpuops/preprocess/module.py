"""The declared preprocessing as a torch module: the only caller of `torch.ops.gpuops`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gpuops.preprocess.steps import Preprocess
from gpuops_kernels import transform


class PreprocessModule(nn.Module):
    """Stored tensors in, model-ready tensors out, one launch a tensor.

    In training the reader's slot already holds each tensor's variables side by side, so `packed` runs the kernel
    directly (`launch`, without the dispatcher). In a served graph the variables arrive by name, and `forward` joins
    them first and calls the registered op, which torch.export keeps and the bundle's formats decompose.
    """

    def __init__(self, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> None:
        """Lower `preprocess`; outputs have `dtype` (float32, bfloat16 or float16)."""
        super().__init__()
        self.preprocess = preprocess
        self.dtype = dtype
        self._lowered = [name for name in preprocess.tensors if preprocess.fold(name) is not None]
        for name in self._lowered:
            folded = preprocess.fold(name)
            assert folded is not None
            self.register_buffer(f"table_{name}", torch.from_numpy(folded.table), persistent=False)
            self.register_buffer(f"missing_{name}", torch.from_numpy(folded.missing), persistent=False)

    def packed(self, slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, each stored as [n, channels, ...], to model-ready tensors of the same shapes."""
        ready = {}
        for name in self.preprocess.tensors:
            stored = slot[name]
            if name in self._lowered:
                run = torch.ops.gpuops.transform if torch.compiler.is_compiling() else transform.launch
                stored = run(stored, *self._coefficients(name), self.dtype)
            ready[name] = stored
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
        channels = (1, -1) + (1,) * (values.ndim - 2)
        scale, offset = (torch.as_tensor(v, dtype=torch.float32) for v in self.preprocess.inverse(name))
        return values.float() * scale.to(values.device).view(channels) + offset.to(values.device).view(channels)

    def _coefficients(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"table_{name}"), getattr(self, f"missing_{name}")
