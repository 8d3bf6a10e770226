"""Two hundred versions, one after the other, under load: no request fails, none is answered by another version's rules,
nobody is sent back, and the server keeps nothing of the ones that are gone."""

import shutil
import threading
from pathlib import Path
from statistics import linear_regression

import pytest
from faulty import Asking, Model, Place, rss_mb, stubs
from tiny_bundle import make_bundle

from gpuops_serving.repository import deploy

RELOADS = 200
SETTLED = 40
"""Reloads after which allocators have what they need."""
GROWTH_MB = 0.1
"""Most that the server itself may grow for each reload; measured: 0.0005."""


@pytest.mark.slow
def test_two_hundred_reloads_under_load_fail_no_request_and_leave_nothing_behind(tmp_path: Path) -> None:
    place = Place(tmp_path)
    model = Model(place, "tiny", tmp_path / "model")
    gains = {"1": 0.5}
    kept: list[float] = []
    try:
        with (
            Asking(place.server.http_url, "tiny", gains) as one,
            Asking(place.server.http_url, "tiny", gains) as two,
            Asking(place.server.grpc_url, "tiny", gains) as three,
        ):
            for number in range(2, RELOADS + 2):
                gains[str(number)] = gain = 0.5 + number / 8
                bundle = make_bundle(tmp_path / "next", version_id=f"{number:064x}", gain=gain)
                deploy(bundle, place.repository)
                place.client.load("tiny")
                assert three.is_alive()
                shutil.rmtree(bundle)
                kept.append(rss_mb(place.server.pid))
        for asking in (one, two, three):
            assert asking.wrong == []
            assert asking.numbers() == sorted(asking.numbers())  # each connection only ever moves on
            assert len(asking.numbers()) > RELOADS / 4  # the load was there all the time
        model.serves(gain, str(RELOADS + 1))
        assert sorted({s.version for s in place.client.models() if s.state == "READY"}, key=int) == ["200", "201"]
        over = threading.Event()
        for _ in range(600):  # the last stub that is gone may still be ending
            if len(stubs(place.server)) == 2:
                break
            over.wait(0.05)
        assert len(stubs(place.server)) == 2
        assert len(list(Path("/dev/shm").glob(f"{place.server.server_id}*"))) == 2
        slope = linear_regression(range(SETTLED, RELOADS), kept[SETTLED:]).slope
        assert slope < GROWTH_MB, kept
    finally:
        place.close()
        model.ledger.close()
