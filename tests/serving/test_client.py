"""Our client, and a plain Triton client, against the real server."""

import gc
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tiny_bundle import SAMPLE, SIGNATURE, answers, golden
from tritonclient.utils import InferenceServerException

from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops_serving.client import Client, group
from gpuops_serving.probe import probe
from gpuops_serving.server import TritonServer
from gpuops_serving.wire import Address

MAX = SIGNATURE.max_batch
GOLDEN = golden()
A, M = GOLDEN.inputs["a"], GOLDEN.inputs["m"]


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return server.http_url if request.param == "http" else server.grpc_url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as opened:
        yield opened


def plain(url: str, a: Any, m: Any) -> Any:
    """A request as someone writes it who has only tritonclient."""
    scheme, address = url.split("://")
    protocol = tritonclient.http if scheme == "http" else tritonclient.grpc
    with protocol.InferenceServerClient(address) as client:
        inputs = [protocol.InferInput("a", a.shape, "UINT8"), protocol.InferInput("m", m.shape, "INT32")]
        for tensor, array in zip(inputs, (a, m), strict=True):
            tensor.set_data_from_numpy(array)
        return client.infer("tiny", inputs).as_numpy("y")


@pytest.mark.parametrize("size", range(1, MAX + 1))
def test_every_served_batch_size_is_answered_as_the_golden_samples_say(client: Client, size: int) -> None:
    batch = golden(seed=size).batch(size)
    outputs = client.infer("tiny", batch.inputs)
    assert outputs["y"].dtype == np.float32
    assert outputs["y"].shape == (size, 1, 8, 8)
    assert outputs["y"].std() > 1  # not zeros, not the first element everywhere
    assert batch.max_abs_diff(outputs) <= 1e-3
    assert outputs["y"].flags.writeable


@pytest.mark.parametrize("size", [MAX + 1, 3 * MAX, 3 * MAX + 2])
def test_more_than_the_largest_batch_goes_in_parts(client: Client, size: int) -> None:
    batch = golden(seed=size, count=size)
    assert batch.max_abs_diff(client.infer("tiny", batch.inputs)) <= 1e-3


def test_arrays_that_are_not_contiguous_are_sent_right(client: Client) -> None:
    a = np.ascontiguousarray(A.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)[::-2]
    np.testing.assert_allclose(client.infer("tiny", {"a": a, "m": M[::-2]})["y"], answers(a, M[::-2]), atol=1e-3)


@pytest.mark.parametrize("size", range(1, MAX + 1))
def test_a_plain_triton_client_gets_the_same_answers(url: str, size: int) -> None:
    np.testing.assert_allclose(plain(url, A[:size], M[:size]), answers(A[:size], M[:size]), atol=1e-3)


@pytest.mark.parametrize("size", [0, MAX + 1])
def test_a_plain_triton_client_gets_an_error_for_other_batch_sizes(url: str, size: int) -> None:
    with pytest.raises(InferenceServerException):
        plain(url, A[:size], M[:size])
    np.testing.assert_allclose(plain(url, A[:1], M[:1]), answers(A[:1], M[:1]), atol=1e-3)


@pytest.mark.parametrize(
    ("model", "inputs", "version", "says"),
    [
        ("tiny", {"a": A.astype(np.float32), "m": M}, "", r"'a' data-type is 'FP32'.*takes a uint8 \[n, 3, 8, 8\]"),
        ("tiny", {"a": A.astype(np.float64), "m": M}, "", "'a' data-type is 'FP64'"),
        ("tiny", {"a": A, "m": M.astype(">i4")}, "", "'m' is >i4"),
        ("tiny", {"a": A[:, :, :4], "m": M}, "", r"unexpected shape for input 'a'.*takes a uint8 \[n, 3, 8, 8\]"),
        ("tiny", {"a": A[:, 0], "m": M}, "", "unexpected shape for input 'a'"),
        ("tiny", {"a": A}, "", r"missing required input\(s\) \['m'\]"),
        ("tiny", {"a": A, "m": M, "z": M}, "", "expected 2 inputs but got 3"),
        ("tiny", {"a": A[:0], "m": M[:0]}, "", "at least 1"),
        ("tiny", {"a": A, "m": M[:2]}, "", "same number of samples"),
        ("tiny", {"a": A, "m": np.int32(3)}, "", "same number of samples"),
        ("tiny", {}, "", "at least 1"),
        ("tiny", {"a": A, "m": M + 50}, "", "indices element out of data bounds"),
        ("tiny", {"a": A, "m": M}, "7", "version 7 is not found"),
        ("other", {"a": A, "m": M}, "", "unknown model: 'other' is not found; it serves tiny"),
    ],
)
def test_a_wrong_request_is_one_clear_line_and_the_server_lives(
    client: Client, model: str, inputs: dict[str, Any], version: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        client.infer(model, inputs, version)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert GOLDEN.max_abs_diff(client.infer("tiny", GOLDEN.inputs)) <= 1e-3


def test_one_bad_request_in_a_dynamic_batch_fails_alone(server: TritonServer) -> None:
    protocol = tritonclient.grpc
    bad = {place for place in range(200) if place % 7 == 3}

    def ask(place: int) -> str:
        rows = np.arange(place, place + 1 + place % 3) % 8  # of one to three samples
        a, m = A[rows], M[rows] + (50 if place in bad else 0)
        inputs = [protocol.InferInput("a", a.shape, "UINT8"), protocol.InferInput("m", m.shape, "INT32")]
        for tensor, array in zip(inputs, (a, m), strict=True):
            tensor.set_data_from_numpy(array)
        try:
            got = shared.infer("tiny", inputs).as_numpy("y")
        except InferenceServerException as error:
            return str(error.status())
        return "right" if np.allclose(got, answers(a, m), atol=1e-3) else "wrong"

    with protocol.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as shared:
        with ThreadPoolExecutor(16) as threads:
            found = list(threads.map(ask, range(200)))
        statistics = shared.get_inference_statistics("tiny", as_json=True)["model_stats"][0]["batch_stats"]
    want = ["StatusCode.INVALID_ARGUMENT" if place in bad else "right" for place in range(200)]
    assert found == want
    assert any(int(entry["batch_size"]) > 1 and "compute_infer" in entry for entry in statistics)


def test_what_is_served_can_be_read_back(client: Client, server: TritonServer) -> None:
    assert client.version_id("tiny") == "1" * 64
    assert client.sample("tiny") == SAMPLE
    assert client.server_version() == server.version == "2.51.0"
    assert client.server_id() == server.server_id
    (state,) = client.models()
    assert (state.name, state.version, state.state) == ("tiny", "1", "READY")
    config = client.config("tiny")
    assert config["max_batch_size"] == MAX
    assert config["inputs"] == [
        {"name": "a", "dtype": "uint8", "shape": [3, 8, 8]},
        {"name": "m", "dtype": "int32", "shape": [1]},
    ]
    assert config["outputs"] == [{"name": "y", "dtype": "float32", "shape": [1, 8, 8]}]


def test_the_probe_passes_on_the_golden_answers_and_only_there(client: Client) -> None:
    found = probe(client, "tiny", GOLDEN, 1e-3)
    assert (found.model, found.version) == ("tiny", "1")
    assert found.max_abs_diff <= 1e-3
    assert found.ms > 0
    for other in (golden(gain=0.501), type(GOLDEN)(GOLDEN.inputs, {"y": np.full_like(GOLDEN.outputs["y"], np.nan)})):
        with pytest.raises(IntegrityError, match="differs from its golden answers"):
            probe(client, "tiny", other, 1e-3)


NO_SERVER = (
    *("localhost:8000", "ftp://h:1", "http://h", "http://h:x", "http://h:99999", "grpc://h:1/path", ""),
    *("http://user:secret@h:1", "http://h:1?a=b", "http://h:1#a", "http://[::1"),
)


@pytest.mark.parametrize("url", NO_SERVER)
def test_a_url_that_is_no_server_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="write http://HOST:PORT or grpc://HOST:PORT"):
        Client(url)


def test_what_cannot_be_sent_as_a_header_is_refused_and_a_secret_is_not_printed() -> None:
    for headers in ({"a b": "c"}, {"a": "b\nc: d"}, {"a": "ü"}, {"": "a"}):
        with pytest.raises(InputError, match="cannot be sent"):
            Client("http://127.0.0.1:9", headers=headers)
    with pytest.raises(InputError, match="cannot be sent") as caught:
        Client("http://127.0.0.1:9", access=("key", "sec\nret"))
    assert "sec" not in str(caught.value)
    for scheme in ("http", "grpc"):
        given = Address.parse(f"{scheme}://h:1", 1.0, None, ("Key", "secret"), {"X-Trace": "1"}, 0)
        assert "secret" not in repr(given)
        names = {"Key", "X-Trace"} if scheme == "http" else {"triton-grpc-protocol-key", "x-trace"}
        assert set(given.headers) == names
    for timeout_s, retries in ((0.0, 0), (-1.0, 0), (1.0, -1)):
        with pytest.raises(InputError, match="0 retries or more"):
            Client("http://127.0.0.1:9", timeout_s, retries=retries)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_headers_are_sent_with_every_call(server: TritonServer, scheme: str) -> None:
    url = server.http_url if scheme == "http" else server.grpc_url
    with Client(url, headers={"X-Trace": "1"}) as client:
        assert GOLDEN.max_abs_diff(client.infer("tiny", GOLDEN.inputs)) <= 1e-3
        assert client.ready("tiny")


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_not_there_is_named(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"{scheme}://127.0.0.1:{held.getsockname()[1]}"
    with Client(address, timeout_s=5) as client, pytest.raises(UnavailableError, match=f"no answer from {address}"):
        client.infer("tiny", GOLDEN.inputs)


def test_the_other_protocol_s_port_is_unavailable(server: TritonServer) -> None:
    for address in (server.http_url.replace("http:", "grpc:"), server.grpc_url.replace("grpc:", "http:")):
        with Client(address, timeout_s=2) as client, pytest.raises(UnavailableError, match=address):
            client.models()


def test_a_stream_answers_in_order_and_from_single_samples(url: str) -> None:
    batch = golden(count=23)
    samples = [{name: array[k] for name, array in batch.inputs.items()} for k in range(23)]
    with Client(url) as client:
        found = list(client.stream("tiny", group(samples, MAX), in_flight=3))
        assert list(client.stream("tiny", [])) == []
    assert [len(part["y"]) for part in found] == [5, 5, 5, 5, 3]
    assert batch.max_abs_diff({"y": np.concatenate([part["y"] for part in found])}) <= 1e-3


def singles(read: list[int], bad: int = -1) -> Iterator[dict[str, Any]]:
    """A hundred requests of one sample, one of them wrong; `read` is told which were taken."""
    for place in range(100):
        read.append(place)
        yield {"a": A[:1], "m": M[:1] + (50 if place == bad else 0)}


def test_a_stream_ends_at_the_first_error_and_reads_no_further(url: str) -> None:
    read: list[int] = []
    answered: list[Any] = []
    with Client(url) as client:
        with pytest.raises(InputError, match="out of data bounds"):
            answered.extend(client.stream("tiny", singles(read, bad=3), in_flight=2))
        assert client.ready("tiny")
        with pytest.raises(InputError, match="at least 1"):
            next(client.stream("tiny", singles(read), in_flight=0))
    assert len(answered) == 3
    assert len(read) <= 6


def test_an_error_of_the_one_who_gives_the_batches_ends_a_stream_too(client: Client) -> None:
    def batches() -> Iterator[dict[str, Any]]:
        yield {"a": A[:1], "m": M[:1]}
        raise KeyError("out of samples")

    with pytest.raises(KeyError, match="out of samples"):
        list(client.stream("tiny", batches(), in_flight=1))


def test_a_stream_that_is_closed_sends_nothing_more_and_leaves_no_thread_nor_connection(url: str) -> None:
    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    with Client(url) as client:
        list(client.stream("tiny", singles([]), in_flight=4))  # what stays open after a first time stays open
        before = opened(), threading.active_count()
        for _ in range(5):
            read: list[int] = []
            stream = client.stream("tiny", singles(read), in_flight=4)
            next(stream)
            stream.close()
            assert len(read) <= 5
            list(client.stream("tiny", singles([]), in_flight=4))
        after = opened(), threading.active_count()
    assert after[1] == before[1]
    assert after[0] <= before[0] + 2  # not two for each of fifty threads


def test_two_threads_in_one_client_are_an_error_over_http_rather_than_a_deadlock(url: str) -> None:
    wrong: list[str] = []
    start = threading.Barrier(4)

    def ask(_: int) -> int:
        start.wait(30)
        right = 0
        for place in range(50):
            batch = golden(seed=place, count=1)
            try:
                right += batch.max_abs_diff(client.infer("tiny", batch.inputs)) <= 1e-3
            except InputError as error:
                wrong.append(str(error))
        return right

    with Client(url, timeout_s=60) as client, ThreadPoolExecutor(4) as threads:
        answered = sum(threads.map(ask, range(4)))
        assert GOLDEN.max_abs_diff(client.infer("tiny", GOLDEN.inputs)) <= 1e-3
    assert answered + len(wrong) == 200  # no answer is wrong
    if client.grpc:
        assert wrong == []
    assert all("in use by another thread" in text for text in wrong)


def test_a_client_may_go_from_thread_to_thread(url: str) -> None:
    with Client(url) as client, ThreadPoolExecutor(1) as other:
        for _ in range(5):
            assert GOLDEN.max_abs_diff(client.infer("tiny", GOLDEN.inputs)) <= 1e-3
            assert GOLDEN.max_abs_diff(other.submit(client.infer, "tiny", GOLDEN.inputs).result(60)) <= 1e-3
        again = client.again()
        with again:
            assert again.server_id() == client.server_id()


def test_a_closed_client_says_so(url: str) -> None:
    client = Client(url)
    client.close()
    for call in (client.models, lambda: client.infer("tiny", GOLDEN.inputs)):
        with pytest.raises(InputError, match="is closed: open another"):
            call()
    client.close()
