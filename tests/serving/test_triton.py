"""A Triton that we did not build: golden requests, verdicts, and what a client makes of models that lie."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import Foreign, foreign_server, write_repository
from tiny_bundle import deployed

from gpuops.errors import GpuopsError, InputError, IntegrityError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits
from gpuops_serving.recorded import read_inputs
from gpuops_serving.server import TritonServer
from gpuops_serving.shared_memory import SharedMemory
from gpuops_serving.triton import Triton

ROOT = Path(__file__).parents[2]
X = np.arange(6, dtype=np.float32).reshape(2, 3)
K = np.array([1, 2], np.int32)
FLAT = {"x": X, "k": K}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    folder = tmp_path_factory.mktemp("foreign")
    repository = write_repository(folder / "models")
    before = bytes_of(repository)
    with foreign_server(repository, folder) as running:
        yield running
    assert bytes_of(repository) == before  # whatever was asked of it


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, foreign: Foreign) -> str:
    return foreign.http_url if request.param == "http" else foreign.grpc_url


@pytest.fixture
def triton(url: str) -> Iterator[Triton]:
    with Triton(url, timeout_s=60) as opened:
        yield opened


def bytes_of(repository: Path) -> dict[str, str]:
    """Digests of all files but the bytecode that Triton's own stub writes."""
    files = (p for p in repository.rglob("*") if p.is_file() and p.parent.name != "__pycache__")
    return {str(p.relative_to(repository)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def how(code: int) -> dict[str, Any]:
    """A request that makes a fickle model misbehave."""
    return {"x": np.full((2, 3), code, np.float32)}


def test_every_model_that_can_be_held_to_its_answers_is_recorded_and_later_answers_the_same(
    triton: Triton, tmp_path: Path
) -> None:
    said: list[str] = []
    recording = triton.record(tmp_path / "goldens", say=said.append, inputs={"flat": FLAT})
    recorded = [f"{r.model}:{r.version}" for r in recording.recorded]
    ready = ["affine:1", "affine:2", "chain:1", "flat:1", "noisy:1"]
    assert [name for name in recorded if name.split(":")[0] not in ("fickle", "doomed", "hollow")] == ready
    for name, reason in {
        "counter:1": "holds state",
        "stream:1": "decoupled.*answers a request more than once",
        "text:1": r"input 's' is TYPE_STRING: give inputs for 'text'",
    }.items():
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(recording.skipped[name])
    assert len(said) == len(recorded) + len(recording.skipped)
    json.dumps(recording.to_json(), allow_nan=False)

    health = triton.probe(tmp_path / "goldens", only=[name.split(":")[0] for name in ready])
    assert health.ok
    assert [(f"{f.model}:{f.version}", f.ok, f.says_ready, f.reason) for f in health.findings] == [
        (name, True, True, None) for name in ready
    ]
    assert all(f.ms is not None and f.ms > 0 for f in health.findings)
    document = json.loads(json.dumps(health.to_json(), allow_nan=False))
    assert document["ok"] is True
    assert document["findings"][0]["model"] == "affine"


def test_ready_versions_without_a_golden_request_are_named(triton: Triton, tmp_path: Path) -> None:
    triton.record(tmp_path / "goldens", only=["affine"])
    (tmp_path / "goldens" / "affine-2" / "recorded.json").unlink()
    health = triton.probe(tmp_path / "goldens")
    assert health.ok
    assert {"affine:2", "chain:1", "text:1"} <= set(health.unknown)
    assert "affine:1" not in health.unknown
    assert triton.probe(tmp_path / "goldens", only=["affine"]).unknown == ["affine:2"]


def test_a_model_whose_process_died_is_found_though_the_server_says_that_it_is_ready(
    foreign: Foreign, tmp_path: Path
) -> None:
    with Triton(foreign.http_url, timeout_s=60) as triton:
        recording = triton.record(tmp_path / "goldens", only=["doomed", "affine"])
        (tolerance,) = (r.tolerance["y"] for r in recording.recorded if r.model == "doomed")
        assert tolerance == pytest.approx(4e-3, rel=0.01)  # it answers one sample otherwise than a batch
        assert triton.probe(tmp_path / "goldens").ok
        with pytest.raises(UnavailableError, match="not healthy"):
            triton.client.infer("doomed", how(-105))
        with urllib.request.urlopen(f"{foreign.http_url}/v2/models/doomed/ready") as answer:
            assert answer.status == 200
        health = triton.probe(tmp_path / "goldens")
    assert not health.ok
    dead = {f.model: f for f in health.findings if not f.ok}
    assert set(dead) == {"doomed"}
    assert dead["doomed"].says_ready is True
    assert dead["doomed"].ms is None
    assert "not healthy" in str(dead["doomed"].reason)


def test_a_model_that_answers_emptily_is_found_though_every_answer_is_a_success(
    foreign: Foreign, tmp_path: Path
) -> None:
    with Triton(foreign.http_url, timeout_s=60) as triton:
        triton.record(tmp_path / "goldens", only=["hollow"])
        with pytest.raises(IntegrityError):
            triton.client.infer("hollow", how(-106))
        health = triton.probe(tmp_path / "goldens")
        (statistics,) = triton.client.statistics("hollow")
    assert [(f.ok, f.says_ready) for f in health.findings] == [(False, True)]
    assert "too few bytes" in str(health.findings[0].reason)
    assert statistics["inference_stats"]["fail"]["count"] == 0


def test_a_version_that_answers_otherwise_is_found_and_how_far_off_it_is(triton: Triton, tmp_path: Path) -> None:
    triton.record(tmp_path / "goldens", only=["affine"])
    about = tmp_path / "goldens" / "affine-1" / "recorded.json"
    about.write_text(about.read_text().replace('"version": "1"', '"version": "2"'))  # it answers 2 x + 1
    found = {f.ok: f for f in triton.probe(tmp_path / "goldens").findings if f.version == "2"}
    assert found[True].max_abs_diff == 0.0
    assert found[False].max_abs_diff == pytest.approx(1.0)
    assert "answers otherwise than recorded: y by 1" in str(found[False].reason)


def test_answers_that_vary_get_that_much_tolerance_and_keep_their_nans(triton: Triton, tmp_path: Path) -> None:
    ((recorded,)) = triton.record(tmp_path / "goldens", only=["noisy"]).recorded
    assert np.isnan(recorded.outputs["y"][:, 1]).all()
    assert np.isinf(recorded.outputs["y"][:, 2]).all()
    assert 0.005 < recorded.tolerance["y"] < 0.2
    assert all(triton.probe(tmp_path / "goldens").ok for _ in range(20))
    for place, value in ((0, recorded.outputs["y"][0, 0] + 1), (1, 0.0), (2, 0.0), (2, -np.inf), (0, np.nan)):
        answer = recorded.outputs["y"].copy()
        answer[0, place] = value
        assert "answers otherwise" in str(recorded.wrong({"y": answer}))


def test_an_answer_without_any_number_is_no_golden_request(triton: Triton, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fickle:1: its answer holds no number at all: give inputs that it takes"):
        triton.record(tmp_path / "goldens", only=["fickle"], inputs={"fickle": how(-108)})
    assert not (tmp_path / "goldens").exists()


def test_models_that_need_real_inputs_take_them_from_files(triton: Triton, tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", **FLAT)  # type: ignore[arg-type]
    np.savez(tmp_path / "words.npz", s=np.array([["grüß", ""]]), b=np.array([b"ab"]))
    words, flat = read_inputs(tmp_path / "words.npz"), read_inputs(tmp_path / "flat.npz")
    assert words["s"].tolist() == [["grüß".encode(), b""]]
    assert words["b"].tolist() == [b"ab"]
    (recorded,) = triton.record(tmp_path / "goldens", only=["flat"], inputs={"flat": flat}).recorded
    assert recorded.outputs["y"].tolist() == (2 * FLAT["x"]).tolist()
    assert recorded.outputs["i"].tolist() == [2]
    assert recorded.outputs["b"].dtype.name == "bfloat16"
    assert recorded.outputs["b"].astype(np.float32).tolist() == [0.0, 1.0, 2.0]
    assert triton.probe(tmp_path / "goldens").ok
    with pytest.raises(InputError, match="no ready model 'words'"):
        triton.record(tmp_path / "more", inputs={"flat": flat, "words": words})
    np.save(tmp_path / "one.npy", FLAT["x"])
    (tmp_path / "flat.npz").write_bytes(b"PK\x03\x04")
    for name in ("flat.npz", "one.npy", "gone.npz"):
        with pytest.raises(InputError, match=r"numpy\.savez"):
            read_inputs(tmp_path / name)


def test_what_was_recorded_survives_only_whole(triton: Triton, tmp_path: Path) -> None:
    triton.record(tmp_path / "goldens", only=["affine"])
    with pytest.raises(InputError, match="exists"):
        triton.record(tmp_path / "goldens", only=["affine"])
    place = tmp_path / "goldens" / "affine-1"
    for file, content in (("recorded.npz", b"PK\x03\x04"), ("recorded.json", b'{"model": "affine"}')):
        kept = (place / file).read_bytes()
        (place / file).write_bytes(content)
        with pytest.raises(InputError, match=r"affine-1 holds no golden request.*record it again"):
            triton.probe(tmp_path / "goldens")
        (place / file).write_bytes(kept)
    assert triton.probe(tmp_path / "goldens").ok
    with pytest.raises(InputError, match="--record"):
        triton.probe(tmp_path)
    with pytest.raises(InputError, match="no golden request of chain"):
        triton.probe(tmp_path / "goldens", only=["chain"])


def test_a_server_that_is_away_is_found_by_its_golden_requests(foreign: Foreign, tmp_path: Path) -> None:
    with Triton(foreign.http_url) as triton:
        triton.record(tmp_path / "goldens", only=["affine"])
    with Triton("http://127.0.0.1:9", timeout_s=2) as away:
        health = away.probe(tmp_path / "goldens")
        with pytest.raises(UnavailableError):
            away.record(tmp_path / "more")
    assert [(f.ok, f.says_ready, f.ms) for f in health.findings] == [(False, None, None)] * 2
    assert health.unknown == []


def test_a_version_that_does_the_same_passes_and_one_that_does_not_is_a_verdict(triton: Triton) -> None:
    lenient = Limits(p50=100.0, p99=100.0, distance=0.5)  # the machine may be busy; speed is not what is looked at
    same = triton.compare("affine:1", "affine:1", count=40, limits=lenient)
    assert same.ok, same.reasons
    assert same.distances["y"].max_abs == 0.0
    assert same.new.failed == 0
    other = triton.compare("affine:1", "affine:2", count=40, limits=lenient)
    assert not other.ok
    assert other.distances["y"].max_abs == pytest.approx(1.0)
    gone = triton.compare("affine:1", "affine:4", count=10, limits=lenient)
    assert gone.new.failed == gone.new.requests
    assert not gone.ok
    assert triton.compare("flat:1", "flat:1", count=10, limits=lenient).ok  # whose first axis is not of samples
    json.dumps(other.to_json())
    with pytest.raises(InputError, match="MODEL:VERSION"):
        triton.compare("affine", "affine:2")


SLIM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "zarr", "onnx", "onnxruntime", "lightning", "dask", "xarray", "numcodecs",
                                  "icechunk", "cryptography", "matplotlib", "h5py", "scipy", "triton"}:
            raise ImportError(f"{name} is not in the base install")

sys.meta_path.insert(0, Refuse())
from gpuops_serving.triton import Triton
url, folder = sys.argv[1:]
with Triton(url) as triton:
    print(len(triton.record(folder, only=["affine", "chain"]).recorded), triton.probe(folder).ok)
    print(triton.warnings()[0][:13])
    print(triton.compare("affine:1", "affine:2", count=4).new.failed)
    triton.meter().close()
"""


def test_all_of_it_works_from_the_slim_base_install(foreign: Foreign, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SLIM, foreign.http_url, str(tmp_path / "goldens")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "3 True\nTriton 2.51.0\n0\n"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (-101, "'y' as float64, its configuration says float32"),
        (-102, r"'y' with shape \[1, 3\] for 2 samples"),
        (-103, r"'y' with shape \[2, 5\], its configuration says \[n, 3\]"),
        (-104, r"'y' with too few bytes for its shape \[2, 3\]"),
        (-107, "'z' which its configuration does not have|without 'y'"),
    ],
)
def test_an_answer_that_is_not_what_the_model_promises_is_an_error(url: str, code: int, says: str) -> None:
    with Client(url) as client:
        with pytest.raises(IntegrityError, match=says):
            client.infer("fickle", how(code))
        assert client.infer("fickle", {"x": X})["y"].tolist() == (2 * X).tolist()


@pytest.mark.parametrize("code", [-101, -102, -103, -104, -107])
def test_an_answer_into_shared_memory_that_is_not_what_the_model_promises_is_an_error(url: str, code: int) -> None:
    with Client(url) as client, SharedMemory(client, "fickle") as region:
        assert region.infer({"x": X})["y"].tolist() == (2 * X).tolist()  # and lies in the region from now on
        with pytest.raises(GpuopsError):
            region.infer(how(code))
    with Client(url) as client, SharedMemory(client, "fickle") as region:
        assert region.infer({"x": X + 1})["y"].tolist() == (2 * X + 2).tolist()


def test_a_model_without_batch_axis_is_asked_as_it_is_and_says_what_it_takes(url: str) -> None:
    with Client(url) as client:
        for count in (1, 3):
            x = np.ones((count, 3), np.float32)
            found = client.infer("flat", {"x": x, "k": K})
            assert (found["y"].shape, found["i"].tolist()) == ((count, 3), [count])
        with pytest.raises(InputError, match=r"'flat' takes x float32 \[-1, 3\], k int32 \[2\]$"):
            client.infer("flat", {"x": X.astype(np.float64), "k": K})
        with pytest.raises(InputError, match="without shared memory"):
            SharedMemory(client, "flat")


def test_the_golden_requests_of_a_repository_of_ours_are_asked_of_any_server(
    server: TritonServer, foreign: Foreign, tmp_path: Path
) -> None:
    repository = deployed(tmp_path)
    with Triton(server.grpc_url) as triton:
        health = triton.probe_repository(repository)
        assert health.ok
        assert [(f.model, f.version, f.says_ready) for f in health.findings] == [("tiny", "1", True)]
        assert health.unknown == []
        others = deployed(tmp_path / "other", version_id="9" * 64)
        (finding,) = triton.probe_repository(others).findings
        assert not finding.ok
        assert "serves version id 111" in str(finding.reason)
        with pytest.raises(InputError, match="holds no other"):
            triton.probe_repository(repository, only=["other"])
    with Triton(foreign.http_url) as triton:
        (finding,) = triton.probe_repository(repository).findings
    assert (finding.ok, finding.says_ready) == (False, False)
    assert "unknown model" in str(finding.reason)
