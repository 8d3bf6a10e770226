"""Folders of a model repository: what lies there that does not belong, and what is not there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import SIGNATURE, make_bundle

from gpuops.bundle import MANIFEST, read_bundle, write_manifest
from gpuops.errors import InputError, IntegrityError
from gpuops.spec import Signature
from gpuops_serving.config import CONFIG, Options
from gpuops_serving.folders import holds, intact, read_manifest, sources
from gpuops_serving.repository import deploy


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match="deploy its bundle again"):
        read_manifest(tmp_path)
    assert not intact(tmp_path, {})


def _file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


@pytest.mark.parametrize(
    ("place", "put", "says"),
    [
        (".", _file, "models is a file, where"),
        ("tiny", _file, "tiny is a file, where"),
        ("tiny/1", _file, "1 is a file, where"),
        (f"tiny/{CONFIG}", lambda path: path.mkdir(parents=True), f"{CONFIG} is a folder, where"),
    ],
)
def test_what_lies_where_it_does_not_belong_is_named(
    tmp_path: Path, place: str, put: Callable[[Path], None], says: str
) -> None:
    put(tmp_path / "models" / place)
    with pytest.raises(InputError, match=says):
        deploy(make_bundle(tmp_path / "bundle"), tmp_path / "models")


def test_an_empty_path_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match=r"is empty.*write \. for"):
        deploy(bundle, "")
    assert list((tmp_path / "here").iterdir()) == []


def test_the_same_weights_served_otherwise_are_another_version(tmp_path: Path) -> None:
    made = deploy(make_bundle(tmp_path / "bundle"), tmp_path / "models")
    opened = read_bundle(tmp_path / "bundle")
    manifest = {key: value for key, value in opened.manifest.items() if key != "sha256"}

    def there() -> bool:
        bundle = read_bundle(tmp_path / "bundle")
        return holds(made.path, sources(bundle, Options(), None), bundle)

    write_manifest(tmp_path / "bundle", {**manifest, "environment": {"exported": "again"}})
    assert there()
    larger = Signature(SIGNATURE.inputs, SIGNATURE.outputs, SIGNATURE.max_batch + 1)
    write_manifest(tmp_path / "bundle", {**manifest, "signature": larger.to_json()})
    assert not there()
    assert deploy(tmp_path / "bundle", tmp_path / "models").version == 2
