"""Shared memory with the real server, and with a gRPC service that can leave out what a server must do."""

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flaky import KServe, kserve, one_model, response
from tiny_bundle import SIGNATURE, golden
from tritonclient.grpc import model_config_pb2, service_pb2

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops_serving.client import Client
from gpuops_serving.operations import Call
from gpuops_serving.server import TritonServer
from gpuops_serving.shared_memory import PREFIX, SharedMemory

GOLDEN = golden()


def regions() -> list[Path]:
    return list(Path("/dev/shm").glob(f"{PREFIX}*"))


@pytest.fixture(autouse=True)
def _no_region_is_left() -> Any:
    assert regions() == []
    yield
    assert regions() == []


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_without_shared_memory_at_every_batch_size(server: TritonServer, protocol: str) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    with Client(url) as client:
        with SharedMemory(client, "tiny") as region:
            assert [path.stat().st_mode & 0o777 for path in regions()] == [0o600] * 3
            kept = {}
            for size in [*range(1, SIGNATURE.max_batch + 1), 2]:
                batch = golden(seed=size).batch(size)
                kept[size] = (batch, region.infer(batch.inputs))
            for batch, found in kept.values():  # later requests use the same region
                assert batch.max_abs_diff(found) <= 1e-3
            with pytest.raises(InputError, match="split the request"):
                region.infer(GOLDEN.batch(SIGNATURE.max_batch + 1).inputs)
            with pytest.raises(InputError, match="out of data bounds"):
                region.infer({"a": GOLDEN.inputs["a"][:1], "m": GOLDEN.inputs["m"][:1] + 50})
            turned = {"a": np.asfortranarray(GOLDEN.inputs["a"][:4]), "m": GOLDEN.inputs["m"][:4]}
            assert GOLDEN.batch(4).max_abs_diff(region.infer(turned, "1")) <= 1e-3
        assert regions() == []
        with pytest.raises(InputError, match="closed"):
            region.infer(GOLDEN.batch(1).inputs)


class Busy(Client):
    """To whom a server that still puts a request away refuses to forget each region once, as happens now and then."""

    told = 0

    def call(self, call: Call) -> Any:
        if call.method.startswith("unregister"):
            self.told += 1
            if self.told % 2:
                raise InputError("Cannot unregister shared memory region 'gpuops-client-1', it is currently in use.")
        return super().call(call)


def test_a_server_that_still_uses_a_region_is_told_again_to_forget_it(server: TritonServer) -> None:
    with Busy(server.grpc_url) as client, SharedMemory(client, "tiny") as region:
        region.infer(GOLDEN.batch(2).inputs)
        assert PREFIX in Path(f"/proc/{server.pid}/maps").read_text()
        region.close()
    assert client.told == 6  # three regions
    assert PREFIX not in Path(f"/proc/{server.pid}/maps").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda a, m: {"a": a},
        lambda a, m: {"a": a, "m": m, "z": m},
        lambda a, m: {"a": a.astype(np.int8), "m": m},
        lambda a, m: {"a": a[:, :, :4], "m": m},
        lambda a, m: {"a": a, "m": m[:1]},
        lambda a, m: {"a": a[:0], "m": m[:0]},
        lambda a, m: {"a": a[0], "m": m[0]},
        lambda a, m: {"a": a, "m": np.int32(3)},
        lambda a, m: {},
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_they_are_written(
    server: TritonServer, change: Callable[..., dict[str, Any]]
) -> None:
    with Client(server.http_url) as client, SharedMemory(client, "tiny") as region:
        with pytest.raises(InputError, match=r"takes a uint8 \[n, 3, 8, 8\], m int32 \[n, 1\]|split the request"):
            region.infer(change(GOLDEN.inputs["a"][:2], GOLDEN.inputs["m"][:2]))
        assert GOLDEN.batch(2).max_abs_diff(region.infer(GOLDEN.batch(2).inputs)) <= 1e-3


def test_a_server_that_cannot_be_reached_leaves_no_region(server: TritonServer) -> None:
    with Client(server.http_url) as client, Client("http://127.0.0.1:9", timeout_s=0.5) as nobody:
        config = client.config("tiny")
        nobody.config = lambda model, version="": config  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match="allow-client-shm"):
            SharedMemory(nobody, "tiny")


class Sharing(KServe):
    """A service of this host: doubles x where it lies, unless told what to write."""

    def __init__(self, config: Any = None, write: Callable[[bytes, int], bytes] | None = None) -> None:
        super().__init__(one_model() if config is None else config, self.share)
        self.write = write
        self.files: dict[str, Path] = {}
        self.forgotten: list[str] = []
        self.refuse: grpc.StatusCode | None = None

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        if self.refuse is not None:
            context.abort(self.refuse, "shared memory is disabled")
        self.files[request.name] = Path("/dev/shm") / request.key.lstrip("/")
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self.forgotten.append(request.name)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def share(self, request: Any, context: Any, number: int) -> Any:
        if self.refuse is not None:
            context.abort(self.refuse, "queue is full")

        def place(tensor: Any) -> tuple[Path, int]:
            about = tensor.parameters
            size = about["shared_memory_byte_size"].int64_param
            return self.files[about["shared_memory_region"].string_param], size

        file, size = place(request.inputs[0])
        given = file.read_bytes()[:size]
        written = given if self.write is None else self.write(given, number)
        file, size = place(request.outputs[0])
        assert len(written) <= size
        with file.open("r+b") as stream:
            stream.write(written)
        kind = model_config_pb2.DataType.Name(self.config.output[0].data_type).removeprefix("TYPE_")
        rows = request.inputs[0].shape[0]
        output = service_pb2.ModelInferResponse.InferOutputTensor(
            name=self.config.output[0].name, datatype=kind, shape=[rows, *self.config.output[0].dims]
        )
        found = response()
        found.outputs.append(output)
        return found


def model(dtype: str, dims: tuple[int, ...] = (2,), name: str = "y") -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name="m", max_batch_size=4)
    config.input.add(name="x", data_type=model_config_pb2.DataType.Value(dtype), dims=dims)
    config.output.add(name=name, data_type=model_config_pb2.DataType.Value(dtype), dims=dims)
    return config


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("INT64", "int64"),
        ("FP16", "float16"),
        ("FP64", "float64"),
        ("BOOL", "bool"),
        ("UINT8", "uint8"),
        ("BF16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("dims", [(1,), (2, 3)])
def test_every_type_of_number_is_shared_also_under_one_name(kind: str, dtype: str, dims: tuple[int, ...]) -> None:
    service = Sharing(model(f"TYPE_{kind}", dims, name="x"))
    with kserve(service) as url, Client(url) as client, SharedMemory(client, "m") as region:
        for rows in (1, 3, 4):
            x = np.random.default_rng(rows).integers(0, 2, (rows, *dims)).astype(dtype)
            found = region.infer({"x": x})["x"]
            assert found.dtype == x.dtype
            assert found.tolist() == x.tolist()
    assert sorted(service.forgotten) == sorted(service.files)


X = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)


@pytest.mark.parametrize("length", [0, 8, 12])
def test_an_answer_that_is_not_or_only_half_written_is_an_error_not_the_last_answer(length: int) -> None:
    service = Sharing(write=lambda given, number: given if number == 0 else given[:length])
    with kserve(service) as url, Client(url) as client, SharedMemory(client, "m") as region:
        assert region.infer({"x": X})["y"].tolist() == X.tolist()
        with pytest.raises(IntegrityError, match="'y' with too few bytes"):
            region.infer({"x": X})
    assert len(service.asked) == 3


def test_an_answer_that_looks_unwritten_by_chance_is_asked_for_again_and_believed() -> None:
    single = np.array([[7]], np.uint8)
    service = Sharing(model("TYPE_UINT8", (1,)))
    with kserve(service) as url, Client(url) as client, SharedMemory(client, "m") as region:
        for _ in range(1500):  # one byte is equal to its mark once in 256
            assert region.infer({"x": single})["y"].tolist() == [[7]]
    assert 1500 < len(service.asked) < 1600


def test_a_region_whose_answer_may_still_come_is_not_used_again() -> None:
    service = Sharing()
    with kserve(service) as url, Client(url, retries=5) as client:
        with SharedMemory(client, "m") as region:
            service.refuse = grpc.StatusCode.UNAVAILABLE
            with pytest.raises(UnavailableError, match="queue is full"):
                region.infer({"x": X})
            assert len(service.asked) == 1  # not again: two answers would write to one place
            service.refuse = None
            with pytest.raises(InputError, match="may still be: open another"):
                region.infer({"x": X})
        assert service.forgotten == []  # the server would crash if it wrote to what it had let go
        with SharedMemory(client, "m") as region:
            assert region.infer({"x": X})["y"].tolist() == X.tolist()
    assert len(service.forgotten) == 2


def test_a_server_without_shared_memory_says_what_to_do() -> None:
    service = Sharing()
    service.refuse = grpc.StatusCode.UNIMPLEMENTED
    with kserve(service) as url, Client(url) as client, pytest.raises(UnavailableError, match="--allow-client-shm"):
        SharedMemory(client, "m")


def test_models_that_cannot_be_shared_are_refused() -> None:
    free, text, flat, state = model("TYPE_FP32", (-1,)), model("TYPE_STRING"), model("TYPE_FP32"), model("TYPE_FP32")
    flat.max_batch_size = 0
    state.sequence_batching.SetInParent()
    for config in (free, text, flat, state):
        with (
            kserve(Sharing(config)) as url,
            Client(url) as client,
            pytest.raises(InputError, match="ask it without shared memory"),
        ):
            SharedMemory(client, "m")


def test_two_clients_share_with_one_server_at_a_time(server: TritonServer) -> None:
    wrong: list[float] = []

    def ask(seed: int) -> None:
        with Client(server.http_url) as client, SharedMemory(client, "tiny") as region:
            for place in range(30):
                batch = golden(seed=100 * seed + place).batch(1 + place % 5)
                wrong.append(batch.max_abs_diff(region.infer(batch.inputs)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(wrong) == 60
    assert max(wrong) <= 1e-3


@pytest.mark.skipif(importlib.util.find_spec("cuda") is not None, reason="cuda-python is installed")
def test_a_gpu_s_memory_needs_cuda_python(server: TritonServer) -> None:
    with Client(server.http_url) as client, pytest.raises(UnavailableError, match=r"tritonclient\[cuda\]"):
        SharedMemory(client, "tiny", gpu=0)


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_lies_on_a_gpu_is_shared_and_answered_there(server: TritonServer, protocol: str) -> None:
    torch = pytest.importorskip("torch")
    url = server.http_url if protocol == "http" else server.grpc_url
    with Client(url) as client, SharedMemory(client, "tiny", gpu=0) as region:
        for size in range(1, SIGNATURE.max_batch + 1):
            batch = golden(seed=size).batch(size)
            assert batch.max_abs_diff(region.infer(batch.inputs)) <= 1e-3
            there = {name: torch.from_numpy(array).cuda() for name, array in batch.inputs.items()}
            assert batch.max_abs_diff(region.infer(there)) <= 1e-3
    with Client(url) as client, pytest.raises(UnavailableError, match=r"no shared memory of .* on GPU 99"):
        SharedMemory(client, "tiny", gpu=99)
