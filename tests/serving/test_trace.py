"""Trace files as Triton writes them: incrementally, half-written, written over, and with ids that clients forge."""

import json
import os
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import deployed, golden

from gpuops.errors import InputError
from gpuops_serving.client import Client
from gpuops_serving.server import TritonServer
from gpuops_serving.trace import SLACK_NS, Traced, TraceReader, Window, parse, spans, trace_flags

MS = 1_000_000


def record(
    number: int, begin: int, *, model: str = "tiny", version: int = 1, request_id: str = "", compute: bool = True
) -> str:
    """One request, as Triton 2.51 writes it; a client's id goes in as it came."""
    stamps = {"HTTP_RECV_START": begin, "REQUEST_START": begin + 1, "QUEUE_START": begin + 2}
    if compute:
        stamps |= {"INFER_RESPONSE_COMPLETE": begin + 9, "COMPUTE_START": begin + 3, "COMPUTE_END": begin + 10}
    stamps |= {"REQUEST_END": begin + 12, "HTTP_SEND_END": begin + 11}
    named = f'"model_name":"{model}","model_version":{version}'
    named += f',"request_id":"{request_id}"' if request_id else ""
    lines = [f'{{"id":{number},"timestamps":[{{"name":"{k}","ns":{v}}}]}}' for k, v in stamps.items()]
    return ",".join([lines[0], f'{{"id":{number},{named}}}', *lines[1:]])


def traced(begin: int, *, model: str = "tiny", version: str = "1", compute: bool = True) -> Traced:
    span = (begin + 3, begin + 10) if compute else (None, None)
    return Traced(model, version, *span, begin + 12)


def write(path: Path, *records: str, whole: bool = True, at_s: float | None = None) -> None:
    path.write_text("[" + ",".join(records) + ("]" if whole else ""))
    if at_s is not None:
        os.utime(path, (at_s, at_s))


HOSTILE = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            'x","n":1},{"id":2,"model_name":"other","model_version":7',
            'x"},{"id":1,"timestamps":[{"name":"COMPUTE_START","ns":5}]},{"id":1,"a":"',
            'x"},{"id":1,"model_name":"other","model_version":9},{"id":1,"a":"',
            'x"},{"id":1,"timestamps":[{"name":"REQUEST_END","ns":5}]},{"id":1,"a":"',
            "]",
            "\\",
            "\n",
        ]
    ),
)


@given(HOSTILE)
def test_a_request_is_read_rightly_whatever_its_client_called_it(request_id: str) -> None:
    assert parse(f"[{record(1, 100, request_id=request_id)}]")[0] == traced(100)


def test_a_request_that_never_computed_is_told_and_one_that_is_not_finished_is_not() -> None:
    text = (
        record(1, 100, compute=False) + "," + record(2, 50).partition(',{"id":2,"timestamps":[{"name":"REQUEST_END"')[0]
    )
    assert parse(f"[{text}]") == [traced(100, compute=False)]


def test_files_are_read_once_as_they_are_completed(tmp_path: Path) -> None:
    reader, file = TraceReader(tmp_path / "t.json"), tmp_path / "t.json"
    assert reader.read() == []
    write(Path(f"{file}.0"), record(1, 100), record(2, 50))
    write(Path(f"{file}.1"), record(3, 300), whole=False)
    assert reader.read() == [traced(50), traced(100)]
    assert reader.read() == []
    write(Path(f"{file}.1"), record(3, 300), record(4, 400))
    assert reader.read() == [traced(300), traced(400)]
    assert reader.files == 2


def test_a_file_that_a_killed_server_left_half_written_does_not_hold_up_the_next(tmp_path: Path) -> None:
    reader, file = TraceReader(tmp_path / "t.json"), tmp_path / "t.json"
    write(Path(f"{file}.0"), record(1, 100), record(2, 200)[:-90], whole=False, at_s=1000)
    assert reader.read() == []
    write(Path(f"{file}.1"), record(3, 300), at_s=1001)
    assert reader.read() == [traced(100), traced(300)]


def test_files_that_are_finished_in_another_order_are_all_read(tmp_path: Path) -> None:
    reader, file = TraceReader(tmp_path / "t.json"), tmp_path / "t.json"
    write(Path(f"{file}.0"), record(1, 100), at_s=1000.2)
    write(Path(f"{file}.1"), record(2, 200), at_s=1000.1)
    write(Path(f"{file}.2"), record(3, 300), whole=False, at_s=1000.4)
    write(Path(f"{file}.3"), record(4, 400), at_s=1000.5)
    assert reader.read() == [traced(100), traced(200)], "the third is still being written"
    write(Path(f"{file}.2"), record(3, 300), at_s=1000.6)
    assert reader.read() == [traced(300), traced(400)]


def test_what_was_there_before_is_passed_over(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"t.json.{number}", record(number, 100), at_s=1000 + number)
    write(tmp_path / "t.json.backup", "")
    reader = TraceReader(tmp_path / "t.json")
    assert reader.read() == []
    write(tmp_path / "t.json.3", record(9, 900), at_s=2000)
    assert reader.read() == [traced(900)]


def test_a_server_that_starts_again_writes_over_its_files_and_is_followed(tmp_path: Path) -> None:
    reader = TraceReader(tmp_path / "t.json")
    for number in range(4):
        write(tmp_path / f"t.json.{number}", record(number + 1, 100 * number), at_s=1000 + number)
    assert len(reader.read()) == 4
    write(tmp_path / "t.json.0", record(1, 7000), at_s=2000)
    assert reader.read() == [traced(7000)], "the old files after it are not told again"
    write(tmp_path / "t.json.1", record(2, 8000), at_s=2001)
    assert reader.read() == [traced(8000)]


def test_files_that_were_read_can_be_removed(tmp_path: Path) -> None:
    reader = TraceReader(tmp_path / "t.json", remove=True)
    write(tmp_path / "t.json.0", record(1, 100), at_s=1000)
    write(tmp_path / "t.json.1", record(2, 200), whole=False, at_s=1001)
    assert len(reader.read()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.json.1"]
    write(tmp_path / "t.json.1", record(2, 200), at_s=1002)
    assert len(reader.read()) == 1
    write(tmp_path / "t.json.0", record(1, 300), at_s=1003)
    assert reader.read() == [traced(300)], "the server was started again"
    assert list(tmp_path.iterdir()) == []


def test_requests_of_one_batch_weigh_one_together() -> None:
    batch = [Traced("a", "1", 10, 20, done) for done in (21, 22, 23, 24)]
    others = [Traced("a", "1", 12, 20, 25), Traced("b", "1", 10, 20, 25), Traced("a", "1", None, None, 26)]
    found = spans([*batch, *others])
    assert [span.weight for span in found] == [0.25] * 4 + [1, 1]
    assert len({span.key for span in found}) == 6
    assert {span.key[:2] for span in found} == {("a", "1"), ("b", "1")}


WINDOW = Window(0, 10 * MS, 1000 * MS, 1010 * MS)


@pytest.mark.parametrize(
    ("done_ms", "counted", "fits"),
    [
        ([100, 200, 300], 3, True),
        ([100, 200], 3, False),  # one is missing, as in a sample
        ([100, 200, 300, 400], 3, False),  # one is forged
        ([5, 200, 300], 2, True),  # finished while the first question was asked
        ([5, 200, 300], 3, True),
        ([200, 300, 1005], 2, True),
        ([200, 300, 1005], 3, True),
        ([200, 300, 1005], 4, False),
        ([200, 300, 5000], 2, True),
        ([], 0, True),
    ],
)
def test_traces_must_fit_what_was_counted(done_ms: list[int], counted: int, fits: bool) -> None:
    requests = [Traced("a", "1", 1, 2, ms * MS) for ms in done_ms]
    reason = WINDOW.holds(requests, {("a", "1"): counted})
    assert (reason is None) == fits
    assert reason is None or f"of {counted} requests of a:1" in reason
    assert SLACK_NS < 50 * MS


def test_flags_that_would_write_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        trace_flags("t.json", log_frequency=0)


def ask(server: TritonServer, request_id: str) -> None:
    """One request over plain HTTP, with an id."""
    samples = {name: array[:1] for name, array in golden().inputs.items()}
    kinds = {"a": "UINT8", "m": "INT32"}
    inputs: list[dict[str, Any]] = [
        {"name": name, "shape": list(array.shape), "datatype": kinds[name], "data": array.ravel().tolist()}
        for name, array in samples.items()
    ]
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    body = json.dumps({"id": request_id, "inputs": inputs, "outputs": outputs}).encode()
    with urllib.request.urlopen(f"{server.http_url}/v2/models/tiny/infer", body) as answer:
        answer.read()


def read_until(reader: TraceReader, count: int) -> list[Traced]:
    found: list[Traced] = []
    deadline = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        found += reader.read()
    return found


@pytest.mark.slow
def test_the_real_servers_traces_are_read_over_forged_ids_batches_and_a_restart(tmp_path: Path) -> None:
    repository, file = deployed(tmp_path), tmp_path / "t.json"
    samples = {name: array[:1] for name, array in golden().inputs.items()}
    reader = TraceReader(file, remove=True)
    for _ in range(2):
        begin = time.monotonic_ns()
        with TritonServer(repository, flags=trace_flags(file, log_frequency=1)) as server:
            ask(server, 'x"},{"id":99,"model_name":"other","model_version":1},{"id":99,"t":"')
            ask(server, "\\ \n")

            def many(url: str) -> None:
                with Client(url) as client:
                    for _ in range(30):
                        client.infer("tiny", samples)

            threads = [threading.Thread(target=many, args=(server.grpc_url,)) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = read_until(reader, 4 + 2 + 180)  # four were asked by the start
        assert len(found) == 186
        assert {request.key for request in found} == {("tiny", "1")}
        for request in found:
            assert request.begin_ns is not None
            assert request.end_ns is not None
            assert begin < request.begin_ns < request.end_ns < request.done_ns < time.monotonic_ns()
        batches = Counter((request.begin_ns, request.end_ns) for request in found)
        assert max(batches.values()) > 1, "six at a time were joined to batches"
        assert sum(span.weight for span in spans(found)) == pytest.approx(len(batches))
    assert not list(tmp_path.glob("t.json.*"))
