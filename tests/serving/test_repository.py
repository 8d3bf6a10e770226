import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import SAMPLE, SIGNATURE, make_bundle

from gpuops.errors import InputError, IntegrityError
from gpuops.spec import Signature, TensorSpec
from gpuops_serving import repository as room
from gpuops_serving.config import Options, config_text, model_config, read_config
from gpuops_serving.repository import deploy, served_versions

CONFIG = """\
name: "tiny"
version_policy {
  specific {
    versions: 3
  }
}
max_batch_size: 5
input {
  name: "a"
  data_type: TYPE_UINT8
  dims: 3
  dims: 8
  dims: 8
}
input {
  name: "m"
  data_type: TYPE_INT32
  dims: 1
}
output {
  name: "y"
  data_type: TYPE_FP32
  dims: 1
  dims: 8
  dims: 8
}
instance_group {
  count: 1
  kind: KIND_CPU
}
dynamic_batching {
}
parameters {
  key: "gpuops.format"
  value {
    string_value: "onnx"
  }
}
parameters {
  key: "gpuops.sample"
  value {
    string_value: "{\\"dims\\": [\\"tile\\", \\"y\\", \\"x\\"], \\"window\\": 3}"
  }
}
parameters {
  key: "gpuops.threads"
  value {
    string_value: "2"
  }
}
parameters {
  key: "gpuops.version_id"
  value {
    string_value: "abc"
  }
}
parameters {
  key: "gpuops.version_id.3"
  value {
    string_value: "abc"
  }
}
backend: "python"
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_config_text_is_the_golden_one_and_parses_back(tmp_path: Path) -> None:
    config = model_config("tiny", {3: "abc"}, SIGNATURE, sample=SAMPLE, options=Options(threads=2))
    assert config_text(config) == CONFIG
    (tmp_path / "config.pbtxt").write_text(CONFIG)
    assert read_config(tmp_path / "config.pbtxt") == config


def test_every_dtype_that_may_cross_the_wire_has_a_triton_type() -> None:
    specs = tuple(TensorSpec(dtype, dtype, (1,)) for dtype in ("uint8", "int8", "int16", "uint16", "int32", "float32"))
    config = model_config("all", {1: ""}, Signature(specs, specs[-1:]), sample=None)
    values = type(config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    names = [values.values_by_number[tensor.data_type].name for tensor in config.input]
    assert names == ["TYPE_UINT8", "TYPE_INT8", "TYPE_INT16", "TYPE_UINT16", "TYPE_INT32", "TYPE_FP32"]


def test_a_typing_error_in_a_config_is_found_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('name: "x"\nmax_batchsize: 3\n')
    with pytest.raises(InputError, match=r"2:1.*max_batchsize"):
        read_config(tmp_path / "config.pbtxt")


def test_a_model_without_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="max_batch 0"):
        model_config("x", {1: ""}, Signature(SIGNATURE.inputs, SIGNATURE.outputs, 0), sample=None)


def test_deploy_writes_a_version_that_proves_itself(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    made = deploy(bundle, tmp_path / "new" / "repository", name="other")
    assert (made.name, made.version, made.version_id, made.new) == ("other", 1, "1" * 64, True)
    assert made.path == tmp_path / "new" / "repository" / "other" / "1"
    assert sorted(p.name for p in made.path.iterdir()) == ["golden.npz", "manifest.json", "model.onnx", "model.py"]
    for file in ("golden.npz", "manifest.json", "model.onnx"):
        assert (made.path / file).read_bytes() == (bundle / file).read_bytes()
    (served,) = served_versions(tmp_path / "new" / "repository")
    assert (served.name, served.version, served.version_id, served.tolerance) == ("other", 1, "1" * 64, 1e-3)


def test_deploying_the_newest_again_changes_nothing_and_says_so(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    deploy(bundle, repository)
    (repository / "tiny" / "1" / "__pycache__").mkdir()  # as Triton's stub leaves it
    before = tree(repository)
    again = deploy(bundle, repository)
    assert (again.version, again.new) == (1, False)
    assert tree(repository) == before


def test_a_damaged_newest_version_is_deployed_afresh(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    first = deploy(bundle, repository)
    (first.path / "model.onnx").write_bytes(b"broken")
    again = deploy(bundle, repository)
    assert (again.version, again.new) == (2, True)


def test_another_version_id_becomes_the_next_version(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = deploy(make_bundle(tmp_path / "one"), repository)
    before = tree(first.path)
    second = deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), repository)
    assert (second.version, second.new) == (2, True)
    assert tree(first.path) == before
    config = read_config(repository / "tiny" / "config.pbtxt")
    assert list(config.version_policy.specific.versions) == [1, 2]  # the one before answers who names it
    assert second.kept == (1,)
    assert config.parameters["gpuops.version_id"].string_value == "2" * 64
    assert deploy(tmp_path / "one", repository).version == 3  # going back is a version of its own


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz", "manifest.json"])
def test_a_bundle_with_one_byte_changed_is_refused(tmp_path: Path, file: str) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(IntegrityError, match="export it again"):
        deploy(bundle, repository)
    assert not repository.exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_deployment_that_dies_half_way_leaves_the_repository_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    if version == 2:
        deploy(make_bundle(tmp_path / "one"), repository)
    before, beside = tree(repository), sorted(tmp_path.iterdir())
    bundle = make_bundle(tmp_path / "two", version_id="2" * 64)
    copy, seen = shutil.copyfile, []

    def dies(source: Any, destination: Path) -> None:
        copy(source, destination)
        seen.append([p.name for p in repository.iterdir()])
        if destination.name == "golden.npz":
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", dies)
    with pytest.raises(KeyboardInterrupt):
        deploy(bundle, repository)
    assert tree(repository) == before
    assert sorted(tmp_path.iterdir()) == sorted([*beside, bundle])
    # Triton would take even a hidden folder in the repository for a model, and not start.
    assert all(names == (["tiny"] if version == 2 else []) for names in seen)


def test_a_repository_on_a_file_system_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crosses(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", crosses)
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match=r"one step \(Invalid cross-device link\): use a repository inside .*/models"):
        deploy(bundle, tmp_path / "repository")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "repository"]
    assert list((tmp_path / "repository").iterdir()) == []


def test_a_bundle_that_changes_while_it_is_copied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, copy = make_bundle(tmp_path / "bundle"), shutil.copyfile

    def changed(source: Any, destination: Path) -> None:
        copy(source, destination)
        if destination.name == "model.onnx":
            destination.write_bytes(destination.read_bytes() + b"x")

    monkeypatch.setattr(shutil, "copyfile", changed)
    with pytest.raises(IntegrityError, match=r"model\.onnx changed while it was copied"):
        deploy(bundle, tmp_path / "repository")
    assert list((tmp_path / "repository").iterdir()) == []


def test_readers_see_whole_versions_while_several_deploy(tmp_path: Path) -> None:
    repository, count = tmp_path / "repository", 6
    bundles = [make_bundle(tmp_path / f"b{n}", version_id=f"{n}" * 64) for n in range(count)]
    deploy(bundles[0], repository)
    writers = [threading.Thread(target=deploy, args=(bundle, repository)) for bundle in bundles[1:]]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        served = served_versions(repository)  # raises if a version and its configuration disagree
        seen.append(served[-1].version)
    for writer in writers:
        writer.join()
    assert seen == sorted(seen)
    assert [served.version for served in served_versions(repository)] == [count - 1, count]
    assert sorted(p.name for p in (repository / "tiny").iterdir()) == [*map(str, range(1, count + 1)), "config.pbtxt"]


def test_a_bundle_without_onnx_is_refused(tmp_path: Path) -> None:
    from gpuops.bundle import write_manifest

    bundle = make_bundle(tmp_path / "bundle")
    manifest = room.read_bundle(bundle).manifest
    (bundle / "model.onnx").unlink()
    write_manifest(bundle, {k: v for k, v in manifest.items() if k != "sha256"})
    with pytest.raises(InputError, match="--formats onnx"):
        deploy(bundle, tmp_path / "repository")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "two words"])
def test_a_name_that_is_no_folder_and_url_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="model name"):
        deploy(make_bundle(tmp_path / "bundle"), tmp_path / "repository", name=name)


def test_what_is_not_a_repository_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gpuops deploy"):
        served_versions(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no model"):
        served_versions(tmp_path)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(InputError, match="foreign was not written by `gpuops deploy`"):
        served_versions(tmp_path)
