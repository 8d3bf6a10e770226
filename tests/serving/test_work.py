"""What statistics say of work, over reloads and restarts, and what configurations say of warm-up and places."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import golden
from triton_says import ENSEMBLE, ON_CPU, STREAMING, config, on_gpu, stats

from gpuops_serving.client import Client
from gpuops_serving.server import TritonServer
from gpuops_serving.work import Served, Work

A = ("a", "1")


def test_the_real_servers_statistics_say_what_was_asked(server: TritonServer) -> None:
    samples = golden()
    with Client(server.http_url) as client:
        before = client.statistics()
        client.infer("tiny", samples.inputs)  # 8 samples go as two requests, of 5 and of 3
        client.infer("tiny", {name: array[:1] for name, array in samples.inputs.items()})
        deadline = time.monotonic() + 30
        while (work := Work.between(before, client.statistics())).done["tiny", "1"].requests < 3:
            assert time.monotonic() < deadline  # an answer is sent before its request is counted
        served = Served.of(client.raw_config("tiny", "1"), "1")
    done = work.done["tiny", "1"]
    assert (done.requests, done.executions, done.cached, done.failed, done.anew) == (3, 3, 0, 0, False)
    assert 0 < done.busy_ns < 10 * 10**9
    assert not done.untimed
    assert work.changed == frozenset()
    assert (served.gpus, served.warm_up, served.version_id, served.why_unknown) == (None, 0, "1" * 64, None)


def test_batch_statistics_count_an_execution_once() -> None:
    before, after = [stats("a:1", 10, 50)], [stats("a:1", 42, 90, executions=12)]
    done = Work.between(before, after).done[A]
    assert (done.requests, done.executions, done.busy_ns) == (32, 2, 40_000_000)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 900)), min_size=2, max_size=8), st.randoms())
def test_looks_joined_are_one_look(steps: Any, draw: Any) -> None:
    counts, told = [0, 0], []
    for requests, busy in steps:
        counts = [counts[0] + requests, counts[1] + (busy if requests else 0)]
        told.append([stats("a:1", *counts)])
    cut = draw.randrange(1, len(told)) if len(told) > 2 else 1
    whole = Work.between(told[0], told[-1])
    parts = Work.between(told[0], told[cut]) + Work.between(told[cut], told[-1])
    assert parts == whole


@pytest.mark.parametrize(
    ("now", "then"),
    [
        (stats("a:1", 10, 50), stats("a:1", 3, 5)),
        (stats("a:1", 10, 50), stats("a:1", 12, 5)),  # more requests than before, and less time
        (stats("a:1", 10, 50, executions=10), stats("a:1", 12, 60, executions=2)),
    ],
)
def test_a_version_that_counts_anew_has_done_what_it_counts_now(now: dict[str, Any], then: dict[str, Any]) -> None:
    work = Work.between([now], [then])
    alone = Work.between([], [then]).done[A]
    assert work.done[A] == alone
    assert alone.anew
    assert work.changed == {A}


def test_a_batch_size_that_is_gone_means_that_it_counts_anew() -> None:
    now, then = stats("a:1", 10, 50), stats("a:1", 12, 60)
    then["batch_stats"][0]["batch_size"] = 4
    assert Work.between([now], [then]).done[A].requests == 12


def test_versions_that_come_and_go_are_told() -> None:
    work = Work.between([stats("a:1", 5, 5), stats("b:1")], [stats("b:1"), stats("c:1", 2, 1)])
    assert work.changed == {A, ("c", "1")}
    assert set(work.done) == {("b", "1"), ("c", "1")}


@pytest.mark.parametrize(
    ("configuration", "gpus", "instances"),
    [
        (ON_CPU, None, 1),
        (config(), (), 1),
        (on_gpu(0, 2, count=3), (0, 2), 6),
        (config(instance_group=[{"kind": "KIND_MODEL", "count": 2}]), (), 2),
        (config(instance_group=[{"kind": "KIND_CPU", "count": 2}, {"kind": "KIND_GPU", "gpus": [1]}]), (1,), 1),
        (config(instance_group=[]), None, 1),
    ],
)
def test_where_a_version_computes(configuration: dict[str, Any], gpus: Any, instances: int) -> None:
    served = Served.of(configuration, "1")
    assert (served.gpus, served.instances) == (gpus, instances)
    assert served.on(["GPU-a", "GPU-b", "GPU-c"]) == tuple(
        f"GPU-{'abc'[i]}" for i in (range(3) if gpus == () else gpus or ())
    )


def test_why_joules_cannot_be_known() -> None:
    assert "streams" in str(Served.of(STREAMING, "1").why_unknown)
    assert "ensemble" in str(Served.of(ENSEMBLE, "1").why_unknown)
    assert "in flight" in str(Served.of(config(backend="vllm"), "1").why_unknown)
    assert Served.of(config(backend="python"), "1").why_unknown is None


def test_the_version_id_is_that_of_the_version() -> None:
    parameters = {"gpuops.version_id.3": {"string_value": "x"}, "gpuops.version_id": {"string_value": "newest"}}
    assert Served.of(config(parameters=parameters), "3").version_id == "x"
    assert Served.of(config(parameters=parameters), "4").version_id is None
