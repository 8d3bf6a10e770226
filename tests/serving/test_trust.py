"""Where keys are trusted, nothing in a repository runs or answers but what was signed; each way around is refused."""

import importlib._bootstrap_external as bytecode
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import make_bundle

from gpuops.errors import IntegrityError
from gpuops.signing import SIGNATURE, keygen, sign
from gpuops_serving.config import CONFIG
from gpuops_serving.repository import deploy
from gpuops_serving.trust import check_model, check_repository


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a signed repository of two versions, its public key, and another one's."""
    folder = tmp_path_factory.mktemp("published")
    for owner in ("our", "other"):
        keygen(folder / f"{owner}.key", folder / f"{owner}.pub")
    for number, gain in ((1, 0.5), (2, 0.25)):
        bundle = make_bundle(folder / f"bundle{number}", version_id=str(number) * 64, gain=gain)
        sign(bundle, folder / "our.key")
        deploy(bundle, folder / "repository", keys=[folder / "our.pub"])
    return folder


@pytest.fixture
def repository(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published / "repository", tmp_path / "repository", symlinks=True))


def test_a_signed_repository_is_served_under_its_key_alone(published: Path, repository: Path) -> None:
    check_repository(repository, [published / "other.pub", published / "our.pub"])
    with pytest.raises(IntegrityError, match="none of the trusted keys"):
        check_repository(repository, [published / "other.pub"])
    (repository / "tiny" / ".config.pbtxt-killed").write_text("left by a killed deployment")
    (repository / "README.md").write_text("no server reads it")
    check_repository(repository, [published / "our.pub"])


def append(name: str, text: str) -> Callable[[Path], object]:
    """Add to a file of the model, or make it."""

    def change(model: Path) -> None:
        with (model / name).open("a") as file:
            file.write(text)

    return change


def planted(name: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"\x7fELF")

    return change


def linked(name: str) -> Callable[[Path], object]:
    """The same bytes, but where they can be changed later."""

    def change(model: Path) -> None:
        elsewhere = model.parent.parent / "elsewhere"
        (model / name).rename(elsewhere)
        (model / name).symlink_to(elsewhere)

    return change


def another_model(model: Path) -> None:
    """A left-over trial, which a server without model control loads like any other model."""
    evil = model.parent / "tiny.candidate" / "1"
    evil.mkdir(parents=True)
    (evil / "model.py").write_text("import os")
    (evil.parent / CONFIG).write_text('backend: "python"')


def no_signature(model: Path) -> None:
    (model / "1" / SIGNATURE).unlink()


def its_neighbours_signature(model: Path) -> None:
    shutil.copy(model / "1" / SIGNATURE, model / "2" / SIGNATURE)


def another_version_id(model: Path) -> None:
    text = (model / CONFIG).read_text()
    (model / CONFIG).write_text(
        text.replace("specific {", "all {").replace("versions: 1", "").replace("versions: 2", "")
    )


def another_backend(model: Path) -> None:
    (model / CONFIG).write_text((model / CONFIG).read_text().replace('backend: "python"', 'backend: "evil"'))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (append("1/model.onnx", "x"), r"model\.onnx differs from what was signed"),
        (append("2/golden.npz", "x"), r"golden\.npz differs"),
        (append("2/manifest.json", " "), r"manifest\.json differs"),
        (append("1/model.py", "# evil"), r"model\.py is not this gpuops' shim"),
        (no_signature, "is not signed"),
        (its_neighbours_signature, "differs from what was signed"),
        (planted("1/numpy.py"), r"numpy\.py is not among what was signed, and a server may run it"),
        (planted("2/model.pt2"), r"model\.pt2 is not among"),
        (planted("1/lib/helper.so"), "lib is no plain file"),
        (planted("triton_python_backend_stub"), "stub was not deployed, and a server may run it"),
        (planted("libtriton_python.so"), "was not deployed"),
        (linked("1/model.onnx"), "is no plain file|is a link"),
        (linked("1"), "1 is a link"),
        (linked(CONFIG), "is a link"),
        (another_model, "tiny.candidate"),
        (another_version_id, "was not written by `gpuops deploy`"),
        (append(CONFIG, '\ndefault_model_filename: "evil.py"'), "names other code .default_model_filename"),
        (append(CONFIG, '\ncc_model_filenames { key: "8.0" value: "x" }'), "names other code .cc_model_filenames"),
        (append(CONFIG, '\nmodel_operations { op_library_filename: "x.so" }'), "names other code .model_operations"),
        (append(CONFIG, '\nmodel_repository_agents { agents { name: "x" } }'), "names other code .model_repository_ag"),
        (append(CONFIG, '\nruntime: "evil.py"'), "names other code .runtime"),
        (
            append(CONFIG, '\noptimization { execution_accelerators { cpu_execution_accelerator { name: "x" } } }'),
            "names other code .execution_accelerators",
        ),
        (
            append(CONFIG, '\nparameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/e.tar.gz" } }'),
            r"a parameter that may name other code .EXECUTION_ENV_PATH",
        ),
        (another_backend, "runs backend 'evil'"),
        (lambda model: (model / CONFIG).unlink(), r"config\.pbtxt is missing"),
        (lambda model: (model / "1" / "model.onnx").unlink(), r"model\.onnx is missing"),
        (lambda model: (model / "1" / "golden.npz").unlink(), r"golden\.npz is missing"),
        (lambda model: shutil.rmtree(model / "1"), "is not signed|missing"),
    ],
)
def test_every_way_around_a_signature_is_refused(
    published: Path, repository: Path, change: Callable[[Path], object], says: str
) -> None:
    change(repository / "tiny")
    with pytest.raises(IntegrityError, match=says):
        check_repository(repository, [published / "our.pub"])


def test_bytecode_that_would_run_instead_of_the_shim_is_removed(published: Path, repository: Path) -> None:
    # Marked as never to be compared with its source, which Python believes; Triton's stub runs it.
    code = compile("raise SystemExit", "model.py", "exec")
    cache = repository / "tiny" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(bytecode._code_to_hash_pyc(code, bytes(8), False))  # type: ignore[attr-defined]
    check_model(repository / "tiny", [published / "our.pub"])
    assert not cache.exists()
    (published / "evil").mkdir(exist_ok=True)
    cache.symlink_to(published / "evil")
    with pytest.raises(IntegrityError, match="__pycache__ is a link"):
        check_model(repository / "tiny", [published / "our.pub"])


def test_a_model_that_lies_elsewhere_is_refused(published: Path, repository: Path, tmp_path: Path) -> None:
    (repository / "tiny").rename(tmp_path / "tiny")
    (repository / "tiny").symlink_to(tmp_path / "tiny")
    with pytest.raises(IntegrityError, match="is a link"):
        check_repository(repository, [published / "our.pub"])
