"""The model of 1,024 GPUs agrees with what can be worked out by hand."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scale")


@pytest.fixture
def ample(scale: ModuleType):
    """A small cluster with more of everything than it needs: 16 ranks, 64 samples a second each."""
    return scale.Plant(nodes=2, samples=10**5, index_hits=1.0, prefixes=32, decode_s_per_gb=1.0)


def test_with_enough_of_everything_the_gpus_never_wait(scale: ModuleType, ample):
    found = scale.Run(ample, 40, 0).play()
    assert found.stall == pytest.approx(0, abs=1e-9)
    assert found.samples_per_s == pytest.approx(16 * 64)
    assert found.limit == "the GPUs"


@pytest.mark.parametrize(
    ("change", "samples_per_s", "limit"),
    [
        ({"prefixes": 1, "requests_per_s": 500.0}, 500, "requests"),
        ({"prefixes": 1, "requests_per_s": 500.0, "index_hits": 0.0}, 250, "requests"),  # an index before each sample
        ({"node_bytes_per_s": 200e6}, 2 * 200, "network"),
        ({"cores": 1, "decode_s_per_gb": 20.0}, 16 * 1 / (2e-3 * 20), "decode"),
        ({"connections": 2, "spread": 0.0}, 16 * 2 / (0.1 + 1e6 / 85e6), "connections"),
    ],
)
def test_the_scarce_resource_sets_the_rate(scale: ModuleType, ample, change: dict, samples_per_s: float, limit: str):
    found = scale.Run(replace(ample, budget_bytes=64 * 2**20, **change), 60, 0).play()
    assert found.limit == limit
    assert found.samples_per_s == pytest.approx(samples_per_s, rel=0.05)
    assert found.stall == pytest.approx(1 - found.samples_per_s / (16 * 64), abs=1e-6)


def test_the_same_seed_gives_the_same_run(scale: ModuleType, ample):
    tight = replace(ample, prefixes=1, requests_per_s=900.0)
    first, again, other = (scale.Run(tight, 40, seed).play() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_index_cache_holds_its_share_of_16_bytes_a_chunk(scale: ModuleType):
    plant = scale.Plant(index_bytes=64 * 2**20)
    assert plant.hit == pytest.approx(64 * 2**20 / 16e9)
    assert plant.requests_per_sample == pytest.approx(2 - 64 * 2**20 / 16e9)
    assert replace(plant, index_bytes=16e9).requests_per_sample == 1


def test_the_first_epoch_finds_an_index_only_where_the_shard_was_touched_before(scale: ModuleType):
    plant = scale.Plant(nodes=4, ranks=8, sample_bytes=10**6, shard_bytes=16 * 10**6)
    shards = np.random.default_rng(0).permutation(16 * 20_000)[: 16 * 20_000 // 4] // 16  # what one of 4 nodes reads
    found = 1 - len(np.unique(shards)) / len(shards)
    assert scale.first_epoch_hit(plant, plant.ranks) == pytest.approx(found, abs=0.03)


def test_the_table_goes_between_the_marks(scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scale, "plants", lambda base: [replace(base, name="one row", nodes=1, prefixes=8)])
    document = tmp_path / "scale.md"
    document.write_text(f"before\n{scale.MARKS[0]}\nold\n{scale.MARKS[1]}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["scale.py", "--steps", "40", "--decode-s-per-gb", "1", "--doc", str(document)])
    scale.main()
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| one row | 2.00 |" in text
    assert "old" not in text
