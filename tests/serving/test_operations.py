"""What clients make of answers, told by a gRPC service that can answer what the embedded server's backend cannot.

(Its Python backend dies on text under NumPy 2. Answers of the real server: test_client.py, test_triton.py.)
"""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from flaky import KServe, kserve, one_model, response, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import serialize_byte_tensor

from gpuops.errors import InputError, IntegrityError
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.aio import AsyncClient
from gpuops_serving.client import Client
from gpuops_serving.config import Options, model_config
from gpuops_serving.recorded import example_inputs

X = np.arange(4, dtype=np.float32).reshape(2, 2)


def answered(config: model_config_pb2.ModelConfig, answer: Callable[[Any, Any, int], Any], x: Any = X) -> Any:
    """What both clients say of an answer to x."""

    async def ask(url: str) -> Any:
        async with AsyncClient(url) as client:
            return await client.infer("m", {"x": x})

    with kserve(KServe(config, answer)) as url, Client(url) as client:
        found, other = client.infer("m", {"x": x}), asyncio.run(ask(url))
    assert {name: (array.dtype, array.tolist()) for name, array in found.items()} == {
        name: (array.dtype, array.tolist()) for name, array in other.items()
    }
    return found["y"]


def always(*outputs: tuple[Any, bytes]) -> Callable[[Any, Any, int], Any]:
    return lambda request, context, number: response(*outputs)


def test_text_comes_as_arrays_of_bytes() -> None:
    words = np.array([[b"a", b""], [b"gr\xc3\xbc\xc3\x9f", b"\0\0"]], object)
    content = serialize_byte_tensor(words).item()
    found = answered(one_model("TYPE_STRING"), always(tensor("y", "BYTES", [2, 2], content)))
    assert found.dtype == object
    assert found.tolist() == words.tolist()
    found[0, 0] = b"ours to change"


def test_bfloat16_comes_as_such() -> None:
    found = answered(
        one_model("TYPE_BF16"),
        always(tensor("y", "BF16", [2, 2], np.array([0x3F80, 0, 0x4000, 0xC000], "<u2").tobytes())),
    )
    assert found.dtype.name == "bfloat16"
    assert found.astype(np.float32).tolist() == [[1.0, 0.0], [2.0, -2.0]]


KINDS = {
    **{
        f"{kind}{bits}": (f"TYPE_{kind.upper()}{bits}", f"{kind.upper()}{bits}")
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
    "float16": ("TYPE_FP16", "FP16"),
    "float32": ("TYPE_FP32", "FP32"),
    "float64": ("TYPE_FP64", "FP64"),
    "bool": ("TYPE_BOOL", "BOOL"),
}


def test_every_type_of_number_comes_as_it_is_and_can_be_sent() -> None:
    for dtype, (configured, sent) in KINDS.items():
        want = np.array([[1, 0], [1, 1]], dtype)
        found = answered(one_model(configured), always(tensor("y", sent, [2, 2], want.tobytes())))
        assert (found.dtype, found.tolist()) == (want.dtype, want.tolist())
        config = model_config_pb2.ModelConfig(name="m", max_batch_size=4)
        config.input.add(name="x", data_type=model_config_pb2.DataType.Value(configured), dims=[2])
        config.output.add(name="y", data_type=model_config_pb2.DataType.Value(configured), dims=[2])

        def echo(request: Any, context: Any, number: int) -> Any:
            return response(tensor("y", request.inputs[0].datatype, [2, 2], request.raw_input_contents[0]))

        assert answered(config, echo, want).tolist() == want.tolist()
        with kserve(KServe(config, echo)) as url, Client(url) as client:
            made = example_inputs(client.config("m"), 3)["x"]
        assert (made.dtype.name, made.shape) == (dtype, (3, 2))


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ([("y", "FP32", [2, 2], b"")], "too few bytes"),
        ([("y", "FP32", [2, 2], bytes(12))], "too few bytes"),
        ([("y", "FP32", [2, 2], bytes(13))], "too few bytes"),
        ([("y", "FP32", [2, 2], bytes(20))], "too few bytes"),
        ([("y", "FP32", [2, 2], bytes(32))], "too few bytes"),
        ([("y", "FP64", [2, 2], bytes(32))], "as float64, its configuration says float32"),
        ([("y", "INT32", [2, 2], bytes(16))], "as int32"),
        ([("y", "BYTES", [2, 2], bytes(16))], "as TYPE_STRING"),
        ([("y", "FP128", [2, 2], bytes(64))], "as FP128"),
        ([("y", "FP32", [1, 2], bytes(8))], "for 2 samples"),
        ([("y", "FP32", [3, 2], bytes(24))], "for 2 samples"),
        ([("y", "FP32", [], bytes(4))], "for 2 samples"),
        ([("y", "FP32", [2, 3], bytes(24))], r"configuration says \[n, 2\]"),
        ([("y", "FP32", [2, 2, 1], bytes(16))], r"configuration says \[n, 2\]"),
        ([("z", "FP32", [2, 2], bytes(16))], "'z' which its configuration does not have"),
        ([], "without 'y'"),
    ],
)
def test_an_answer_that_is_not_what_was_promised_is_an_error(outputs: list[tuple[Any, ...]], says: str) -> None:
    with pytest.raises(IntegrityError, match=rf"model 'm' answered .*{says}.*do not use it"):
        answered(one_model(), always(*(tensor(*output) for output in outputs)))


def test_text_whose_lengths_lie_is_an_error_or_the_right_number_of_words() -> None:
    service = KServe(one_model("TYPE_STRING"), always())
    with kserve(service) as url, Client(url) as client:

        @settings(max_examples=100, deadline=None)
        @given(st.binary(max_size=40))
        def check(content: bytes) -> None:
            service.answer = always(tensor("y", "BYTES", [1, 2], content))
            try:
                found = client.infer("m", {"x": X[:1]})["y"]
            except IntegrityError:
                return
            assert found.shape == (1, 2)
            assert serialize_byte_tensor(found).item() == content

        check()


def test_an_output_that_may_be_empty_may_be() -> None:
    config = one_model(dims=(-1, 4), batch=0)
    found = answered(config, always(tensor("y", "FP32", [0, 4], b"")), X[0])
    assert found.shape == (0, 4)


def test_all_parts_of_a_large_batch_come_from_one_version() -> None:
    def newer_for_the_third(request: Any, context: Any, number: int) -> Any:
        version = request.model_version or ("1" if number % 3 < 2 else "2")
        rows = request.inputs[0].shape[0]
        values = np.full((rows, 2), float(version), np.float32)
        return response(tensor("y", "FP32", [rows, 2], values.tobytes()), version=version)

    service = KServe(one_model(), newer_for_the_third)
    with kserve(service) as url, Client(url) as client:
        found = client.answer("m", {"x": np.zeros((10, 2), np.float32)})
    assert found.version == "2"
    assert found.outputs["y"].tolist() == [[2.0, 2.0]] * 10
    assert [request.inputs[0].shape[0] for request in service.asked] == [4, 4, 2] * 2


def test_a_version_that_is_no_number_is_not_put_into_a_request() -> None:
    with kserve(KServe(one_model(), always())) as url, Client(url) as client:
        for version in ("1/../../x", "v1", " 1", "-1"):
            with pytest.raises(InputError, match="is no number"):
                client.infer("m", {"x": X}, version)


def test_what_a_model_takes_is_said_with_the_refusal() -> None:
    def refuse(request: Any, context: Any, number: int) -> Any:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "[request id: <id_unknown>] wrong\nshape. NOTE: see the log")

    for batch, takes in ((4, r"'m' takes x float32 \[n, 2\] with n up to 4$"), (0, r"'m' takes x float32 \[2\]$")):
        with (
            kserve(KServe(one_model(batch=batch), refuse)) as url,
            Client(url) as client,
            pytest.raises(InputError, match=rf"refused: wrong shape; {takes}"),
        ):
            client.infer("m", {"x": X})


@pytest.mark.parametrize("backend", ["torch_aoti", "tensorrt"])
def test_tensors_go_to_a_backend_as_it_takes_them(backend: str) -> None:
    """By its own names, 16-bit integers widened; answers come back under the signature's names."""
    signature = Signature((TensorSpec("x", "int16", (2,)),), (TensorSpec("y", "float32", (2,)),), 4)
    config = model_config("m", {1: "v"}, signature, sample={}, options=Options(backend, server_version="2.75.0"))
    asked, promised = config.input[0], config.output[0]
    seen = []

    def answer(request: Any, context: Any, number: int) -> Any:
        seen.extend((t.name, t.datatype) for t in request.inputs)
        content = np.frombuffer(request.raw_input_contents[0], _NUMBERS[request.inputs[0].datatype])
        return response(tensor(promised.name, "FP32", [2, 2], content.astype(np.float32).tobytes()))

    x = np.array([[-3, 4], [300, -32768]], np.int16)
    np.testing.assert_array_equal(answered(config, answer, x), x)
    assert set(seen) == {(asked.name, {"torch_aoti": "INT16", "tensorrt": "INT32"}[backend])}
    assert (asked.name == "x") == (backend == "tensorrt")


_NUMBERS = {"INT16": np.int16, "INT32": np.int32}
