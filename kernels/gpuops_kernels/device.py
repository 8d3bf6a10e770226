"""Where a kernel is launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device. CUDA is not initialised when a graph is traced for a GPU without one."""
    return torch.cuda.device(x.device) if torch.cuda.is_initialized() else nullcontext()
