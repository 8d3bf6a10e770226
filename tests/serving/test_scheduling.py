"""Queues, priorities, sequences, caches, rate limits and ensembles, seen to do what they say in the real server."""

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from tiny_bundle import golden, make_bundle
from tritonclient.utils import InferenceServerException

from gpuops.spec import Signature, TensorSpec
from gpuops_serving.binary import find_tritonserver
from gpuops_serving.client import Client
from gpuops_serving.config import Options, config_text, own_config
from gpuops_serving.repository import deploy, write_text
from gpuops_serving.scheduling import Batching, Queue, RateLimit, Resource, Sequences
from gpuops_serving.server import TritonServer

pytestmark = pytest.mark.slow

SIGNATURE = Signature((TensorSpec("v", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),), 1)

TENSORS = """
import numpy as np
import triton_python_backend_utils as triton

class Exported:
    def __init__(self, value):
        self.array = np.full((1, 1), value, np.float32)
    def __dlpack__(self, **unused):
        import ctypes
        capsule = self.array.__dlpack__()
        ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
        return capsule
    def __dlpack_device__(self):
        return (1, 0)

def value(request, name):
    return float(np.from_dlpack(triton.get_input_tensor_by_name(request, name)).ravel()[0])

def answer(value):
    return triton.InferenceResponse([triton.Tensor.from_dlpack("y", Exported(value))])
"""
GATE = (
    TENSORS
    + """
import time
from pathlib import Path

HERE = Path(__file__).parent

def tell(text):
    with (HERE / "told").open("a") as stream:
        stream.write(text + "\\n")

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            number = value(request, "v")
            tell(f"begin {number:g}")
            while not (HERE / "open").exists():
                time.sleep(0.002)
            tell(f"end {number:g}")
            answers.append(answer(number))
        return answers
"""
)
"""Answers with its input, as soon as there is a file `open`; tells what it begins and ends."""
SUM = (
    TENSORS
    + """
class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}
    def execute(self, requests):
        answers = []
        for request in requests:
            key = value(request, "CORRID")
            if value(request, "START"):
                self.sums[key] = 0.0
            self.sums[key] += value(request, "v")
            answers.append(answer(self.sums[key]))
            if value(request, "END"):
                del self.sums[key]
        return answers
"""
)
"""Answers with the sum of what its sequence has sent."""


def wait_for(found: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with a cache and a rate limiter that our models are loaded into."""
    folder = tmp_path_factory.mktemp("scheduling")
    bundle = make_bundle(folder / "bundle")
    deploy(bundle, folder / "models", name="cached", options=Options(cache=True))
    caches = find_tritonserver().resolve().parents[1] / "caches"
    flags = (f"--cache-directory={caches}", "--cache-config=local,size=4194304", "--rate-limit=execution_count")
    with TritonServer(folder / "models", control=True, flags=flags, log=folder / "log") as server:
        yield server


class Own:
    """A model.py of one's own in the live server, and requests to it."""

    def __init__(self, server: TritonServer, name: str, code: str, options: Options) -> None:
        self.server, self.name = server, name
        self.folder = server._repository / name / "1"
        self.folder.mkdir(parents=True)
        (self.folder / "model.py").write_text(code)
        write_text(self.folder.parent / "config.pbtxt", config_text(own_config(name, SIGNATURE, options)))
        with Client(server.http_url, access=server.access) as client:
            client.load(name)
        self.threads = ThreadPoolExecutor(8)

    def ask(self, value: float, **how: Any) -> "Future[float]":
        return self.threads.submit(self.answer, value, **how)

    def answer(self, value: float, **how: Any) -> float:
        tensor = tritonclient.http.InferInput("v", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.full((1, 1), value, np.float32))
        address = self.server.http_url.removeprefix("http://")
        with tritonclient.http.InferenceServerClient(address, network_timeout=120.0) as client:
            return float(client.infer(self.name, [tensor], **how).as_numpy("y")[0, 0])

    def told(self, word: str = "begin") -> list[int]:
        file = self.folder / "told"
        lines = file.read_text().splitlines() if file.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(word)]

    def wait_for_begin(self, value: int) -> None:
        wait_for(lambda: value in self.told(), f"{self.name} beginning {value}")

    def wait_for_queue(self, size: int) -> None:
        wait_for(lambda: pending(self.server, self.name) == size, f"{size} waiting requests of {self.name}")

    def open(self) -> None:
        (self.folder / "open").touch()


def pending(server: TritonServer, model: str) -> int:
    with urllib.request.urlopen(server.metrics_url) as metrics:
        for line in metrics.read().decode().splitlines():
            if line.startswith("nv_inference_pending_request_count") and f'model="{model}"' in line:
                return int(float(line.split()[-1]))
    return 0


def test_a_cached_answer_is_counted_and_is_the_same(live: TritonServer) -> None:
    def hits() -> int:
        (found,) = client.statistics("cached")
        return int(found["inference_stats"]["cache_hit"]["count"])

    asked = golden(seed=7).batch(2).inputs
    with Client(live.http_url) as client:
        before = hits()
        first = client.infer("cached", asked)["y"]
        assert hits() == before
        np.testing.assert_array_equal(client.infer("cached", asked)["y"], first)
        assert hits() == before + 1
        client.infer("cached", golden(seed=8).batch(2).inputs)
        assert hits() == before + 1


def test_the_urgent_request_overtakes_those_that_wait(live: TritonServer) -> None:
    model = Own(live, "urgent", GATE, Options(batching=Batching(priorities=2, default_priority=2)))
    requests = [model.ask(0)]
    model.wait_for_begin(0)
    for place, how in enumerate(({}, {}, {"priority": 1})):
        requests.append(model.ask(place + 1, **how))
        model.wait_for_queue(place + 1)
    model.open()
    assert [request.result(60) for request in requests] == [0, 1, 2, 3]
    assert model.told() == [0, 3, 1, 2]


def test_a_full_queue_rejects_at_once_and_only_its_own_priority(live: TritonServer) -> None:
    queues = Batching(queue_size=4, priorities=2, default_priority=1, queues={2: Queue(1)})
    model = Own(live, "short", GATE, Options(batching=queues))
    first = model.ask(0)
    model.wait_for_begin(0)
    second = model.ask(1, priority=2)
    model.wait_for_queue(1)
    with pytest.raises(InferenceServerException, match="Exceeds maximum queue size"):
        model.answer(2, priority=2)
    third = model.ask(3)
    model.wait_for_queue(2)
    model.open()
    assert [request.result(60) for request in (first, second, third)] == [0, 1, 3]


@pytest.mark.parametrize("late", [False, True])
def test_a_request_that_waited_too_long_is_rejected_or_answered_late(live: TritonServer, late: bool) -> None:
    batching = Batching(timeout_us=1 if late else 2_000_000, late=late)
    model = Own(live, f"impatient-{late}", GATE, Options(batching=batching))
    first = model.ask(0)
    model.wait_for_begin(0)
    second = model.ask(1)
    if late:
        model.wait_for_queue(1)
    else:  # while the first one still runs
        with pytest.raises(InferenceServerException, match="timeout expired"):
            second.result(60)
    model.open()
    assert first.result(60) == 0
    assert not late or second.result(60) == 1


def test_only_a_request_that_may_bring_its_own_limit_is_held_to_it(live: TritonServer) -> None:
    for allowed in (False, True):
        batching = Batching(timeout_us=60_000_000, client_timeout=allowed)
        model = Own(live, f"own-limit-{allowed}", GATE, Options(batching=batching))
        first = model.ask(0)
        model.wait_for_begin(0)
        second = model.ask(1, timeout=1)
        if allowed:
            with pytest.raises(InferenceServerException, match="timeout expired"):
                second.result(60)
        else:
            model.wait_for_queue(1)
        model.open()
        assert first.result(60) == 0
        assert allowed or second.result(60) == 1


@pytest.mark.parametrize("candidates", [0, 4])
def test_a_sequence_finds_its_state_and_not_another_ones(live: TritonServer, candidates: int) -> None:
    sequences = Sequences(60_000_000, candidates, end="END")
    model = Own(live, f"sum-{candidates}", SUM, Options(instances=2, batching=sequences))
    totals: dict[int, list[float]] = {11: [], 12: []}
    for step in range(4):
        for sequence in totals:
            how = {"sequence_id": sequence, "sequence_start": step == 0, "sequence_end": step == 3}
            totals[sequence].append(model.answer(step + sequence, **how))
    assert totals == {11: [11.0, 23.0, 36.0, 50.0], 12: [12.0, 25.0, 39.0, 54.0]}
    with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
        model.answer(1)
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        model.answer(1, sequence_id=11)


def test_a_sequence_that_is_silent_for_too_long_ends(live: TritonServer) -> None:
    model = Own(live, "sum-idle", SUM, Options(batching=Sequences(1000, end="END")))
    assert model.answer(1, sequence_id=5, sequence_start=True) == 1

    def ended() -> bool:
        threading.Event().wait(0.05)  # longer than it may be silent
        try:
            model.answer(1, sequence_id=5)
        except InferenceServerException as error:
            return "must specify the START flag" in str(error)
        return False

    wait_for(ended, "the end of the sequence")


def test_instances_that_need_one_resource_run_one_after_the_other(live: TritonServer) -> None:
    limit = RateLimit((Resource("disk", 1, everywhere=True),))
    first = Own(live, "first", GATE, Options(limit=limit))
    second = Own(live, "second", GATE, Options(limit=limit))
    free = Own(live, "free", GATE, Options())
    for model in (second, free):
        model.open()
    held = first.ask(0)
    first.wait_for_begin(0)
    assert free.answer(2) == 2  # which needs nothing
    waits = second.ask(1)
    second.wait_for_queue(1)
    assert (second.told(), waits.done()) == ([], False)
    first.open()
    assert (held.result(60), waits.result(60)) == (0, 1)
    assert (first.told("end"), second.told("begin")) == ([0], [1])
