"""Fused preprocessing ops for PyTorch, each in one file: reference, Triton kernel, launch, registered op.

Importing this package imports nothing else. Importing an op's module registers the op; a process must do that before it
loads a `.pt2` that still holds the op::

    import gpuops_kernels.transform  # registers torch.ops.gpuops.transform
"""
