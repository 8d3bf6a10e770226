"""Bundles on a real GPU: the same sweep; what a machine without one can prove is in the other files."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from small import MAX_BATCH, SIGNATURE, make_bundle

from gpuops.bundle import read_bundle
from gpuops.errors import UnavailableError
from gpuops.export.formats import runner
from gpuops.export.parity import sweep
from gpuops.export.verify import verify_format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device: benchmarks/gpu.sh runs this on one"
    ),
]


def _onnxruntime_has_cuda() -> bool:
    if find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def assert_sweeps(bundle: Path, format: str) -> None:
    opened = read_bundle(bundle)
    parity = sweep(runner(opened, format, "cuda"), opened.golden(), SIGNATURE, 1e-4, patterns=opened.patterns())
    assert parity.batches == MAX_BATCH


def test_pt2_answers_on_the_gpu(small: Path) -> None:
    assert_sweeps(small, "pt2")


@pytest.mark.skipif(not _onnxruntime_has_cuda(), reason="this onnxruntime has no CUDA (onnxruntime-gpu has)")
def test_onnx_answers_on_the_gpu(small: Path) -> None:
    assert_sweeps(small, "onnx")


@pytest.mark.slow
def test_aoti_with_our_kernels_answers_on_the_gpu_alone(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "aoti", device="cuda")
    facts = read_bundle(bundle).manifest["aoti"]
    assert facts["cuda_arch"] == "sm_{}{}".format(*torch.cuda.get_device_capability())
    assert_sweeps(bundle, "aoti")
    assert verify_format(bundle, "aoti")["batches"] == MAX_BATCH
    with pytest.raises(UnavailableError, match="compiled for cuda, not cpu"):
        runner(read_bundle(bundle), "aoti", "cpu")
