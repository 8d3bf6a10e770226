"""What training warns of before it begins: windows over gaps."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import gpuops as go
from gpuops.data.sample import Field, Window


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (list(range(12)), None),
        (
            [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14],
            "2 windows span a gap or disorder in 'time', the first behind 2000-01-01T04",
        ),
        ([0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11], "4 windows"),
        ([0, 744, 1440, 2184, 2904, 3648, 4368, 5112, 5856, 6576, 7320, 8040], None),
    ],
    ids=["even", "gap", "disorder", "months"],
)
def test_windows_over_gaps_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hours: list[int], said: str | None
) -> None:
    times = np.datetime64("2000-01-01", "ns") + np.array(hours) * np.timedelta64(1, "h")
    data = xr.Dataset({"a": (("time", "x"), np.arange(36, dtype=np.float32).reshape(12, 3))}, {"time": times})
    data.to_zarr(tmp_path, zarr_format=3, consolidated=False, encoding={"a": {"chunks": (1, 3)}})
    fields = {"x": [Field("a", at=(0, 1))]}, {"y": [Field("a", at=(2,))]}
    go.ZarrDataModule(str(tmp_path), *fields, Window("time", 3), global_batch=2, threads=1).setup()
    assert (said is None) == ("windows span" not in caplog.text)
    assert said is None or said in caplog.text
