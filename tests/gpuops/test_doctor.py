"""The doctor names every slow or blind path of a store, with its remedy, and none that is not there."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, ZstdCodec

from gpuops.data.icechunk_store import storage
from gpuops.doctor import Finding, machine, store
from gpuops.errors import InputError

sys.path.insert(0, str(Path(__file__).parent / "data"))

from archives import write_anemoi, write_weather
from object_store import running_s3, running_web

SAFE: dict[str, Any] = {"compressors": ZstdCodec(level=1, checksum=True)}


def write(path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str = "i2", **options: Any) -> zarr.Array:
    """One array `a` [time, y, x], every value different from the fill value."""
    group = zarr.open_group(path, mode="a")
    array = group.create_array(
        "a", shape=shape, chunks=chunk, dtype=dtype, dimension_names=("time", "y", "x"), **options
    )
    array[...] = 1 + np.arange(np.prod(shape)).reshape(shape) % 100
    return array


def said(findings: list[Finding], what: str) -> str:
    """All that was said of one thing."""
    return " | ".join(f.detail for f in findings if f.what == what)


def levels(findings: list[Finding], what: str) -> set[str]:
    return {f.level for f in findings if f.what == what}


def test_the_preferred_layout_is_well(tmp_path: Path) -> None:
    write(tmp_path / "z", (8, 256, 256), (1, 256, 256), shards=(4, 256, 256), **SAFE)
    findings = store(str(tmp_path / "z"))
    assert levels(findings, "a") == {"ok"}
    assert "no chunk missing" in said(findings, "a")


@pytest.mark.parametrize(
    ("shape", "chunk", "options", "words"),
    [
        ((8, 64, 64), (4, 64, 64), SAFE, "4 records a chunk: .* 4 bytes per useful byte; lanes .* \\(1\\)"),
        ((8, 64, 64), (1, 32, 64), SAFE, r"a record of \(64, 64\) straddles chunks of \(32, 64\): 2 reads a record"),
        ((64, 64, 64), (1, 64, 64), SAFE, "8,192 bytes: below 64 KiB the number of requests is the limit"),
        ((2, 4096, 2304), (1, 4096, 2304), SAFE, "18 MiB: above 16 MiB"),
        ((8, 64, 64), (1, 64, 64), {"compressors": ZstdCodec(level=1)}, "no checksum .* corruption cannot be seen"),
        ((8, 64, 64), (1, 64, 64), {"dtype": "f4", "compressors": None}, "4 bytes a value, not compressed: .* 2 times"),
        ((8, 64, 64), (1, 64, 64), {"dtype": "f8", **SAFE}, "stored as float64, which no kernel reads"),
    ],
)
def test_a_layout_and_its_price(
    tmp_path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], options: dict[str, Any], words: str
) -> None:
    import re

    write(tmp_path / "z", shape, chunk, **options)
    findings = store(str(tmp_path / "z"))
    assert levels(findings, "a") <= {"ok", "note"}
    notes = [f.detail for f in findings if f.what == "a" and f.level == "note"]
    assert any(re.search(words, note) for note in notes), notes


def test_a_codec_that_is_not_read_is_bad(tmp_path: Path) -> None:
    write(tmp_path / "z", (4, 8, 8), (1, 8, 8), serializer=BytesCodec(endian="big"), compressors=None)
    findings = store(str(tmp_path / "z"))
    assert levels(findings, "a") == {"bad"}
    assert "re-ingest" in said(findings, "a")


def test_missing_keys_are_counted_and_named(tmp_path: Path) -> None:
    write(tmp_path / "z", (8, 64, 64), (2, 64, 64), **SAFE)
    (tmp_path / "z" / "a" / "c" / "1" / "0" / "0").unlink()
    (tmp_path / "z" / "a" / "c" / "3" / "0" / "0").unlink()
    found = said(store(str(tmp_path / "z")), "a")
    assert "2 of 4 keys are not there (first: a/c/1/0/0, a/c/3/0/0)" in found
    assert "missing_chunks='fill'" in found


@pytest.mark.parametrize("place", ["start", "end"])
def test_missing_inner_chunks_are_seen_through_the_shard_index(tmp_path: Path, place: Any) -> None:
    from zarr.codecs import ShardingCodec

    codec = ShardingCodec(
        chunk_shape=(1, 64, 64), codecs=[BytesCodec(), ZstdCodec(checksum=True)], index_location=place
    )
    group = zarr.open_group(tmp_path / "z", mode="w")
    array = group.create_array(
        "a", shape=(7, 64, 64), chunks=(4, 64, 64), dtype="i2", serializer=codec, compressors=None, filters=None
    )
    array[...] = 1
    assert "missing" not in said(store(str(tmp_path / "z")), "a").replace("no chunk missing", "")
    array[1] = 0  # the fill value: Zarr leaves such a chunk out, and the shard is there all the same
    found = said(store(str(tmp_path / "z")), "a")
    assert "0 of 2 keys are not there, 1 of 7 inner chunks in the 2 shards looked at are missing" in found
    assert "a/c/0/0/0 (1 of 4 inner chunks)" in found


def test_icechunk_counts_chunks_and_sees_the_silent_pipeline(tmp_path: Path) -> None:
    from zarr.core.codec_pipeline import BatchedCodecPipeline
    from zarr.registry import fully_qualified_name, register_pipeline

    class ZarrsCodecPipeline(BatchedCodecPipeline):
        pass

    repository = icechunk.Repository.create(storage(tmp_path / "repo"))
    session = repository.writable_session("main")
    group = zarr.open_group(session.store)
    array = group.create_array("a", shape=(4, 64, 64), chunks=(1, 64, 64), dtype="i2", **SAFE)
    array[:3] = 1
    session.commit("three of four")
    findings = store(str(tmp_path / "repo"))
    assert "1 of 4 keys are not there" in said(findings, "a")
    assert said(findings, "codec pipeline") == ""
    assert "snapshot id" in said(findings, "identity")
    register_pipeline(ZarrsCodecPipeline)
    with zarr.config.set({"codec_pipeline.path": fully_qualified_name(ZarrsCodecPipeline)}):
        assert "silently becomes the pure-Python pipeline" in said(store(str(tmp_path / "repo")), "codec pipeline")
        write(tmp_path / "z", (2, 8, 8), (1, 8, 8))
        assert said(store(str(tmp_path / "z")), "codec pipeline") == "", "a plain directory is as fast as it says"


def test_fork_is_named_and_what_is_done_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "z", (2, 8, 8), (1, 8, 8))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "fork")
    assert "threads in the rank's own process" in said(store(str(tmp_path / "z")), "worker processes")
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "spawn")
    assert said(store(str(tmp_path / "z")), "worker processes") == ""


def test_first_axes_that_differ_and_static_fields_that_do_not(tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    findings = store(str(tmp_path / "era5"))
    assert said(findings, "first axes") == ""
    assert said(findings, "land_sea_mask") == "", "a static field has no records to judge"
    assert "weak: it rests on names and sizes" in said(findings, "identity")
    group = zarr.open_group(tmp_path / "era5", mode="a", zarr_format=2)
    group.create_array("daily", data=np.zeros((5, 6, 8), "f4")).attrs["_ARRAY_DIMENSIONS"] = ["day", "y", "x"]
    (tmp_path / "era5" / ".zmetadata").unlink()
    found = said(store(str(tmp_path / "era5")), "first axes")
    assert "time (20): 2m_temperature, geopotential; day (5): daily" in found


def test_missing_dates_gaps_and_channels_of_an_anemoi_data_set(tmp_path: Path) -> None:
    write_anemoi(tmp_path / "an.zarr", missing=(3, 11))
    findings = store(str(tmp_path / "an.zarr"))
    assert "2 positions along time hold no data" in said(findings, "missing dates")
    assert "3 of 3 channels share a chunk" in said(findings, "data")
    assert said(findings, "times along time") == ""
    assert not (tmp_path / "an.zarr" / "data" / "3.0.0.0").exists(), "a date of nothing but NaN is left out"
    assert "keys are not there" not in said(findings, "data"), "and nobody misses it"
    (tmp_path / "an.zarr" / "data" / "5.0.0.0").unlink()
    assert "1 of 18 keys are not there (first: data/5.0.0.0)" in said(store(str(tmp_path / "an.zarr")), "data")
    group = zarr.open_group(tmp_path / "an.zarr", mode="a")
    dates = group["dates"][:]
    dates[12:] += np.timedelta64(1, "D")
    group["dates"][:] = dates
    found = said(store(str(tmp_path / "an.zarr")), "times along time")
    assert "1 of 19 steps are not 21600 seconds, the first after 2021-03-03T18:00:00" in found


def test_a_web_server_without_ranges_and_a_bucket_with_them(tmp_path: Path) -> None:
    write_weather(tmp_path / "era5")
    with running_web(tmp_path) as root:
        findings = store(f"{root}/era5")
    assert "whole object" in said(findings, "byte ranges")
    assert levels(findings, "byte ranges") == {"note"}, "nothing in it is sharded"
    assert "cannot list its keys" in said(findings, "2m_temperature")
    with running_s3() as storage_of_s3:
        findings = store(storage_of_s3.upload(tmp_path / "era5", f"{storage_of_s3.bucket()}/era5"))
    assert levels(findings, "byte ranges") == {"ok"}
    assert "etags" in said(findings, "identity")


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        store(str(tmp_path / "nothing"))


def test_this_machine() -> None:
    assert {f.what for f in machine()} >= {"python", "cores", "extra data", "energy", "tritonserver"}
