"""Every joule of the counter is on one line, whatever server and driver do; scripted, under the real nvidia-ml-py."""

from itertools import pairwise
from typing import Any

import pytest
from energy_driver import Player, library, play  # noqa: F401  fixtures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_says import ENSEMBLE, ON_CPU, STREAMING, config, on_gpu, stats

from gpuops_serving.accounts import Accounts, Course, Look
from gpuops_serving.trace import Window
from gpuops_serving.work import Work

COUNTER, GPU_IS_LOST = "nvmlDeviceGetTotalEnergyConsumption", 15
CONFIGS = {"a:1": config(), "a:2": on_gpu(0), "b:1": on_gpu(1), "cpu:1": ON_CPU, "ens:1": ENSEMBLE}


def gpu(name: str, milliwatt: int, index: int = 0, *, step_ms: int = 20, **options: Any) -> str:
    words = " ".join(f"{key}={value}" for key, value in options.items())
    return f"gpu GPU-{name} H100 step_ms={step_ms} {words}\npower {index} 0 {milliwatt}\n"


def looks(*statistics: Any, every_s: float = 1.0) -> list[dict[str, Any]]:
    return [{"at": 2 + i * every_s, "statistics": found} for i, found in enumerate(statistics)]


def joules(told: dict[str, Any], line: str) -> float | None:
    """What a line holds at the end; None if it is not there."""
    found = told["history"][-1].get(line)
    return None if found is None else found / 1e6


def row(told: dict[str, Any], name: str) -> dict[str, Any]:
    """What the report says of MODEL:VERSION."""
    (found,) = [row for row in told["report"]["models"] if f"{row['model']}:{row['version']}" == name]
    return found


def assert_conserved(told: dict[str, Any], known: dict[str, list[int]], slack_mj: float) -> None:
    """Lines add up to what was counted, and that is what the counter rose by, but for a step at either end.

    Args:
        told: Outcome of a play.
        known: Looks at which the counter was read for certain, by GPU; between others it may have been.
        slack_mj: What the steps at both ends can hide.
    """
    for earlier, later in pairwise(told["history"]):
        for name, value in earlier.items():
            assert later[name] >= value >= 0, f"{name} fell"
    last = told["history"][-1]
    for gpu_id, sure in known.items():
        if f"counted/{gpu_id}" not in last:
            assert len(sure) < 2
            continue
        names = [f"{name}/{gpu_id}" for name in ("idle", "loading", "unattributed", "lost")]
        shares = [value for name, value in last.items() if name.startswith(f"shares/{gpu_id}/")]
        found = [value for name, value in last.items() if name.startswith(f"attributed/{gpu_id}/")]
        assert sum(last.get(name, 0) for name in names) + sum(shares) == last[f"counted/{gpu_id}"]
        assert sum(found) == sum(shares)
        rose = [rises[gpu_id] for rises in told["rose_mj"]]
        counted_mj = last[f"counted/{gpu_id}"] / 1000
        assert counted_mj <= rose[-1] - rose[0] + slack_mj
        if len(sure) > 1:
            assert counted_mj >= rose[sure[-1]] - rose[sure[0]] - slack_mj


DID = st.tuples(st.integers(0, 40), st.integers(0, 1500))
"""(requests, milliseconds computing) of a version in a look."""
LOOKS = st.lists(
    st.fixed_dictionaries(
        {
            "wait": st.sampled_from([0.03, 0.2, 0.7, 1.0, 1.0, 2.5]),
            "answers": st.sampled_from([True, True, True, True, False]),
            "did": st.fixed_dictionaries({name: DID for name in [*CONFIGS, "s:1"]}),
            "reload": st.sampled_from([None, None, None, None, "a:1", "b:1", "cpu:1"]),
            "traced": st.sampled_from([True, True, False]),
        }
    ),
    min_size=2,
    max_size=9,
)
BOARDS = st.lists(
    st.fixed_dictionaries(
        {
            "step_ms": st.sampled_from([20, 100]),
            "power": st.lists(st.sampled_from([60_000, 90_000, 350_000, 600_000]), min_size=1, max_size=12),
            "mig": st.sampled_from([0, 0, 0, 1]),
            "reset": st.sampled_from([None, None, 2.41, 4.0]),
            "lost": st.sampled_from([None, None, (3.1, 3.2), (2.5, 5.5), (4.0, 99.0)]),
        }
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BOARDS, LOOKS, st.booleans(), st.booleans(), st.sampled_from([0.5, 3.0]))
def test_every_joule_is_on_one_line_whatever_happens(
    play: Player,  # noqa: F811
    boards: list[dict[str, Any]],
    course: list[dict[str, Any]],
    streams: bool,
    traces: bool,
    longest_s: float,
) -> None:
    script = ""
    for index, board in enumerate(boards):
        name = "ab"[index]
        script += f"gpu GPU-{name} H100 step_ms={board['step_ms']} energy_mj=7000000 mig={board['mig']}\n"
        script += "".join(f"power {index} {0.9 * i} {mw}\n" for i, mw in enumerate(board["power"]))
        script += f"reset {index} {board['reset']}\n" if board["reset"] else ""
        script += (
            f"fail {COUNTER} {GPU_IS_LOST} {board['lost'][0]} {board['lost'][1]} {index}\n" if board["lost"] else ""
        )
    configs = CONFIGS | ({"s:1": STREAMING} if streams else {})
    counts = {name: [0, 0] for name in configs}
    asked, at, counted, expected = [], 2.0, dict.fromkeys(configs, 0), dict.fromkeys(configs, 0)
    known = False
    for look in course:
        before, at = at, at + look["wait"]
        written = []
        for name in configs:
            requests, busy_ms = look["did"][name]
            if look["reload"] == name:
                counts[name] = [0, 0]
                counted[name] = 0 if not look["answers"] else counted[name]
            counts[name] = [counts[name][0] + requests, counts[name][1] + (busy_ms if requests else 0)]
            counted[name] += requests
            if look["traced"] and requests:
                width = min(busy_ms / 1000 / requests, (at - before) / requests)
                model, _, version = name.partition(":")
                written += [[model, version, before + i * width, before + (i + 1) * width] for i in range(requests)]
        found = [stats(name, *count) for name, count in counts.items()] if look["answers"] else None
        if found is not None:
            expected = {name: expected[name] + counted[name] * known for name in configs}
            counted, known = dict.fromkeys(configs, 0), True
        asked.append({"at": round(at, 3), "statistics": found} | ({"traces": written} if traces else {}))
    told = play(script=script, configs=configs, looks=asked, longest_s=longest_s)
    known_at = {}
    for index, board in enumerate(boards):
        gone = [(moment - 0.5, moment + 0.5) for moment in [board["reset"]] if moment]
        gone += [(board["lost"][0] - 0.5, board["lost"][1] + 0.5)] if board["lost"] else []
        gone += [(0, 999)] if board["mig"] else []
        known_at[f"GPU-{'ab'[index]}"] = [
            place for place, look in enumerate(asked) if not any(b < look["at"] < e for b, e in gone)
        ]
    assert_conserved(told, known_at, slack_mj=4 * 600 * 100)
    last = told["history"][-1]
    for index, board in enumerate(boards):
        if board["mig"]:
            assert not [key for key in last if f"GPU-{'ab'[index]}" in key and not key.startswith("lost_s")]
    for name in configs:
        assert last.get(f"requests/{name}", 0) <= expected[name]
        if not any(look["reload"] == name for look in course):
            assert last.get(f"requests/{name}", 0) == expected[name]
        assert last.get(f"metered/{name}", 0) <= last.get(f"requests/{name}", 0)
    for name in (f"{found['model']}:{found['version']}" for found in told["report"]["models"]):
        found = row(told, name)
        assert (found["joules"] is None) == (found["joules_per_request"] is None) == (found["metered_requests"] == 0)
        if name in ("cpu:1", "ens:1", "s:1") or (streams and name != "a:2"):
            assert found["joules"] is None
        assert found["reason"] or found["joules"] is not None
    assert told["marks"] <= 3


STEADY = gpu("a", 100_000) + "power 0 5 400000\n"
"""100 W until 5 s, 400 W from then on: with looks from 2 s on, the first three are idle."""
IDLE = [stats("a:1"), stats("a:2")]


def two(count: int, busy_ms: tuple[float, float], *, requests: int = 10) -> list[dict[str, Any]]:
    """Statistics after `count` busy looks, each with so many requests and milliseconds of a:1 and a:2."""
    names = zip(("a:1", "a:2"), busy_ms, strict=True)
    return [stats(name, count * requests * bool(ms), count * ms) for name, ms in names]


def test_busy_time_shares_what_is_left_when_idle_power_is_taken_off(play: Player) -> None:  # noqa: F811
    history = [IDLE] * 4 + [two(n, (300, 100)) for n in (1, 2, 3)]
    told = play(script=STEADY, configs=CONFIGS, looks=looks(*history))
    # Each busy second: 400 J, 0.6 s of it idle at 100 W; 340 J are left for 0.3 and 0.1 s of computing.
    assert joules(told, "shares/GPU-a/a/1") == pytest.approx(3 * 255, rel=0.01)
    assert joules(told, "shares/GPU-a/a/2") == pytest.approx(3 * 85, rel=0.01)
    assert joules(told, "idle/GPU-a") == pytest.approx(3 * 100 + 3 * 60, rel=0.01)
    assert row(told, "a:1")["joules_per_request"] == pytest.approx(25.5, rel=0.01)
    assert told["report"]["gpus"][0]["idle_w"] == pytest.approx(100, rel=0.01)
    assert told["report"]["gpus"][0]["joules"]["attributed"]["trace"] == 0
    assert told["report"]["trace"] == "no traces are read"


def test_before_idle_power_was_seen_idle_time_draws_as_much_as_computing(play: Player) -> None:  # noqa: F811
    told = play(script=gpu("a", 400_000), configs=CONFIGS, looks=looks(IDLE, two(1, (300, 100)), two(2, (300, 100))))
    assert joules(told, "idle/GPU-a") == pytest.approx(2 * 240, rel=0.01)
    assert joules(told, "shares/GPU-a/a/1") == pytest.approx(2 * 120, rel=0.01)


def test_a_look_is_booked_when_it_is_old_enough_and_not_before(play: Player) -> None:  # noqa: F811
    told = play(script=STEADY, configs=CONFIGS, looks=looks(*[IDLE] * 8), longest_s=3.5)
    counted = [moment.get("counted/GPU-a", 0) for moment in told["history"]]
    assert counted[:5] == [0] * 5, "the first look ended at 3 s and waits until 6.5 s"
    assert 0 < counted[5] < counted[6] < counted[7]


def test_an_execution_of_several_looks_is_not_idle_before_it_ended(play: Player) -> None:  # noqa: F811
    # It computes from 5.5 to 8 s and is in the statistics from then on.
    history = [IDLE] * 6 + [two(1, (2500, 0), requests=1)] * 2
    told = play(script=STEADY, configs=CONFIGS, looks=looks(*history), longest_s=5.0)
    busy_until_8 = 3 * 400 - 0.5 * 100
    assert joules(told, "shares/GPU-a/a/1") == pytest.approx(busy_until_8, rel=0.01)
    assert row(told, "a:1")["metered_requests"] == 1


def test_an_execution_longer_than_the_meter_waits_is_null_and_says_so(play: Player) -> None:  # noqa: F811
    history = [IDLE] * 7 + [two(1, (4500, 0), requests=1)] + [two(2, (4500, 0), requests=1)]
    told = play(script=STEADY, configs=CONFIGS, looks=looks(*history), longest_s=1.0)
    assert row(told, "a:1")["joules"] is None
    assert "more computing time than its instances had" in row(told, "a:1")["reason"]
    assert row(told, "a:1")["requests"] == 2
    assert joules(told, "unattributed/GPU-a") == pytest.approx(1200, rel=0.01), "from 7 s on; before was booked"


WARMED = on_gpu(
    0, 1, count=2, model_warmup=[{"batch_size": 3, "count": 2, "inputs": {}}, {"batch_size": 1, "count": 0}]
)
"""Seven requests for each of its four instances."""


def test_warm_up_is_no_request_and_what_loading_drew_is_a_line_of_its_own(play: Player) -> None:  # noqa: F811
    loaded = [stats("a:1", 28 + 5, 900), stats("a:2")]
    history = [[stats("a:2")], [stats("a:2")], loaded, [stats("a:1", 28 + 5 + 7, 1000), stats("a:2")]]
    told = play(script=STEADY, configs=CONFIGS | {"a:1": WARMED}, looks=looks(*history))
    assert (row(told, "a:1")["requests"], row(told, "a:1")["metered_requests"]) == (5 + 7, 7)
    assert joules(told, "loading/GPU-a") == pytest.approx(100, rel=0.01)
    assert joules(told, "shares/GPU-a/a/1") == pytest.approx(10, rel=0.02), "0.1 s at 100 W"
    again = [stats("a:1", 28 + 2, 950), stats("a:2")]
    told = play(script=STEADY, configs=CONFIGS | {"a:1": WARMED}, looks=looks(loaded, loaded, again, [stats("a:2")]))
    assert (row(told, "a:1")["requests"], row(told, "a:1")["metered_requests"]) == (2, 0)
    assert joules(told, "loading/GPU-a") == pytest.approx(200, rel=0.01), "loaded again, and unloaded"


def test_while_the_server_is_away_joules_are_nobodys_and_requests_are_counted_later(play: Player) -> None:  # noqa: F811
    history = [IDLE, two(1, (100, 0)), None, None, two(4, (100, 0)), two(5, (100, 0))]
    told = play(script=gpu("a", 100_000), configs=CONFIGS, looks=looks(*history))
    assert (row(told, "a:1")["requests"], row(told, "a:1")["metered_requests"]) == (50, 20)
    assert joules(told, "unattributed/GPU-a") == pytest.approx(300, rel=0.01)
    assert row(told, "a:1")["joules_per_request"] == pytest.approx(1.0, rel=0.02)


def test_requests_of_a_server_that_started_again_are_counted_from_its_start(play: Player) -> None:  # noqa: F811
    told = play(script=STEADY, configs=CONFIGS, looks=looks(two(5, (10, 0)), two(6, (10, 0)), None, two(1, (10, 0))))
    assert row(told, "a:1")["requests"] == 10 + 10


def test_a_streaming_version_makes_its_gpus_unattributed_and_names_itself(play: Player) -> None:  # noqa: F811
    script = gpu("a", 100_000) + gpu("b", 50_000, 1)
    configs = {"a:2": on_gpu(0), "b:1": on_gpu(1), "s:1": {**STREAMING, **on_gpu(1)}}
    then = [stats("a:2", 10, 500), stats("b:1", 10, 500), stats("s:1", 1, 300)]
    told = play(script=script, configs=configs, looks=looks([stats("a:2"), stats("b:1"), stats("s:1")], then))
    assert row(told, "a:2")["joules_per_request"] == pytest.approx(5, rel=0.02)
    assert row(told, "s:1")["joules"] is row(told, "b:1")["joules"] is None
    assert row(told, "s:1")["reason"].startswith("streams its answers")
    assert row(told, "b:1")["reason"].startswith("shares a GPU with s:1: streams its answers")
    assert joules(told, "unattributed/GPU-b") == pytest.approx(50, rel=0.02)
    assert joules(told, "unattributed/GPU-a") is None


def test_an_in_flight_batching_backend_is_null_too(play: Player) -> None:  # noqa: F811
    told = play(
        script=STEADY,
        configs={"a:1": config(backend="tensorrtllm")},
        looks=looks([stats("a:1")], [stats("a:1", 9, 4000)]),
    )
    assert row(told, "a:1")["reason"].startswith("batches requests in flight")
    assert joules(told, "unattributed/GPU-a") == pytest.approx(100, rel=0.01)


def test_an_ensemble_does_not_take_the_joules_of_its_steps(play: Player) -> None:  # noqa: F811
    # As the real server does, the ensemble repeats the computing time of its step.
    then = [stats("a:1", 10, 1000), stats("ens:1", 10, 1000)]
    told = play(script=STEADY, configs=CONFIGS, looks=looks([stats("a:1"), stats("ens:1")], then))
    assert row(told, "a:1")["joules"] == pytest.approx(100, rel=0.01)
    assert (row(told, "ens:1")["requests"], row(told, "ens:1")["joules"]) == (10, None)
    assert "those of the models that it calls" in row(told, "ens:1")["reason"]


def test_a_model_on_the_cpu_is_null_and_draws_nothing_from_the_gpu(play: Player) -> None:  # noqa: F811
    told = play(script=STEADY, configs=CONFIGS, looks=looks([stats("cpu:1")], [stats("cpu:1", 10, 1000)]))
    assert row(told, "cpu:1")["joules_per_request"] is None
    assert "on the CPU" in row(told, "cpu:1")["reason"]
    assert joules(told, "idle/GPU-a") == joules(told, "counted/GPU-a") == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("configs", "then", "says"),
    [
        ({}, stats("a:1", 10, 500), "its configuration could not be read"),
        (CONFIGS, stats("a:1", 10, 0), "does not report for how long it computes"),
        ({"a:1": on_gpu(3)}, stats("a:1", 10, 500), "not visible here"),
    ],
)
def test_what_cannot_be_placed_is_null_with_the_reason(
    play: Player,  # noqa: F811
    configs: dict[str, Any],
    then: dict[str, Any],
    says: str,
) -> None:
    told = play(script=STEADY, configs=configs, looks=looks([stats("a:1")], [then]))
    assert (row(told, "a:1")["requests"], row(told, "a:1")["joules"]) == (10, None)
    assert says in row(told, "a:1")["reason"]
    assert joules(told, "shares/GPU-a/a/1") is None


def test_what_the_cache_answered_or_failed_early_costs_the_gpu_nothing(play: Player) -> None:  # noqa: F811
    told = play(script=STEADY, configs=CONFIGS, looks=looks([stats("a:1")], [stats("a:1", 10, cached=6, fail=4)]))
    assert (row(told, "a:1")["metered_requests"], row(told, "a:1")["joules"]) == (10, 0)


def test_a_version_on_two_gpus_needs_both(play: Player) -> None:  # noqa: F811
    script = gpu("a", 100_000) + gpu("b", 50_000, 1) + f"fail {COUNTER} {GPU_IS_LOST} 4.2 99 1\n"
    configs = {"a:1": on_gpu(0, 1), "a:2": on_gpu(0)}
    history = [two(n, (400, 400)) for n in range(6)]
    told = play(script=script, configs=configs, looks=looks(*history))
    assert row(told, "a:2")["metered_requests"] == 50
    assert row(told, "a:1")["metered_requests"] == 20, "of the two seconds before its second GPU was lost"
    assert "fell off the bus" in row(told, "a:1")["reason"]
    assert row(told, "a:1")["joules_per_request"] == pytest.approx((20 + 10) / 10, rel=0.02)
    assert told["report"]["gpus"][1]["lost_s"] == pytest.approx(2.8, abs=0.3)
    assert joules(told, "unattributed/GPU-a") == pytest.approx(3 * 20, rel=0.02)


def test_without_a_counter_all_is_null_and_the_reason_is_the_drivers(play: Player) -> None:  # noqa: F811
    told = play(script="init 9\n", configs=CONFIGS, looks=looks(IDLE, two(1, (300, 100))))
    assert (told["report"]["method"], told["report"]["gpus"]) == ("none", [])
    assert "not loaded" in told["report"]["reason"]
    assert row(told, "a:1")["reason"] == told["report"]["reason"]
    assert (row(told, "a:1")["requests"], row(told, "a:1")["joules"]) == (10, None)
    told = play(script=gpu("a", 100_000, mig=1), configs=CONFIGS, looks=looks(IDLE, two(1, (300, 100))))
    assert "MIG is on" in row(told, "a:1")["reason"]
    assert told["report"]["gpus"][0]["joules"] is None


def test_a_reset_loses_its_look_and_no_request_of_others(play: Player) -> None:  # noqa: F811
    told = play(
        script=gpu("a", 100_000, energy_mj=900_000) + "reset 0 4.33\n",
        configs=CONFIGS,
        looks=looks(*(two(n, (400, 400)) for n in range(6))),
    )
    assert (row(told, "a:1")["requests"], row(told, "a:1")["metered_requests"]) == (50, 40)
    assert joules(told, "lost/GPU-a") == pytest.approx(95, abs=6), "what was counted in the rest of that second"
    assert row(told, "a:1")["joules_per_request"] == pytest.approx(4, rel=0.01)
    assert told["report"]["gpus"][0]["lost_s"] == pytest.approx(0.05, abs=0.06)


def test_a_counter_that_is_known_better_later_never_takes_joules_back() -> None:
    accounts = Accounts(["GPU-a"], None)
    for end, reads in ((1, [(0, 0), (1, 500)]), (2, [(1, 499), (2, 499)]), (3, [(2, 499), (3, 900)])):
        look = Look(Window(end - 1, end - 1, end, end), Work({}), False, {})
        before = accounts.totals.counted_uj["GPU-a"]
        accounts.book(look, {"GPU-a": Course(reads, 0, None)}, [])
        assert accounts.totals.counted_uj["GPU-a"] >= before
    assert accounts.totals.counted_uj["GPU-a"] == accounts.totals.idle_uj["GPU-a"] == 900_000


def traced(every: int, share: int = 1) -> list[dict[str, Any]]:
    """Four looks: a:1 computes in the first half of each second, at 200 W, and a:2 in the second, at 600 W.

    Args:
        every: Requests of each a second.
        share: One in how many is traced.
    """
    found = looks(*(two(n, (500, 500), requests=every) for n in range(4)))
    for place, look in enumerate(found):
        begin = look["at"] - 1
        halves = [[begin + half + i * 0.5 / every for i in range(0, every, share)] for half in (0, 0.5)]
        look["traces"] = [
            ["a", version, at, at + 0.5 / every]
            for version, half in zip("12", halves, strict=True)
            for at in (half if place else [])
        ]
    return found


PHASES = gpu("a", 200_000) + "".join(f"power 0 {t / 2} {200_000 if t % 2 == 0 else 600_000}\n" for t in range(2, 16))


def test_traces_tell_who_computed_while_much_was_drawn(play: Player) -> None:  # noqa: F811
    told = play(script=PHASES, configs=CONFIGS, looks=traced(every=10))
    # The counter is read every 50 ms, so a change of power is seen that late at most.
    assert joules(told, "shares/GPU-a/a/1") == pytest.approx(3 * 100, abs=3 * 20)
    assert joules(told, "shares/GPU-a/a/2") == pytest.approx(3 * 300, abs=3 * 20)
    assert told["report"]["trace"] == "used"
    assert joules(told, "attributed/GPU-a/trace") == pytest.approx(1200, rel=0.01)
    assert row(told, "a:2")["metered_requests"] == 30


def test_a_traced_request_of_a_version_on_two_gpus_weighs_half_on_each(play: Player) -> None:  # noqa: F811
    found = looks(*(two(n, (1000, 1000), requests=1) for n in range(3)))
    for place, look in enumerate(found):
        look["traces"] = [["a", version, look["at"] - 0.99, look["at"] - 0.01] for version in "12"] if place else []
    script = gpu("a", 300_000) + gpu("b", 50_000, 1)
    told = play(script=script, configs={"a:1": on_gpu(0, 1), "a:2": on_gpu(0)}, looks=found)
    assert told["report"]["trace"] == "used"
    assert joules(told, "shares/GPU-a/a/2") == pytest.approx(2 * 196, rel=0.02)
    assert joules(told, "shares/GPU-a/a/1") == pytest.approx(2 * 98, rel=0.02)


def test_sampled_traces_are_not_used_and_statistics_are(play: Player) -> None:  # noqa: F811
    told = play(script=PHASES, configs=CONFIGS, looks=traced(every=10, share=2))
    assert joules(told, "shares/GPU-a/a/1") == joules(told, "shares/GPU-a/a/2") == pytest.approx(600, rel=0.01)
    assert joules(told, "attributed/GPU-a/trace") is None
    assert "rate=1" in told["report"]["trace"]


def test_forged_traces_are_not_used(play: Player) -> None:  # noqa: F811
    found = traced(every=10)
    found[2]["traces"] += [["a", "2", found[2]["at"] - 0.9, found[2]["at"] - 0.5]] * 3
    told = play(script=PHASES, configs=CONFIGS, looks=found)
    assert joules(told, "attributed/GPU-a/trace") == pytest.approx(800, rel=0.01)
    assert joules(told, "attributed/GPU-a/statistics") == pytest.approx(400, rel=0.01)
