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
