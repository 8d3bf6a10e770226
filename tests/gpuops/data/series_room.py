"""A labelled series of records that the tests of ingest cut, append and kill, and readers that use none of our code."""

from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pandas as pd
import xarray as xr
import zarr

RECORDS = 40


def series(first: int = 0, last: int = RECORDS) -> xr.Dataset:
    """Records `first` to `last` of 40: temperature by [time, y, x] and rain by [time, y], six hours apart."""
    generator = np.random.default_rng(0)
    kelvin = generator.normal(280, 5, (RECORDS, 6, 5)).astype(np.float32)
    rain = generator.gamma(0.5, 2.0, (RECORDS, 6)).astype(np.float32)
    rain[3, 2] = rain[17] = np.nan
    times = pd.date_range("2000-01-01", periods=RECORDS, freq="6h")
    whole = xr.Dataset(
        {
            "temperature": (("time", "y", "x"), kelvin, {"units": "K", "long_name": "air temperature"}),
            "rain": (("time", "y"), rain, {"units": "mm"}),
        },
        coords={"time": times, "y": np.arange(6)},
        attrs={"title": "a series"},
    )
    return whole.isel(time=slice(first, last))


def plain_store(path: Path) -> Any:
    """The store at a path, opened by zarr-python and Icechunk alone."""
    if (path / "snapshots").is_dir():
        icechunk.set_logs_filter("error")
        return icechunk.Repository.open(icechunk.local_filesystem_storage(str(path))).readonly_session("main").store
    return zarr.storage.LocalStore(path, read_only=True)


def independent(path: Path) -> xr.Dataset:
    """A store's physical values, read by xarray and zarr-python alone."""
    return xr.open_zarr(plain_store(path), consolidated=False, decode_timedelta=False).load()
