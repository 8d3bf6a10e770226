"""The energy counters of Intel and AMD processors, as Linux shows them (RAPL under /sys/class/powercap).

Packages and their memory (dram) are told apart; cores and uncore are parts of a package, and psys contains them all, so
none of those is counted. Source: Linux Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

from pathlib import Path

from gpuops.energy.sensor import Count, Found, Vitals

ROOT = Path("/sys/class/powercap")
_MICRO_PER_MILLI = 1000


class RaplSensor:
    """One domain: a processor package, or the memory beside it."""

    method = "rapl-counter"
    step_ms = 1.0
    """Intel's Software Developer's Manual, volume 3, 16.10: updated about every millisecond."""

    def __init__(self, zone: Path) -> None:
        """Open a zone.

        Raises:
            OSError: it may not be read.
        """
        self._file = zone / "energy_uj"
        self.name = (zone / "name").read_text().strip()
        self.id = zone.name
        self.scope = "dram" if self.name == "dram" else "cpu-package"
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj = self._raw()
        self._turns = 0

    def count(self) -> Count:
        """The counter now; one that came round to zero, as it does within the hour, goes on."""
        try:
            raw = self._raw()
        except OSError as error:
            return Count(None, reason=f"{self._file}: {error.strerror}")
        if raw < self._last_uj:
            self._turns += 1
        self._last_uj = raw
        return Count((self._turns * self._range_uj + raw) // _MICRO_PER_MILLI)

    def vitals(self) -> Vitals:
        """Nothing else is known of a domain."""
        return Vitals()

    def _raw(self) -> int:
        return int(self._file.read_text())


def open_host(root: Path = ROOT) -> Found:
    """The counters of this host's packages and memory."""
    sensors = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                sensors.append(RaplSensor(zone))
        except PermissionError:
            return Found((), f"this user may not read {zone / 'energy_uj'}: it is root's, chmod o+r would open it")
        except (OSError, ValueError) as error:
            return Found((), f"{zone} cannot be read: {error}")
    if not sensors:
        return Found((), "this machine shows no RAPL counters (a virtual machine seldom does)")
    return Found(sensors)
