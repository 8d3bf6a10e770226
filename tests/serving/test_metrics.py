"""The meter over the real server: requests are counted through batches, warm-up, reloads, ensembles and restarts."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tiny_bundle import deployed, golden, make_bundle

from gpuops.energy.sensor import Found
from gpuops_serving.client import Client
from gpuops_serving.exporter import energy_report
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer

NO_GPU = Found((), "no GPU in this test")
ONE = {name: array[:1] for name, array in golden().inputs.items()}
TINY = ("tiny", "1")


def until(holds: Callable[[], bool]) -> None:
    """Poll a condition; an answer is sent before its request is counted."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def polled(meter: ServerMeter, model: str, count: int, version: str = "1") -> bool:
    meter.poll()
    return meter.totals.requests[model, version] >= count


def test_requests_are_those_that_were_sent(server: TritonServer) -> None:
    def many() -> None:
        with Client(server.http_url) as client:
            for _ in range(25):
                client.infer("tiny", ONE)

    with Client(server.grpc_url) as client, ServerMeter(client, found=NO_GPU, longest_s=0) as meter:
        threads = [threading.Thread(target=many) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: polled(meter, "tiny", 100) and not any(thread.is_alive() for thread in threads))
        client.infer("tiny", golden().inputs)  # more than the largest batch: two requests
        until(lambda: polled(meter, "tiny", 102))
        client.infer("tiny", ONE)
    assert meter.totals.requests[TINY] in (102, 103), "the last one may not be counted yet"
    (row,) = energy_report(meter)["models"]
    assert row["version_id"] == "1" * 64
    assert (row["joules"], row["joules_per_request"], row["metered_requests"]) == (None, None, 0)
    assert row["reason"] == "computes on the CPU, which no counter here covers"


def test_without_a_gpu_the_report_says_why(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, ServerMeter(client, found=NO_GPU) as meter:
        assert meter.totals.requests[TINY] == 0
    report = energy_report(meter)
    assert (report["method"], report["reason"], report["gpus"]) == ("none", "no GPU in this test", [])
    meter.close()


PLAIN = """
import sys
sys.path.insert(0, {shim!r})
import numpy as np, triton_python_backend_utils as triton
from model import from_triton, to_triton
class TritonPythonModel:
    def execute(self, requests):
        arrays = [from_triton(triton.get_input_tensor_by_name(request, "x")) for request in requests]
        return [triton.InferenceResponse([to_triton("y", array + 1)]) for array in arrays]
"""
STREAM = """
import sys
sys.path.insert(0, {shim!r})
import numpy as np, triton_python_backend_utils as triton
from model import to_triton
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for part in range(3):
                sender.send(triton.InferenceResponse([to_triton("y", np.full((1,), part, np.float32))]))
            sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
ZERO = 'inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 zero_data: true } }'
WARM_UP = f"""
model_warmup {{ name: "a" batch_size: 3 count: 2 {ZERO} }}
model_warmup {{ name: "b" batch_size: 1 {ZERO} }}
"""
SIDES = {"input": "x", "output": "y"}
MAPS = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
STEP = f'step {{ model_name: "warm" model_version: -1 {MAPS} }}'


def write_model(repository: Path, name: str, code: str, config: str, batch: int = 4) -> None:
    """A model that someone else wrote; the functions of our shim help it with NumPy 2."""
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    shim = repository / "tiny" / "1"
    if code:
        (folder / "model.py").write_text(code.format(shim=str(shim)))
    tensors = [f'{side} {{ name: "{letter}" data_type: TYPE_FP32 dims: 1 }}' for side, letter in SIDES.items()]
    text = "\n".join([f'name: "{name}" max_batch_size: {batch}', *tensors, config])
    (repository / name / "config.pbtxt").write_text(text)


@pytest.mark.slow
def test_warm_up_reloads_ensembles_and_streams_of_the_real_server(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    x = {"x": np.ones((1, 1), np.float32)}
    python = 'backend: "python" instance_group { kind: KIND_CPU count: 2 }'
    with TritonServer(repository, control=True) as server, Client(server.grpc_url, access=server.access) as client:
        meter = ServerMeter(client, found=NO_GPU, longest_s=0)
        meter.poll()
        write_model(repository, "warm", PLAIN, python + WARM_UP)
        write_model(repository, "whole", "", f'platform: "ensemble" ensemble_scheduling {{ {STEP} }}')
        write_model(repository, "stream", STREAM, python + " model_transaction_policy { decoupled: true }", batch=0)
        for name in ("warm", "whole", "stream"):
            client.load(name)
        counted = {e["name"]: e["inference_stats"]["success"]["count"] for e in client.statistics()}
        assert counted["warm"] == 2 * (2 * 3 + 1), "Triton counts its warm-up as requests"
        meter.poll()
        assert meter.totals.requests["warm", "1"] == 0
        for _ in range(5):
            client.infer("warm", x)
        client.infer("whole", x)
        until(lambda: polled(meter, "warm", 6) and polled(meter, "whole", 1))
        assert meter.totals.requests["warm", "1"] == 6, "an ensemble's requests are its steps' too"
        assert "those of the models that it calls" in meter.totals.unknown["whole", "1"]

        os.utime(repository / "warm" / "1" / "model.py")
        client.load("warm")
        meter.poll()
        assert meter.totals.requests["warm", "1"] == 6, "loaded again"
        client.infer("warm", x)
        until(lambda: polled(meter, "warm", 7))

        assert streamed(server) == [0, 1, 2]
        until(lambda: polled(meter, "stream", 1))
        assert meter.totals.unknown["stream", "1"].startswith("streams its answers")
        client.unload("stream")
        until(lambda: polled(meter, "warm", 7) and ("stream", "1") not in meter.totals.unknown)
        assert meter.totals.requests["stream", "1"] == 1
        meter.close()


def streamed(server: TritonServer) -> list[float]:
    """All answers of the streaming model to one request."""
    found: list[Any] = []
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as client:
        client.start_stream(lambda result, error: found.append((result, error)))
        tensor = tritonclient.grpc.InferInput("x", [1], "FP32")
        tensor.set_data_from_numpy(np.ones(1, np.float32))
        client.async_stream_infer("stream", [tensor])
        until(lambda: len(found) == 3)
        client.stop_stream()
    assert [error for _, error in found] == [None] * 3
    return [float(result.as_numpy("y")[0]) for result, _ in found]


@pytest.mark.slow
def test_requests_add_up_over_a_restart_and_a_new_version(tmp_path: Path) -> None:
    repository = deployed(tmp_path)
    asked_at_start = 4  # golden requests: 8 samples as 5 and 3, over HTTP and gRPC
    first = TritonServer(repository)
    first.start()
    port = int(first.grpc_url.rpartition(":")[2])
    with Client(first.grpc_url) as client:
        meter = ServerMeter(client, found=NO_GPU, longest_s=0)
        meter.poll()
        for _ in range(20):
            client.infer("tiny", ONE)
        until(lambda: polled(meter, "tiny", 20))
        first.stop()
        deploy(make_bundle(tmp_path / "second", version_id="3" * 64), repository)
        with TritonServer(repository, grpc_port=port):
            for _ in range(7):
                client.infer("tiny", ONE, "1")
            client.infer("tiny", ONE, "2")
            until(lambda: polled(meter, "tiny", asked_at_start + 1, "2") and polled(meter, "tiny", 20 + 7))
            until(lambda: polled(meter, "tiny", 20 + asked_at_start + 7))
            assert meter.last_error is None
            assert meter.totals.requests == {TINY: 20 + asked_at_start + 7, ("tiny", "2"): asked_at_start + 1}
            assert meter.version_ids == {TINY: "1" * 64, ("tiny", "2"): "3" * 64}
            meter.close()
