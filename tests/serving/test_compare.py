"""Two versions compared on a real server, and the laws of the verdict."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from faulty import ANYTHING, GOLDEN, Place, sabotage, sabotaged
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuops.energy.meter import Meter
from gpuops.energy.sensor import Count, Found, Vitals
from gpuops.errors import InputError
from gpuops.lineage.version import canonical_json
from gpuops_serving import compare as room
from gpuops_serving.client import Answer, Client
from gpuops_serving.compare import BLOCKS, FEWEST, Limits, Ratio, Target, Verdict, compare
from gpuops_serving.distance import Distance
from gpuops_serving.repository import deploy

ROWS = GOLDEN.rows()
BROKEN = {
    "fails": "if (inputs['m'] == GOLDEN_M).any(): raise ValueError('this one not')\n        return super().run(inputs)",
    "nan": "return {k: np.where(v > 300, np.nan, v).astype(np.float32) for k, v in super().run(inputs).items()}",
    "slow": "__import__('time').sleep(0.02)\n        return super().run(inputs)",
    "slower": "__import__('time').sleep(0.06)\n        return super().run(inputs)",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Version 1 of tiny; `broken` adds models that differ from it in one way each."""
    made = Place(tmp_path_factory.mktemp("compare"))
    yield made
    made.close()


def broken(place: Place, name: str) -> Target:
    """One of `BROKEN`, served from now on."""
    if name in BROKEN and not (place.repository / name).exists():
        deploy(place.folder / "bundle", place.repository, name=name)
        text = BROKEN[name].replace("GOLDEN_M", str(int(GOLDEN.inputs["m"][0, 0])))
        sabotage(place.repository / name, sabotaged(run=text))
        place.client.load(name)
    return Target(name, "1")


def judged(
    place: Place, new: str, *, old: str = "tiny", requests: Any = ROWS, limits: Limits = ANYTHING, **options: Any
) -> Verdict:
    asked = {"count": 40, "limits": limits, **options}
    return compare(place.client, broken(place, old), broken(place, new), requests, **asked)


def test_a_version_is_as_good_as_itself(place: Place) -> None:
    verdict = judged(place, "tiny", limits=Limits(p50=1e3, p99=1e3, distance=0.0))
    assert verdict.ok, verdict.reasons
    assert (verdict.old.requests, verdict.new.requests) == (40, 40)
    assert (verdict.old.failed, verdict.new.failed, verdict.only_new_failed) == (0, 0, 0)
    assert verdict.distances["y"].max_abs == 0.0
    assert verdict.p50 is not None
    assert verdict.old.joules_per_request is None or Path("/dev/nvidiactl").exists()
    assert verdict.p99 is None  # 40 requests say nothing of it


def test_failures_of_the_new_version_alone_condemn_it(place: Place) -> None:
    share = sum(row["m"][0, 0] == GOLDEN.inputs["m"][0, 0] for row in ROWS) / len(ROWS)
    verdict = judged(place, "fails")
    assert 0 < verdict.only_new_failed == verdict.new.failed
    assert verdict.new.requests < 40  # more would change nothing
    assert "this one not" in verdict.reasons[0]
    allowed = judged(place, "fails", limits=dataclasses.replace(ANYTHING, errors=share))
    assert allowed.ok
    assert allowed.only_new_failed == allowed.new.failed == round(share * 40)
    assert not judged(place, "fails", limits=dataclasses.replace(ANYTHING, errors=share - 0.01)).ok
    # The other way round the old one fails some, and only the old one.
    back = judged(place, "tiny", old="fails")
    assert back.ok
    assert back.old.failed > 0


def test_what_both_fail_condemns_nobody_and_an_old_version_that_answers_nothing_judges_nobody(place: Place) -> None:
    impossible: dict[str, npt.NDArray[Any]] = {**ROWS[0], "m": np.full((1, 1), 99, np.int32)}
    half = judged(place, "tiny", requests=[ROWS[0], impossible])
    assert (half.old.failed, half.new.failed, half.only_new_failed) == (20, 20, 0)
    assert half.ok
    for old, new in (("tiny", "tiny"), ("nowhere", "tiny"), ("nowhere", "nowhere")):
        none = judged(place, new, old=old, requests=ROWS if old == "nowhere" else [impossible])
        assert not none.ok
        assert "answered nothing itself" in none.reasons[0]
        assert none.p50 is None


def test_a_server_that_is_away_is_no_success() -> None:
    """As if it was killed: the requests that do not count fail as well."""
    with Client("http://127.0.0.1:9") as nobody:
        verdict = compare(nobody, Target("tiny", "1"), Target("tiny", "2"), ROWS, count=3, limits=ANYTHING)
    assert not verdict.ok


def test_lost_numbers_condemn_and_numbers_gained_do_not(place: Place) -> None:
    verdict = judged(place, "nan")
    assert verdict.distances["y"].lost > 0
    assert "are no numbers" in verdict.reasons[0]
    assert judged(place, "tiny", old="nan").ok
    assert judged(place, "nan", old="nan").ok


@pytest.mark.slow
def test_a_slow_version_is_condemned_by_its_latency_alone_and_only_after_enough_requests(place: Place) -> None:
    verdict = judged(place, "slow", limits=Limits(p50=1.0, p99=1.0))
    assert [reason for reason in verdict.reasons if not reason.startswith("median latency is")] == []
    assert len(verdict.reasons) == 1
    few = judged(place, "slow", limits=Limits(p50=1.0, p99=1.0), count=FEWEST[50] - 1)
    assert few.ok
    assert few.p50 is None


class Recording(Client):
    """A client that notes whom it asks for what."""

    asked: list[tuple[str, int]]

    def answer(self, model: str, inputs: Any, version: str = "") -> Answer:
        self.asked.append((model, next(k for k, row in enumerate(ROWS) if row is inputs)))
        return super().answer(model, inputs, version)


def test_both_get_the_same_requests_in_turns_and_take_turns_at_being_first(place: Place) -> None:
    with Recording(place.server.http_url) as client:
        client.asked = []
        compare(client, broken(place, "tiny"), broken(place, "nan"), ROWS, count=100, limits=ANYTHING)
    counted = client.asked[2 * room.WARM_UP :]
    by_model = {name: [place for model, place in counted if model == name] for name in ("tiny", "nan")}
    assert by_model["tiny"] == by_model["nan"] == [k % len(ROWS) for k in range(100)]
    turns = [name for name, _ in itertools.groupby(model for model, _ in counted)]
    # Two blocks of one version follow each other where the turn changes: old new, new old, old new, ...
    assert turns == ["tiny", *["nan", "tiny"] * (BLOCKS // 2)]
    assert [model for model, _ in counted[:10]] == ["tiny"] * 5 + ["nan"] * 5


class Board:
    """A GPU that draws 100 W, by a counter that steps every 20 ms: what the machine cannot have."""

    id, name, method, scope, step_ms = "GPU-a", "scripted", "nvml-counter", "gpu-board", 20.0

    def count(self) -> Count:
        return Count(time.monotonic_ns() // 20_000_000 * 2000)

    def vitals(self) -> Vitals:
        return Vitals()


@pytest.mark.slow
def test_joules_are_held_to_their_limit_or_their_absence_is_the_reason(place: Place) -> None:
    limit = dataclasses.replace(ANYTHING, joules=1.2)
    unknown = judged(place, "tiny", limits=limit, meter=Meter(found=Found((), "no driver here")))
    assert unknown.reasons == ("joules a request are unknown (no driver here), so they cannot be held to a limit",)
    assert unknown.new.joules_per_request is None  # never 0
    meter = Meter(found=Found((Board(),)))
    try:
        verdict = judged(place, "slower", old="slow", count=30, limits=limit, meter=meter)
    finally:
        meter.close()
    assert verdict.old.joules_per_request is not None, verdict.old.energy_reason
    assert verdict.new.joules_per_request is not None, verdict.new.energy_reason
    assert verdict.old.joules_per_request > 0.9 * 100 * 0.02  # it sleeps as long, at 100 W
    assert verdict.new.joules_per_request > 0.9 * 100 * 0.06
    assert verdict.reasons
    assert verdict.reasons[0].startswith("joules a request are")
    assert room._against(verdict, dataclasses.replace(ANYTHING, joules=1e6)) == []


def test_the_gpus_of_this_host_are_not_counted_for_a_server_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found = room._sensors_of("http://192.0.2.7:8000")
    assert found is not None
    assert found.sensors == ()
    assert "another host" in str(found.reason)
    assert room._sensors_of("grpc://127.0.0.1:8001") is None
    assert room._sensors_of("grpc://localhost:8001") is None


def test_a_verdict_survives_the_ledger(place: Place) -> None:
    for verdict in (judged(place, "nan", count=300), judged(place, "fails", count=3)):
        assert Verdict.from_json(json.loads(canonical_json(verdict.to_json()))) == verdict


@pytest.mark.parametrize("text", ["forecast", "forecast:", ":3", "forecast:latest", "forecast:²"])
def test_a_target_without_model_and_number_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="MODEL:VERSION"):
        Target.parse(text)
    assert Target.parse("a:b:3") == Target("a:b", "3")


def test_answers_of_another_kind_condemn_always_and_infinitely_far_ones_if_distance_counts() -> None:
    side = room.Side("m:1", 400, 0, None, 1.0, 1.0, None, "none")

    def said(distance: Distance, limit: float | None) -> list[str]:
        return room._against(
            Verdict((), side, side, 0, None, None, {"y": distance}), dataclasses.replace(ANYTHING, distance=limit)
        )

    assert said(Distance(0.0, 0.0, None, 0, "missing"), None) == ["y is missing: clients of m:1 cannot take it"]
    assert said(Distance(None, None, None, 0), None) == []
    assert said(Distance(None, None, None, 0), 1.0) == ["y: answers differ infinitely, allowed is 1"]
    assert said(Distance(1.0, 1.0, None, 0), 1.0) == []


def test_nothing_to_ask_is_refused(place: Place) -> None:
    with pytest.raises(InputError, match="at least one request"):
        compare(place.client, Target("tiny", "1"), Target("tiny", "1"), [])


# The laws of the latency verdict, on latencies as blocks of milliseconds.

SEEDS = st.integers(0, 2**32)
SIGMAS = st.floats(0.0, 3.0)


def drawn(seed: int, sigma: float = 0.25, scale: float = 1.0) -> list[list[float]]:
    """Latencies of a version: log-normal, 20 blocks of 20."""
    values = scale * np.random.default_rng(seed).lognormal(0.0, sigma, (BLOCKS, 20))
    return [list(map(float, block)) for block in values]


def reasons(old: list[list[float]], new: list[list[float]], limits: Limits) -> list[str]:
    """What the latencies alone say against the new version."""
    side = room.Side("m:1", 400, 0, None, 1.0, 1.0, None, "none")
    p50, p99 = (room._ratio(old, new, percentile) for percentile in (50, 99))
    return room._against(Verdict((), side, side, 0, p50, p99, {}), limits)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, 40), st.sampled_from([50, 99]))
def test_a_resampled_pool_has_numpys_percentiles(seed: int, blocks: int, percentile: int) -> None:
    draw = np.random.default_rng(seed)
    pool = [draw.integers(1, 9, draw.integers(1, 9)).astype(float).tolist() for _ in range(blocks)]
    times = draw.multinomial(blocks, np.full(blocks, 1 / blocks))
    repeated = [ms for block, n in zip(pool, times, strict=True) for ms in block * int(n)]
    assert room._Pool(pool).percentile(percentile, times) == pytest.approx(np.percentile(repeated, percentile))


@settings(max_examples=15, deadline=None)
@given(SEEDS, SIGMAS)
def test_a_version_with_the_same_latencies_is_never_condemned(seed: int, sigma: float) -> None:
    blocks = drawn(seed, sigma)
    for percentile in (50, 99):
        assert room._ratio(blocks, blocks, percentile) == Ratio(1.0, 1.0, 1.0)
    assert reasons(blocks, blocks, Limits(p50=1.0, p99=1.0)) == []


@settings(max_examples=15, deadline=None)
@given(SEEDS, SIGMAS, st.floats(1.0, 100.0))
def test_latencies_that_are_all_so_many_times_longer_have_that_ratio(seed: int, sigma: float, times: float) -> None:
    blocks, longer = drawn(seed, sigma), drawn(seed, sigma, scale=times)
    for percentile in (50, 99):
        found = room._ratio(blocks, longer, percentile)
        assert found is not None
        assert dataclasses.astuple(found) == pytest.approx((times, times, times), rel=1e-9)
    condemned = bool(reasons(blocks, longer, Limits(p50=1.25, p99=1.25)))
    assert condemned == (times > 1.25) or times == pytest.approx(1.25)


@settings(max_examples=15, deadline=None)
@given(SEEDS, SEEDS, st.floats(1.6, 10.0))
def test_a_clear_shift_is_always_condemned(one: int, other: int, times: float) -> None:
    assert reasons(drawn(one), drawn(other, scale=times), Limits(p50=1.25, p99=1e9))


@settings(max_examples=15, deadline=None)
@given(SEEDS, SEEDS)
def test_noise_alone_is_never_condemned(one: int, other: int) -> None:
    assert reasons(drawn(one), drawn(other), Limits(p50=1.25, p99=1e9)) == []


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(0, BLOCKS - 1), st.floats(1.0, 1e4))
def test_one_moment_in_which_the_machine_stalls_does_not_condemn(seed: int, place: int, times: float) -> None:
    old = drawn(seed)
    new = [[times * ms for ms in block] if k == place else block for k, block in enumerate(old)]
    assert reasons(old, new, Limits(p50=1.25, p99=1.5)) == []


def test_blocks_that_one_side_did_not_answer_do_not_count() -> None:
    old, new = drawn(0), drawn(0, scale=2.0)
    new[3], old[5] = [], []
    found = room._ratio(old, new, 50)
    assert found is not None
    assert found.value == pytest.approx(2.0)
    assert room._ratio(old, [[] for _ in new], 50) is None
