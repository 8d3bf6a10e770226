"""`gpuops inspect`: what a store holds, in words and as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from gpuops.cli.inspect import inspect
from gpuops.data.icechunk_store import storage

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from archives import write_anemoi, write_weather


def document(url: Path, capsys: pytest.CaptureFixture[str], snapshot: str | None = None) -> dict[str, Any]:
    inspect(str(url), snapshot, json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def words(url: Path, capsys: pytest.CaptureFixture[str]) -> str:
    inspect(str(url), None, json=False)
    return " ".join(capsys.readouterr().out.split())


def test_what_a_reingest_would_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_weather(tmp_path / "era5", chunk=4)
    found = document(tmp_path / "era5", capsys)
    gain = found["variables"]["2m_temperature"]["reingest"]
    assert gain["requests_per_sample"] == {"now": 1, "after": 1}
    assert gain["decoded_per_useful_byte"] == {"now": 4.0, "in_lanes": 1.0, "after": 1.0}
    assert gain["bytes"] == {"now": 20 * 48 * 4, "after": 20 * 48 * 2}
    assert found["variables"]["land_sea_mask"]["reingest"] is None
    assert found["declared_statistics"] is None
    assert found["fingerprint_rests_on"] == "names and sizes (weak)"
    assert "1 to 1 requests a random sample, 4 to 1 bytes decoded per useful byte (in lanes 1 now)" in words(
        tmp_path / "era5", capsys
    )


def test_straddling_records_and_the_layout_that_gains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w")
    group.create_array("cut", data=np.ones((3, 5, 4), "i2"), chunks=(2, 2, 4), dimension_names=["t", "y", "x"])
    group.create_array("good", data=np.ones((3, 5, 4), "i2"), chunks=(1, 5, 4), compressors=ZstdCodec(checksum=True))
    found = document(tmp_path / "z", capsys)["variables"]
    gain = found["cut"]["reingest"]
    assert gain["requests_per_sample"]["now"] == 3
    assert gain["decoded_per_useful_byte"]["now"] == pytest.approx(3 * 2 * 2 * 4 / 20)
    assert gain["decoded_per_useful_byte"]["in_lanes"] == pytest.approx(6 / 5), "the edge is decoded for nothing"
    assert "re-ingest gains nothing" in words(tmp_path / "z", capsys)


def test_an_anemoi_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = write_anemoi(tmp_path / "an.zarr")
    found = document(tmp_path / "an.zarr", capsys)
    assert found["channels"] == {"data": ["2t", "msl", "10u"]}
    assert found["missing"]["time"] == {
        "positions": [3, 11],
        "values": ["2021-03-01T18:00:00", "2021-03-03T18:00:00"],
    }
    declared = found["declared_statistics"]["variables"]["10u"]
    assert declared["maximum"] == pytest.approx(float(np.nanmax(values[:, 2])))
    text = words(tmp_path / "an.zarr", capsys)
    assert "not our training split" in text
    assert "no data at 2 of time: 2021-03-01T18:00:00, 2021-03-03T18:00:00" in text


def test_snapshots_with_tags_and_the_quality_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = icechunk.Repository.create(storage(tmp_path / "repo"))
    session = repository.writable_session("main")
    group = zarr.open_group(session.store)
    group.create_array("a", data=np.ones((4, 3), "i2"))
    group.create_group(".gpuops/quality").attrs.update({"a": {"missing_share": 0.25, "gaps": []}})
    first = session.commit("first")
    repository.create_tag("v1", first)
    session = repository.writable_session("main")
    zarr.open_group(session.store)["a"][0] = 7
    second = session.commit("second")
    found = document(tmp_path / "repo", capsys)
    assert [(entry["id"], entry["tags"], entry["branches"]) for entry in found["snapshots"][:2]] == [
        (second, [], ["main"]),
        (first, ["v1"], []),
    ]
    assert found["quality"] == {"a": {"missing_share": 0.25, "gaps": []}}
    text = words(tmp_path / "repo", capsys)
    assert "(tag v1): first" in text
    assert "a.missing_share: 0.25" in text
    assert document(tmp_path / "repo", capsys, "v1")["snapshot"] == first


def test_an_array_that_is_not_read_is_described_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=2)
    group.create_array("a", data=np.ones((4, 3)), order="F")
    assert "re-ingest" in document(tmp_path / "z", capsys)["variables"]["a"]["not_read"]
    assert "not read" in words(tmp_path / "z", capsys)
