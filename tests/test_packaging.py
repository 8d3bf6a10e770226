"""What the wheel holds, and that the prerequisites are checked before anything is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "gpuops",
        "gpuops_kernels",
        "gpuops_serving",
    }
    needed = {"gpuops/demo/ingest.yaml", "gpuops/demo/run.yaml", "gpuops/demo/forecast.py", "gpuops/demo/baselines.py"}
    assert needed <= set(names)
    assert {f"{name}/py.typed" for name in ("gpuops", "gpuops_kernels", "gpuops_serving")} <= set(names)
    assert "gpuops_serving/shim/model.py" in names


def test_a_missing_prerequisite_is_one_clear_line(tmp_path: Path) -> None:
    for tool in ("bash", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        ["/usr/bin/bash", ROOT / "tools" / "check_prerequisites.sh", sys.executable],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "gpuops: missing git: apt-get install git\n"


def test_no_file_names_this_machine_or_a_registry() -> None:
    """Nothing that is committed holds a path of somebody's machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return  # an unpacked source archive has no list
    home = str(Path.home())
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_bytes()
        assert b"/work/" not in text or name == "tests/test_packaging.py", name
        assert home == "/" or f"{home}/".encode() not in text, name
