"""AOTInductor packages: compiled at the largest batch, right at every one, refused where they could end the process."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from small import MAX_BATCH, SIGNATURE, graph, make_bundle, samples

import gpuops as go
from gpuops.bundle import read_bundle
from gpuops.errors import InputError, UnavailableError
from gpuops.export import aoti
from gpuops.export.formats import check_formats, runner, write
from gpuops.export.parity import sweep
from gpuops.export.verify import verify
from tests.conftest import Job

HERE: dict[str, Any] = {
    "architecture": platform.machine(),
    "torch": torch.__version__,
    "isa": "",
    "cuda_arch": None,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("aoti") / "bundle", "pt2", "aoti")


@pytest.mark.slow
def test_every_batch_size_is_answered_right_and_bad_inputs_are_refused(compiled: Path) -> None:
    bundle = read_bundle(compiled)
    infer = runner(bundle, "aoti")
    parity = sweep(infer, bundle.golden(), SIGNATURE, bundle.tolerance, patterns=bundle.patterns())
    assert parity.batches == MAX_BATCH
    assert "layout (channels last)" in parity.refused
    with pytest.raises(InputError, match="takes 1 to 5"):
        infer(samples(MAX_BATCH + 1))


@pytest.mark.slow
def test_what_a_package_is_bound_to_is_recorded(compiled: Path) -> None:
    facts = read_bundle(compiled).manifest["aoti"]
    assert facts == aoti.facts(compiled / "model_aoti.pt2")
    assert facts["architecture"] == platform.machine()
    assert facts["torch"] == torch.__version__
    assert facts["cuda_arch"] is None
    assert facts["isa"]
    assert aoti.lacking_isa(facts["isa"]) == ""


@pytest.mark.slow
def test_it_is_verified_in_a_fresh_process(compiled: Path) -> None:
    parity = verify(compiled)
    assert set(parity) == {"pt2", "aoti"}
    assert all(found["batches"] == MAX_BATCH for found in parity.values())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA says; this one has it")
def test_cuda_is_refused_where_there_is_none(compiled: Path) -> None:
    with pytest.raises(UnavailableError, match="use device cpu"):
        runner(read_bundle(compiled), "aoti", "cuda")
    with pytest.raises(UnavailableError, match="use device cpu"):
        check_formats(["aoti"], "cuda")


@pytest.mark.slow
def test_a_run_is_compiled_and_proved(bundled: Job, tmp_path: Path) -> None:
    made = go.export(bundled.run, tmp_path / "bundle", formats=["aoti"], max_batch=6)
    assert made.formats == ("aoti",)
    assert made.manifest["aoti"]["torch"] == torch.__version__
    assert made.manifest["parity"]["aoti"]["batches"] == 6
    golden = made.golden().batch(5)
    assert golden.max_abs_diff(go.load_bundle(tmp_path / "bundle")(golden.inputs)) <= made.tolerance


def test_it_is_compiled_from_the_largest_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a smaller example some kernels are specialised on batches up to it, and nothing says so."""
    seen = []

    def compile(program: Any, package_path: str) -> None:
        seen.append([tensor.shape[0] for tensor in program.example_inputs[0]])

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    write(graph(), samples(MAX_BATCH), ["y"], MAX_BATCH, tmp_path, ["aoti"])
    assert seen == [[MAX_BATCH, MAX_BATCH]]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"torch": "2.4.1"}, "compiled by torch 2.4.1, here is"),
        ({"architecture": "sparc64"}, "compiled for sparc64, the processor is"),
        ({"isa": "AVX512 AMX_NOWHERE"}, None),
        ({"cuda_arch": "sm_90"}, "compiled for cuda, not cpu"),
    ],
)
def test_another_machine_refuses_it_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], says: str | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": False, "avx2": True})
    with pytest.raises(UnavailableError, match=says or "this CPU has no AVX512: export it again"):
        aoti.load(tmp_path / "no_such_file", {**HERE, **other}, "cpu")


def test_patch_releases_of_torch_load_each_others_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", loaded.append)
    minor = ".".join(torch.__version__.split(".")[:2])
    aoti.load(tmp_path / "package", {**HERE, "torch": f"{minor}.9+other"}, "cpu")
    assert loaded == [str(tmp_path / "package")]


@pytest.mark.slow  # inductor compiles a program to find out
def test_instruction_sets_are_compared_by_inductors_names() -> None:
    from torch._inductor import cpu_vec_isa

    assert aoti.lacking_isa(str(cpu_vec_isa.pick_vec_isa())) == ""


def test_instruction_sets_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_vnni": False, "avx2": True})
    assert aoti.lacking_isa("AVX512 AVX512_VNNI") == "AVX512_VNNI"
    assert aoti.lacking_isa("AVX2") == ""


def test_no_compiler_is_said_before_anything_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(UnavailableError, match=r"no-such-compiler, which is not installed: apt install g\+\+"):
        check_formats(["pt2", "aoti"], "cpu")
    check_formats(["pt2"], "cpu")
