"""RAPL: counters that come round, that may not be read, and that are parts of others."""

from pathlib import Path

import pytest

from gpuops.energy.rapl import open_host


def zone(root: Path, name: str, label: str, energy_uj: int = 0, range_uj: int = 2**32) -> Path:
    path = root / name
    path.mkdir()
    (path / "name").write_text(f"{label}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def test_packages_and_memory_count_and_their_parts_do_not(tmp_path: Path) -> None:
    labels = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for place, label in labels.items():
        zone(tmp_path, f"intel-rapl:{place}", label)
    found = open_host(tmp_path)
    assert [(sensor.name, sensor.scope) for sensor in found.sensors] == [
        ("package-0", "cpu-package"),
        ("dram", "dram"),
        ("package-1", "cpu-package"),
    ]


def test_a_counter_that_comes_round_goes_on(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=9_000_000, range_uj=10_000_000)
    (sensor,) = open_host(tmp_path).sensors
    assert sensor.count().energy_mj == 9_000
    for raw, millijoules in ((9_500_000, 9_500), (100_000, 10_100), (200_000, 10_200), (0, 20_000)):
        (path / "energy_uj").write_text(str(raw))
        assert sensor.count().energy_mj == millijoules


def test_no_counters_say_so(tmp_path: Path) -> None:
    assert "no RAPL counters" in str(open_host(tmp_path / "nowhere").reason)


def test_a_counter_that_is_roots_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = zone(tmp_path, "intel-rapl:0", "package-0") / "energy_uj"
    read = Path.read_text

    def refused(path: Path) -> str:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_text", refused)
    assert "may not read" in str(open_host(tmp_path).reason)


def test_a_counter_that_goes_away_says_so(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0")
    (sensor,) = open_host(tmp_path).sensors
    (path / "energy_uj").unlink()
    count = sensor.count()
    assert count.energy_mj is None
    assert "No such file" in str(count.reason)
