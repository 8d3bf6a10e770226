"""The lock and the state of a rollout, where they cannot be kept."""

from pathlib import Path

import pytest
from tiny_bundle import make_bundle

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops_serving.config import CONFIG, Options, read_config, served_version_ids
from gpuops_serving.repository import deploy, withdraw
from gpuops_serving.rollout_state import StateFile


def test_a_lock_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / ".rollout-m.lock").mkdir()
    with pytest.raises(UnavailableError, match=r"rollout-m\.lock cannot be written"), StateFile(tmp_path, "m").alone():
        pass
    (tmp_path / "file").write_text("")
    for repository in (tmp_path / "file", tmp_path / "gone"):
        with pytest.raises(InputError, match="is no folder here"), StateFile(repository, "m").alone():
            pass


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 100_000])
def test_a_state_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    states = StateFile(tmp_path, "m")
    assert states.read() is None
    states.path.write_text(text)
    with pytest.raises(IntegrityError, match="remove it"):
        states.read()


@pytest.mark.parametrize("first", ["onnxruntime", "python"])
def test_falling_back_serves_a_version_as_it_was_served(tmp_path: Path, first: str) -> None:
    """The newest one may run in another backend, which the one before has no files for."""
    model = tmp_path / "models" / "tiny"
    before = Options(first, tags={"team": "a"})
    deploy(make_bundle(tmp_path / "one"), tmp_path / "models", options=before)
    text = (model / CONFIG).read_text()
    (model / "1" / "model.onnx").rename(model / "1" / "kept")  # what version 2 needs is not there: it is served alone
    deploy(make_bundle(tmp_path / "two", version_id="2" * 64, gain=0.25), tmp_path / "models", options=Options())
    assert list(served_version_ids(read_config(model / CONFIG))) == [2]
    (model / "1" / "kept").rename(model / "1" / "model.onnx")
    assert withdraw(model, 2) == [1]
    assert (model / CONFIG).read_text() == text
