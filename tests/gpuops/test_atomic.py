import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpuops.atomic import new_directory
from gpuops.errors import InputError


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "new", overwrite=False) as directory:
        (directory / "file").write_text("whole")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "file").read_text() == "whole"
    assert os.listdir(tmp_path / "deep") == ["new"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.mkdir()
    (target / "file").write_text("old")

    def fail_half_way() -> None:
        with new_directory(target, overwrite=True) as directory:
            (directory / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert (target / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.mkdir()
    (target / "left over").touch()
    with new_directory(target, overwrite=True) as directory:
        (directory / "file").touch()
    assert os.listdir(target) == ["file"]
    assert os.listdir(tmp_path) == ["old"]


def test_an_existing_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--overwrite"), new_directory(tmp_path, overwrite=False):
        pytest.fail("the block ran")


def test_a_kill_leaves_the_destination_as_it_was(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib; from gpuops.atomic import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1]), overwrite=True) as d:\n"
        "    (d / 'file').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "old"
    target.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(target) == []
    assert len(os.listdir(tmp_path)) == 2
    with new_directory(target, overwrite=True) as directory:  # the next one clears up
        (directory / "file").touch()
    assert os.listdir(tmp_path) == ["old"]


def test_a_living_process_keeps_its_directory(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a", overwrite=True) as first:
        with new_directory(tmp_path / "a", overwrite=False) as second:
            assert first.exists()
            (second / "file").write_text("second")
        assert first.exists()
        (first / "file").write_text("first")
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_the_slower_of_two_does_not_overwrite(tmp_path: Path) -> None:
    def slower() -> None:
        with new_directory(tmp_path / "a", overwrite=False):
            (tmp_path / "a").mkdir()

    with pytest.raises(InputError, match="--overwrite"):
        slower()
    assert os.listdir(tmp_path) == ["a"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "file").write_text("old")
    with pytest.raises(InputError, match="--overwrite"), new_directory(tmp_path / "a", overwrite=False):
        pytest.fail("the block ran")
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
