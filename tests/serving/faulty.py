"""Servers whose models are replaced, broken and killed while somebody asks them; and what must never be left behind."""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from tiny_bundle import answers, deployed, golden, make_bundle

from gpuops.bundle import Golden, write_manifest
from gpuops.errors import GpuopsError
from gpuops.lineage.ledger import Ledger
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.client import Client
from gpuops_serving.compare import Limits
from gpuops_serving.repository import deploy
from gpuops_serving.rollout import Outcome, rollout
from gpuops_serving.server import TritonServer

GOLDEN = golden()
ANYTHING = Limits(p50=1e3, p99=1e3)
"""This machine may stall at any time: what these tests judge is not the latency."""


def processes(text: str) -> dict[int, str]:
    """Command lines of living processes that hold `text`, by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in line:
                    found[int(entry.name)] = line
    return found


def stubs(server: TritonServer, model: str = "") -> list[int]:
    """Process ids of a server's stubs, of one model or all."""
    found = processes(server.server_id).items()
    return sorted(pid for pid, line in found if "triton_python_backend_stub" in line and f"/{model}" in line)


def leftovers(server_id: str) -> list[str]:
    """Processes, shared memory and temporary folders of a server."""
    paths = [*Path("/dev/shm").glob(f"{server_id}*"), *Path(tempfile.gettempdir()).glob(f"{server_id}*")]
    return [*processes(server_id).values(), *map(str, paths)]


def rss_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def reseal(bundle: Path, **fields: Any) -> Path:
    """Seal a bundle again, after its files or these fields of its manifest were changed."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    kept = {key: value for key, value in manifest.items() if key not in ("sha256", "files", "schema")}
    write_manifest(bundle, {**kept, **fields})
    return bundle


def sabotaged(start: str = "pass", run: str = "return super().run(inputs)") -> str:
    """What makes a version's shim, appended to it, do something else at its start, or for requests once it is loaded.

    Its own golden self-test comes between the two and is right.
    """
    return f"""

class _Sabotaged(TritonPythonModel):
    loaded = False

    def initialize(self, args):
        folder = args["model_repository"]
        {start}
        super().initialize(args)
        self.loaded = True

    def run(self, inputs):
        if not self.loaded:
            return super().run(inputs)
        {run}


TritonPythonModel = _Sabotaged
"""


LIES = sabotaged(run="return {name: answer + 1 for name, answer in super().run(inputs).items()}")
LIES_PROMOTED = sabotaged(
    'self.off = ".candidate" not in folder',
    "return {name: answer + self.off for name, answer in super().run(inputs).items()}",
)
REFUSES_PROMOTION = sabotaged('refuse("this place") if ".candidate" not in folder else None')


def sabotage(model: Path, text: str) -> None:
    """Append to the shim of a model's newest version in its repository."""
    shim = model / str(max(int(path.name) for path in model.iterdir() if path.name.isdigit())) / "model.py"
    if shim.exists() and text not in shim.read_text():
        shim.write_text(shim.read_text() + text)


class Saboteur(Client):
    """A client that breaks the newest version just before the server loads it."""

    def __init__(self, place: "Place", text: str, timeout_s: float = 30.0) -> None:
        super().__init__(place.server.grpc_url, timeout_s, access=place.server.access)
        self._repository, self._text = place.repository, text

    def load(self, model: str) -> None:
        sabotage(self._repository / model, self._text)
        super().load(model)


class Place:
    """A server whose models can be replaced, and its repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repository = folder, deployed(folder)
        self.start()

    def start(self) -> None:
        """Start the server, or another one for the same repository."""
        self.server = TritonServer(self.repository, control=True, log=self.folder / "triton.log")
        self.server.start()
        self.client = Client(self.server.grpc_url, access=self.server.access)

    def settle(self) -> None:
        """Wait until nothing is loaded or unloaded any more.

        Triton 2.51 sometimes crashes if one model's load fails while another one is being unloaded, as can be when a
        rollout is killed and another one follows at once: about one time in a hundred.
        """
        over = threading.Event()
        for _ in range(1200):
            if not any(state.state.endswith("LOADING") for state in self.client.models()):
                return
            over.wait(0.05)
        raise AssertionError("a model was loaded or unloaded for a minute")

    def close(self) -> None:
        self.client.close()
        self.server.stop()
        assert leftovers(self.server.server_id) == []


class Model:
    """One model of a place: its bundles, its rollouts, its ledger."""

    def __init__(self, place: Place, name: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.place, self.name, self.folder = place, name, folder
        self.repository, self.path = place.repository, place.repository / name
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.beside = sorted(path.name for path in self.repository.iterdir() if not path.name.startswith(name))

    @property
    def client(self) -> Client:
        return self.place.client

    def bundle(self, name: str, **options: Any) -> Path:
        return make_bundle(self.folder / name, version_id=(name * 64)[:64], **options)

    def deploy(self, bundle: Path, **options: Any) -> None:
        """Publish without a rollout, and load."""
        deploy(bundle, self.repository, name=self.name, **options)
        self.client.load(self.name)

    def rollout(self, bundle: Path, client: Client | None = None, **options: Any) -> Outcome:
        arguments = {"count": 20, "limits": ANYTHING, "name": self.name, "ledger": self.ledger, **options}
        return rollout(bundle, self.repository, client or self.client, **arguments)

    def rollout_sabotaged(self, bundle: Path, text: str, timeout_s: float = 30.0, **options: Any) -> Outcome:
        """A rollout of a version whose shim is broken."""
        with Saboteur(self.place, text, timeout_s) as client:
            return self.rollout(bundle, client, **options)

    def serves(self, gain: float, version: str) -> None:
        """What answers who names no version."""
        with Client(self.place.server.grpc_url) as client:
            answer = client.answer(self.name, GOLDEN.inputs)
        assert answer.version == version
        np.testing.assert_allclose(
            answer.outputs["y"], answers(GOLDEN.inputs["a"], GOLDEN.inputs["m"], gain), atol=1e-3
        )

    def clean(self) -> None:
        """No candidate, no state, no lock, no temporary file, and no stranger in the repository."""
        assert sorted(path.name for path in self.repository.iterdir()) == sorted([*self.beside, self.name])
        assert [path.name for path in self.path.iterdir() if path.name.startswith(".")] == []
        ready = {state.name for state in self.client.models() if state.state == "READY"}
        assert {name for name in ready if name.startswith(self.name)} == {self.name}

    def close(self) -> None:
        self.client.unload(self.name)
        self.place.settle()
        shutil.rmtree(self.path, ignore_errors=True)
        self.ledger.close()


class Asking(threading.Thread):
    """Asks a model without a version, all the time; keeps what was wrong and which versions answered.

    Args:
        url: Server.
        model: Model name.
        gains: Gain of each version, by its number; may grow meanwhile.
    """

    def __init__(self, url: str, model: str, gains: dict[str, float]) -> None:
        super().__init__()
        self.url, self.model, self.gains = url, model, gains
        self.wrong: list[str] = []
        self.versions: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        exact = {name: array[:3] for name, array in GOLDEN.inputs.items()}
        with Client(self.url) as client:
            while not self._over.wait(0.003):  # leaves a small machine's cores to what is tested
                try:
                    answer = client.answer(self.model, exact)
                except GpuopsError as error:
                    self.wrong.append(str(error))
                    continue
                self.versions.append(answer.version)
                gain = self.gains.get(answer.version)
                if gain is None or not np.allclose(
                    answer.outputs["y"], answers(exact["a"], exact["m"], gain), atol=1e-3
                ):
                    self.wrong.append(f"version {answer.version} answered something else")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def numbers(self) -> list[int]:
        """Versions that answered, in order, without repetition."""
        found = [int(version) for version in self.versions]
        return [number for place, number in enumerate(found) if place == 0 or found[place - 1] != number]


def doubling_bundle(path: Path, max_batch: int = 5) -> Path:
    """A bundle of y = 2 x on float32, in which NaN means that there is no data."""
    path.mkdir(parents=True)
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path / "model.onnx")
    samples = np.arange(32, dtype=np.float32).reshape(8, 4)
    Golden({"x": samples}, {"y": 2 * samples}).save(path / "golden.npz")
    signature = Signature((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),), max_batch)
    fields = {"name": "doubling", "version_id": "d" * 64, "run_id": "e" * 64, "signature": signature.to_json()}
    empty: dict[str, Any] = {"identity": {}, "sample": {}, "preprocess": {}, "parity": {}, "environment": {}}
    write_manifest(path, {**fields, **empty, "tolerance": 1e-6, "served_batches": list(range(1, max_batch + 1))})
    return path
