"""Archives as others write them, small: xarray's Zarr, the WeatherBench layout, anemoi data sets."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr

HOURS = 20
NAMES = ("2t", "msl", "10u")


def write_weather(path: Path, zarr_format: Any = 2, chunk: int = 4) -> xr.Dataset:
    """The WeatherBench layout: consolidated, time/level/latitude/longitude, static fields beside it."""
    generator = np.random.default_rng(3)
    time = np.datetime64("2020-01-01T00", "ns") + np.arange(HOURS) * np.timedelta64(6, "h")
    data = xr.Dataset(
        {
            "2m_temperature": (
                ("time", "latitude", "longitude"),
                generator.normal(280, 9, (HOURS, 6, 8)).astype(np.float32),
            ),
            "geopotential": (
                ("time", "level", "latitude", "longitude"),
                generator.normal(size=(HOURS, 3, 6, 8)).astype(np.float32),
            ),
            "land_sea_mask": (("latitude", "longitude"), generator.random((6, 8)).astype(np.float32)),
        },
        {
            "time": time,
            "level": np.array([500, 700, 850]),
            "latitude": np.linspace(-75, 75, 6),
            "longitude": np.arange(8) * 45.0,
        },
    )
    data["2m_temperature"].attrs["units"] = "K"
    data["time"].encoding = {"units": "hours since 1959-01-01", "dtype": "int64"}
    for name in ("2m_temperature", "geopotential"):
        data[name].encoding["chunks"] = (chunk, *data[name].shape[1:])
    data.to_zarr(path, zarr_format=zarr_format, consolidated=True)
    return data


def write_anemoi(path: Path, zarr_format: Any = 2, ensembles: int = 1, missing: tuple[int, ...] = (3, 11)) -> Any:
    """An anemoi data set by hand, as anemoi-datasets 0.5 lays it out; returns its stored values."""
    generator = np.random.default_rng(4)
    values = generator.normal(size=(HOURS, len(NAMES), ensembles, 10)).astype(np.float32)
    values[list(missing)] = np.nan
    dates = np.datetime64("2021-03-01T00", "s") + np.arange(HOURS) * np.timedelta64(6, "h")
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)

    def add(name: str, dims: tuple[str, ...], data: npt.NDArray[Any], **options: Any) -> None:
        array = group.create_array(name, data=data, **options)
        array.attrs["_ARRAY_DIMENSIONS"] = dims

    chunk = (1, len(NAMES), ensembles, 10)
    add("data", ("time", "variable", "ensemble", "cell"), values, chunks=chunk, fill_value=np.nan)
    add("dates", ("time",), dates if zarr_format == 2 else dates.astype("M8[s]"))
    add("latitudes", ("cell",), np.linspace(-80, 80, 10))
    add("longitudes", ("cell",), np.arange(10) * 36.0)
    for name, of in (("mean", np.nanmean), ("stdev", np.nanstd), ("minimum", np.nanmin), ("maximum", np.nanmax)):
        add(name, ("variable",), of(values.astype(np.float64), axis=(0, 2, 3)))
    group.attrs.update(
        {
            "variables": list(NAMES),
            "missing_dates": [str(dates[at].astype("M8[s]")) for at in missing],
            "statistics_start_date": str(dates[0]),
            "statistics_end_date": str(dates[-1]),
            "frequency": "6h",
        }
    )
    return values
