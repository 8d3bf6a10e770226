"""A model repository is published whole: what is served, what is kept, and what a kill or a full disk leaves."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import golden, make_bundle

from gpuops.bundle import read_bundle, write_manifest
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.signing import keygen, sign
from gpuops.spec import Signature
from gpuops_serving.client import Client
from gpuops_serving.config import Options, config_text, read_config
from gpuops_serving.repository import deploy, publish, served_versions, withdraw, write_text
from gpuops_serving.server import TritonServer
from gpuops_serving.trust import check_repository
from gpuops_serving.tuning import Tuning

ROOT = Path(__file__).parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hidden(folder: Path) -> list[Path]:
    """What is unfinished; the configuration of a version that is not served on is kept."""
    return [path for path in folder.rglob(".*") if not path.name.startswith(".served-")]


def served(repository: Path) -> list[tuple[int, str]]:
    """(number, first digit of the version id) of the tiny model's versions, once their files are as sealed."""
    if not any(repository.iterdir()):
        return []
    found = served_versions(repository)
    for version in found:
        read_bundle(repository / version.name / str(version.version))
    return [(version.version, version.version_id[0]) for version in found]


def reseal(bundle: Path, **fields: object) -> Path:
    """Write a bundle's manifest again, of the files that are there now."""
    manifest = {**json.loads((bundle / "manifest.json").read_text()), **fields}
    write_manifest(bundle, {key: value for key, value in manifest.items() if key != "sha256"})
    return bundle


def test_deploy_writes_a_version_that_proves_itself(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    made = deploy(bundle, tmp_path / "new" / "repository", name="other")
    assert (made.name, made.version, made.version_id, made.new) == ("other", 1, "1" * 64, True)
    assert made.path == tmp_path / "new" / "repository" / "other" / "1"
    assert sorted(p.name for p in made.path.iterdir()) == ["golden.npz", "manifest.json", "model.onnx", "model.py"]
    for file in ("golden.npz", "manifest.json", "model.onnx"):
        assert (made.path / file).read_bytes() == (bundle / file).read_bytes()
    (found,) = served_versions(tmp_path / "new" / "repository")
    assert (found.name, found.version, found.version_id, found.tolerance) == ("other", 1, "1" * 64, 1e-3)


def test_deploying_the_newest_again_changes_nothing_and_says_so(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    deploy(bundle, repository)
    (repository / "tiny" / "1" / "__pycache__").mkdir()  # as Triton's stub leaves it
    before = tree(repository)
    again = deploy(reseal(bundle, parity={"seconds": 2}), repository)  # as exported again
    assert (again.version, again.new) == (1, False)
    assert tree(repository) == before


def test_other_options_serve_the_same_folder(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    before = tree(deploy(bundle, repository).path)
    tuning = Tuning(2, 1, 2, {"2x1": {4: 100.0}})
    again = deploy(bundle, repository, options=tuning.apply(Options(), 5), tuning=tuning)
    assert (again.version, again.new, tree(again.path)) == (1, True, before)
    config = read_config(repository / "tiny" / "config.pbtxt")
    assert (config.instance_group[0].count, config.parameters["gpuops.micro_batch"].string_value) == (2, "2")
    assert json.loads(config.parameters["gpuops.tuning"].string_value)["rates"] == {"2x1": {"4": 100}}
    assert not deploy(bundle, repository, options=tuning.apply(Options(), 5), tuning=tuning).new


def test_a_withdrawn_version_is_served_again_from_where_it_is(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(make_bundle(tmp_path / "one"), repository)
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64), repository)
    assert withdraw(repository / "tiny", 2) == [1]
    assert served(repository) == [(1, "1")]
    assert deploy(tmp_path / "two", repository).version == 2
    assert served(repository) == [(1, "1"), (2, "2")]


def test_a_damaged_newest_version_is_deployed_afresh_and_not_kept(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    first = deploy(bundle, repository)
    (first.path / "model.onnx").write_bytes(b"broken")
    again = deploy(bundle, repository)
    assert (again.version, again.new, again.kept) == (2, True, ())
    assert served(repository) == [(2, "1")]


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
    assert served(repository) == [(2, "2"), (3, "1")]


def test_a_version_with_another_signature_or_another_format_is_not_kept(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(make_bundle(tmp_path / "one"), repository)
    bundle = make_bundle(tmp_path / "two", version_id="2" * 64)
    signature = Signature.from_json(read_bundle(bundle).manifest["signature"])
    reseal(bundle, signature=Signature(signature.inputs, signature.outputs, 4).to_json())
    assert deploy(bundle, repository).kept == ()
    (bundle / "model.pt2").write_bytes(b"program")
    made = deploy(reseal(bundle), repository, options=Options("python-pt2"))
    assert (made.version, made.kept) == (3, ())  # the folder of version 2 has no model.pt2


def test_another_backend_is_a_version_of_its_own_and_leaves_no_code_behind(tmp_path: Path) -> None:
    keygen(tmp_path / "key", tmp_path / "key.pub")
    bundle, repository, keys = make_bundle(tmp_path / "bundle"), tmp_path / "repository", [tmp_path / "key.pub"]
    sign(bundle, tmp_path / "key")
    deploy(bundle, repository, keys=keys)
    made = deploy(bundle, repository, keys=keys, options=Options("onnxruntime"))
    assert (made.version, made.kept) == (2, ())  # version 1 has a model.py, which nobody signed for this backend
    assert not (made.path / "model.py").exists()
    check_repository(repository, keys)


def test_int8_is_held_to_its_own_tolerance(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model_int8.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    reseal(bundle, int8={"tolerance": 0.25})
    deploy(bundle, tmp_path / "repository", options=Options("python-int8"))
    (found,) = served_versions(tmp_path / "repository")
    assert found.tolerance == 0.25


def test_a_bundle_that_was_signed_later_is_deployed_with_its_signature(tmp_path: Path) -> None:
    keygen(tmp_path / "key", tmp_path / "key.pub")
    bundle, repository, keys = make_bundle(tmp_path / "bundle"), tmp_path / "repository", [tmp_path / "key.pub"]
    deploy(bundle, repository)
    with pytest.raises(IntegrityError, match="not signed"):
        deploy(bundle, repository, keys=keys)
    sign(bundle, tmp_path / "key")
    assert deploy(bundle, repository, keys=keys).new
    assert [version.version for version in served_versions(repository, keys=keys)] == [2]


def test_a_bundle_that_is_exchanged_after_it_was_verified_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keygen(tmp_path / "key", tmp_path / "key.pub")
    bundle, other = make_bundle(tmp_path / "bundle"), make_bundle(tmp_path / "other", version_id="6" * 64)
    sign(bundle, tmp_path / "key")
    copy = shutil.copyfile

    def exchanges(source: Path, destination: Path) -> None:
        copy(other / source.name if (other / source.name).is_file() else source, destination)

    monkeypatch.setattr(shutil, "copyfile", exchanges)
    with pytest.raises(IntegrityError, match="differs from what was signed"):
        deploy(bundle, tmp_path / "repository", keys=[tmp_path / "key.pub"])
    assert list((tmp_path / "repository").iterdir()) == []


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
def test_a_deployment_that_is_interrupted_leaves_the_repository_as_it_was(
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


def prepared(folder: Path, action: str) -> Path:
    """A folder in which `dying.py` can do an action: two bundles, and a repository that serves the old one."""
    make_bundle(folder / "old")
    make_bundle(folder / "new", version_id="2" * 64, gain=0.25)
    if action == "first":
        (folder / "models").mkdir()
        return folder
    deploy(folder / "old", folder / "models")
    if action in ("again", "withdraw"):
        deploy(folder / "new", folder / "models")
    if action == "again":  # a promotion that is done again finds a version that was damaged
        withdraw(folder / "models" / "tiny", 2)
        (folder / "models" / "tiny" / "2" / "model.onnx").write_bytes(b"broken")
    return folder


def deaths(folder: Path, work: Path, action: str, how: str) -> list[int]:
    """Statuses of the forks that `dying.py` let die in WORK/0, WORK/1, ...; the last one did not."""
    program = [sys.executable, Path(__file__).with_name("dying.py"), folder, work, action, how]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    statuses = [json.loads(line) for line in done.stdout.splitlines()]
    assert statuses[-1]["status"] == 0
    return [found["n"] for found in statuses]


OLD, BOTH = [(1, "1")], [(1, "1"), (2, "2")]
DIE = {
    "first": ("deploy", [], [(1, "2")]),
    "deploy": ("deploy", OLD, BOTH),
    "options": ("options", OLD, OLD),
    "warm-up": ("warm-up", OLD, [(2, "2")]),
    "again": ("again", OLD, BOTH),
    "withdraw": ("withdraw", BOTH, OLD),
}
"""Action of dying.py, what is served before and after, by what is prepared."""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "torn"])
@pytest.mark.parametrize("action", DIE)
def test_wherever_a_deployment_is_killed_the_old_versions_are_served_or_the_new_ones(
    tmp_path: Path, action: str, how: str
) -> None:
    does, before, after = DIE[action]
    folder = prepared(tmp_path / "folder", action)
    numbers = deaths(folder, tmp_path / "work", does, how)
    assert len(numbers) > 3
    seen = set()
    for number in numbers:
        at = tmp_path / "work" / str(number)
        found = served(at / "models")
        assert found in (before, after)
        seen.add(found == after)
        repeat(does, at)
        assert served(at / "models") == after
        assert hidden(at) == []  # what the killed one left is gone
    assert seen == ({True, False} if how == "killed" and before != after else {before == after, True})


def repeat(action: str, at: Path) -> None:
    """Do again what was killed."""
    from dying import ACTIONS

    if action == "withdraw" and len(served_versions(at / "models")) == 1:
        return
    ACTIONS[action](at)


@pytest.mark.slow
@pytest.mark.parametrize("action", [name for name in DIE if name != "again"])
def test_a_full_disk_leaves_the_repository_as_it_was(tmp_path: Path, action: str) -> None:
    folder = prepared(tmp_path / "folder", action)
    numbers = deaths(folder, tmp_path / "work", DIE[action][0], "full")
    for number in numbers[:-1]:
        assert tree(tmp_path / "work" / str(number) / "models") == tree(folder / "models")
        assert hidden(tmp_path / "work" / str(number)) == []


@contextmanager
def small_disk(at: Path, size_kib: int) -> Iterator[Path]:
    """A file system of its own of a few KiB."""
    at.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "none", str(at)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no file system may be mounted here: {mount.stderr.strip()}; the limited files above stand in")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_a_disk_that_is_full_is_said_to_be_and_nothing_is_left(tmp_path: Path) -> None:
    bundle, other = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "two", version_id="2" * 64)
    page, refused = 4096, 0
    with small_disk(tmp_path / "disk", 256) as disk:
        deploy(bundle, disk / "models")
        before = tree(disk / "models")
        for free in range(1, 60):  # at some of them the version finds room, and the configuration does not
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - free * page))
            try:
                assert deploy(other, disk / "models").version == 2
                break
            except UnavailableError as error:
                said = str(error)
                refused += 1
            assert re.search(r"tiny could not be written \(No space left on device\).*make room", said)
            assert tree(disk / "models") == before
            assert hidden(disk) == []
            (disk / "other").unlink()
        assert refused > 5
        assert served(disk / "models") == BOTH


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
        versions = served_versions(repository)  # raises if a version and its configuration disagree
        seen.append(versions[-1].version)
    for writer in writers:
        writer.join()
    assert seen == sorted(seen)
    assert [version.version for version in served_versions(repository)] == [count - 1, count]
    assert sorted(p.name for p in (repository / "tiny").iterdir()) == [*map(str, range(1, count + 1)), "config.pbtxt"]


def test_a_bundle_without_onnx_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model.onnx").unlink()
    reseal(bundle)
    with pytest.raises(InputError, match="--formats onnx"):
        deploy(bundle, tmp_path / "repository")


def test_tensorrt_needs_an_engine_that_was_built_for_this_gpu(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    with pytest.raises(InputError, match=r"build it \(trtexec\)"):
        deploy(bundle, repository, options=Options("tensorrt"))
    (tmp_path / "engine").write_bytes(b"plan")
    made = deploy(bundle, repository, options=Options("tensorrt"), plan=tmp_path / "engine")
    assert sorted(p.name for p in made.path.iterdir()) == ["golden.npz", "manifest.json", "model.plan"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "two words", "tiny.candidate"])
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


def test_there_is_nothing_before_the_first_version(tmp_path: Path) -> None:
    deploy(make_bundle(tmp_path / "bundle"), tmp_path / "repository")
    with pytest.raises(InputError, match="no version but 1 to fall back on"):
        withdraw(tmp_path / "repository" / "tiny", 1)


@pytest.mark.slow
def test_what_a_killed_deployment_leaves_does_not_trouble_a_server(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(make_bundle(tmp_path / "one"), repository)
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), repository)
    withdraw(repository / "tiny", 2)  # killed before the configuration named it
    unfinished = repository / "tiny" / ".3.new-abcdefg"  # killed while it was filled
    unfinished.mkdir()
    (unfinished / "model.py").write_text("half of a")
    (repository / "tiny" / ".config.pbtxt-x").write_text("half of a")
    with TritonServer(repository) as server, Client(server.http_url) as client:
        assert [(m.name, m.version, m.state) for m in client.models()] == [("tiny", "1", "READY")]


@pytest.mark.slow
def test_a_server_leaves_no_bytecode_in_a_repository(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(make_bundle(tmp_path / "bundle"), repository, options=Options(instances=2, threads=1))
    before = sorted(repository.rglob("*"))
    with TritonServer(repository):
        assert sorted(repository.rglob("*")) == before
    assert sorted(repository.rglob("*")) == before


@pytest.mark.slow
def test_tags_stand_on_every_version_so_a_version_id_is_not_one_of_them(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    tags = {"team": "weather", "version_id": "2" * 64}
    deploy(make_bundle(tmp_path / "one"), repository, options=Options(tags=tags))
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), repository, options=Options(tags=tags))
    with TritonServer(repository) as server, Client(server.http_url) as client:
        for version in ("1", "2"):
            client.answer("tiny", golden().batch(1).inputs, version)
            assert client.version_id("tiny", version) == version * 64  # what tells it is the configuration
        with urllib.request.urlopen(server.metrics_url) as metrics:
            text = metrics.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("nv_inference_request_success{")]
        assert len(lines) == 2
        for line in lines:  # Triton takes the tag, and it is wrong on version 1
            assert 'team="weather"' in line
            assert f'version_id="{"2" * 64}"' in line


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert os.stat(tmp_path / "file").st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_repository_that_gpuops_0_wrote_is_still_served(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy(make_bundle(tmp_path / "bundle"), repository)
    config = read_config(repository / "tiny" / "config.pbtxt")
    del config.parameters["gpuops.version_id.1"]
    write_text(repository / "tiny" / "config.pbtxt", config_text(config))
    assert served(repository) == OLD


def test_a_version_on_trial_is_not_served(tmp_path: Path) -> None:
    bundle, repository = make_bundle(tmp_path / "bundle"), tmp_path / "repository"
    deploy(bundle, repository)
    publish(read_bundle(bundle), repository, "tiny.candidate", Options(), number=2)
    assert [version.name for version in served_versions(repository)] == ["tiny"]
