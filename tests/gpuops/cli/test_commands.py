"""Every command as a user types it; what goes wrong is one line, an exit code and nothing left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from gpuops.lineage.ledger import Ledger
from gpuops_serving.client import Client
from tests.conftest import Job, run_cli, write_atlas

COMMANDS = (
    "demo", "doctor", "ingest", "inspect", "train", "energy", "export", "verify", "keygen", "sign", "deploy", "publish",
    "fetch", "serve", "rollout", "rollback", "route", "infer", "compare", "bench", "probe", "lint", "meter", "report",
)  # fmt: skip


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode not in (0, -signal.SIGKILL), done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("gpuops: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


@contextmanager
def served(job: Job, repository: Path) -> Iterator[list[str]]:
    arguments = ["serve", str(repository), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuops.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GPUOPS_LEDGER": str(job.ledger)},
    )
    try:
        assert process.stdout is not None
        yield [process.stdout.readline().strip() for _ in range(3)]
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_help_lists_every_command() -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert f"gpuops {command}" in " ".join(done.stdout.split())


def test_no_command_prints_help_and_fails() -> None:
    done = run_cli()
    assert done.returncode == 2
    assert "ingest" in done.stdout


def test_doctor_finds_this_machine_fit() -> None:
    done = run_cli("doctor", "--json")
    assert done.returncode == 0, done.stdout
    findings = {finding["what"]: finding["level"] for finding in json.loads(done.stdout)}
    assert findings["tritonserver"] == "ok"
    assert findings["extra data"] == "ok"


def test_doctor_on_a_store(stored: Job) -> None:
    done = run_cli("doctor", stored.store, "--json")
    assert done.returncode == 0
    findings = json.loads(done.stdout)
    assert {"what": "turbidity", "level": "ok"}.items() <= next(f for f in findings if f["what"] == "turbidity").items()


def test_inspect_shows_identity_layout_and_statistics(stored: Job) -> None:
    document = json.loads(run_cli("inspect", stored.store, "--json").stdout)
    assert len(document["fingerprint"]) == 64
    turbidity = document["variables"]["turbidity"]
    assert turbidity["shape"] == [32, 12, 20, 20]
    assert turbidity["checksummed"]
    with h5py.File(stored.root / "turbidity.h5") as file:
        values = file["LinkeTurbidity"][:] * 0.05
    assert turbidity["statistics"]["mean"] == pytest.approx(values.mean())
    assert turbidity["statistics"]["std"] == pytest.approx(values.std())
    words = run_cli("inspect", stored.store).stdout
    assert "zstd+checksum" in words
    assert document["snapshot"] in words


def test_serve_and_infer_over_both_protocols(bundled: Job, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deployed = run_cli("deploy", bundled.bundle, repository, "--json", GPUOPS_LEDGER=str(bundled.ledger))
    assert json.loads(deployed.stdout)["version"] == 1
    again = run_cli("deploy", bundled.bundle, repository, GPUOPS_LEDGER=str(bundled.ledger))
    assert "already" in again.stdout
    reports = []
    with served(bundled, repository) as urls:
        assert [url.partition(":")[0] for url in urls] == ["http", "grpc", "http"]
        with Client(urls[0]) as client:
            server_id = client.server_id()
        assert any(name.startswith(server_id) for name in os.listdir("/dev/shm"))
        for url in urls[:2]:
            asked = ("infer", "forecast", "--from", bundled.store, "--server", url, "--requests", "5")
            done = run_cli(*asked, "--check", bundled.bundle, "--json")
            assert done.returncode == 0, done.stderr
            reports.append(tmp_path / f"{url.partition(':')[0]}.json")
            reports[-1].write_text(done.stdout)
            report = json.loads(done.stdout)
            assert report["max_abs_diff"] <= 1e-5
            assert report["server_version"] == "2.51.0"
            assert report["energy"]["joules_per_request"] is None
            assert report["energy"]["reason"]
        done = run_cli(*asked, "--samples", "40", "--out", tmp_path / "answers.npz")
        assert done.returncode == 0, done.stderr
        assert np.load(tmp_path / "answers.npz")["output/y"].shape == (40, 1, 20, 20)
        assert_one_line(run_cli("infer", "nothing", "--from", bundled.store, "--server", urls[0]), "it serves forecast")
        assert_one_line(run_cli("infer", "forecast", "--from", tmp_path, "--server", urls[0]), "not a Zarr group")
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(server_id)]
    page = tmp_path / "report.html"
    done = run_cli("report", bundled.run, "--bundle", bundled.bundle, "--infer", *reports, "--out", page)
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 5
    assert "src='http" not in html
    manifest = json.loads((bundled.bundle / "manifest.json").read_text())
    assert manifest["version_id"] in html
    with Ledger(bundled.ledger) as ledger:
        assert {"ingest", "run", "export", "deploy", "serve"} <= {event.kind for event in ledger.events()}
        ledger.verify()


def test_no_server_at_an_address(stored: Job) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert_one_line(run_cli("infer", "m", "--from", stored.store, "--server", url), "no answer", url)


def test_a_port_in_use(bundled: Job, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    run_cli("deploy", bundled.bundle, repository, cwd=tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        free = ("--grpc-port", "0", "--metrics-port", "0")
        assert_one_line(run_cli("serve", repository, "--http-port", port, *free, cwd=tmp_path), port, "--http-port")


def test_no_tritonserver(bundled: Job, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    run_cli("deploy", bundled.bundle, repository, cwd=tmp_path)
    done = run_cli("serve", repository, "--tritonserver", tmp_path / "nothing", cwd=tmp_path)
    assert_one_line(done, "no tritonserver", "nvidia-pytriton")
    assert done.returncode == 4


def test_a_bundle_with_one_byte_changed(bundled: Job, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundled.bundle, copy)
    model = bytearray((copy / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (copy / "model.onnx").write_bytes(bytes(model))
    for command in (("verify", copy), ("deploy", copy, tmp_path / "repository")):
        done = run_cli(*command, cwd=tmp_path)
        assert_one_line(done, "model.onnx")
        assert done.returncode == 5
    assert not list((tmp_path / "repository").glob("*/*"))


@pytest.mark.slow
def test_verify_proves_a_bundle_again(bundled: Job) -> None:
    document = json.loads(run_cli("verify", bundled.bundle, "--json").stdout)
    assert document["parity"].keys() == {"pt2", "onnx"}


class TestIngest:
    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Path:
        return write_atlas(tmp_path)

    def refused(self, recipe: Path, *words: str, change: dict | None = None) -> None:
        if change is not None:
            document = yaml.safe_load(recipe.read_text())
            document["variables"]["turbidity"] |= change
            recipe.write_text(yaml.safe_dump(document))
        before = {path.name for path in recipe.parent.iterdir()} - {"ledger.sqlite"}
        done = run_cli("ingest", recipe, cwd=recipe.parent)
        assert_one_line(done, *words)
        assert {path.name for path in recipe.parent.iterdir()} - {"ledger.sqlite"} == before

    def test_missing_file(self, recipe: Path) -> None:
        (recipe.parent / "turbidity.h5").unlink()
        self.refused(recipe, "turbidity.h5 does not exist")

    def test_truncated_file(self, recipe: Path) -> None:
        file = recipe.parent / "turbidity.h5"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        self.refused(recipe, "truncated or not HDF5")

    def test_missing_dataset(self, recipe: Path) -> None:
        self.refused(
            recipe, "no dataset 'Nope'", "LinkeTurbidity", change={"source": f"{recipe.parent}/turbidity.h5#Nope"}
        )

    def test_missing_dimension(self, recipe: Path) -> None:
        self.refused(recipe, "latitude", change={"dims": ["north", "longitude", "month"]})

    def test_broken_rule(self, recipe: Path) -> None:
        self.refused(recipe, "turbidity[", "valid_max 3", change={"quality": {"valid_max": 3.0}})

    def test_unknown_key(self, recipe: Path) -> None:
        self.refused(recipe, "colour", change={"colour": "red"})

    def test_existing_store(self, stored: Job) -> None:
        before = json.loads(run_cli("inspect", stored.store, "--json").stdout)["snapshot"]
        assert_one_line(run_cli("ingest", stored.recipe, GPUOPS_LEDGER=str(stored.ledger)), "--overwrite")
        assert json.loads(run_cli("inspect", stored.store, "--json").stdout)["snapshot"] == before

    def test_termination_leaves_nothing(self, recipe: Path) -> None:
        """SIGTERM while shards are written: no half store, no temporary directory."""
        code = (
            "import os, signal, sys, gpuops.data.writing.ingest as i\n"
            "write = i._write_shard\n"
            "def dying(*a):\n    os.kill(os.getpid(), signal.SIGTERM); return write(*a)\n"
            "i._write_shard = dying\n"
            "from gpuops.cli import main; main(['ingest', sys.argv[1]])"
        )
        command = [sys.executable, "-c", code, str(recipe)]
        done = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, timeout=120)
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
        left = {path.name for path in recipe.parent.iterdir()} - {"ledger.sqlite"}
        assert left == {"turbidity.h5", "altitude.h5", "ingest.yaml"}


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_a_store_that_is_not_zarr(tmp_path: Path, command: str) -> None:
    assert_one_line(run_cli(command, tmp_path), "not a Zarr group")
    assert_one_line(run_cli(command, tmp_path / "nothing"), "does not exist")
    assert not (tmp_path / "nothing").exists()


def test_the_recipe_can_be_copied(tmp_path: Path) -> None:
    done = run_cli("demo", "--recipe", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "ingest.yaml",
        "run.yaml",
        "forecast.py",
        "baselines.py",
    }
    assert_one_line(run_cli("demo", "--recipe", tmp_path / "mine"), "exists")


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    write_atlas(tmp_path)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gpuops.cli", "doctor", "--json"]
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
