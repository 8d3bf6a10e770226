"""What the tests of the data room share: an atlas, recipes, samples, and oracles that use none of our code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from gpuops.data.datamodule import ZarrDataModule
from gpuops.data.sample import Field, SampleSpec, Window
from gpuops.data.source import Source
from gpuops.data.split import Holdout
from gpuops.data.writing.quality import Rules
from gpuops.data.writing.recipe import Axis, Recipe, Tiling, VariableRecipe

TILE, REGION = 10, 2
SCALE, HEIGHT, SEA = 0.05, 28.0, 255


@dataclass(frozen=True)
class Atlas:
    """Arrays of [latitude, longitude(, month)] and their files."""

    folder: Path
    turbidity: npt.NDArray[np.uint8]
    altitude: npt.NDArray[np.uint8]

    @property
    def tiles(self) -> npt.NDArray[np.uint8]:
        """Turbidity by [tile, month, y, x]."""
        return cut_tiles(np.moveaxis(self.turbidity, 2, 0), TILE)

    @property
    def heights(self) -> npt.NDArray[np.uint8]:
        """Altitude by [tile, y, x]."""
        return cut_tiles(self.altitude, TILE)


def cut_tiles(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """[..., rows, columns] to [tile, ..., size, size], the slow and plain way."""
    rows, columns = array.shape[-2] // size, array.shape[-1] // size
    return np.stack(
        [array[..., r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(rows) for c in range(columns)]
    )


def write_atlas(folder: Path) -> Atlas:
    """40 x 60 points, 12 months; a third of the altitude is sea."""
    generator = np.random.default_rng(5)
    turbidity = generator.integers(20, 181, (40, 60, 12), np.uint8)
    altitude = generator.integers(0, 200, (40, 60), np.uint8)
    altitude[generator.random((40, 60)) < 0.3] = SEA
    with h5py.File(folder / "turbidity.h5", "w") as file:
        file["group/turbidity"] = turbidity
    with h5py.File(folder / "altitude.h5", "w") as file:
        file["altitude"] = altitude
    return Atlas(folder, turbidity, altitude)


def make_recipe(atlas: Atlas, url: Path, **changes: Any) -> Recipe:
    """The atlas as 24 tiles in 6 regions."""
    whole = Recipe(
        url=str(url),
        title="an atlas",
        variables={
            "turbidity": VariableRecipe(
                f"{atlas.folder / 'turbidity.h5'}#group/turbidity",
                ["latitude", "longitude", "month"],
                scale=SCALE,
                long_name="turbidity of the air",
                quality=Rules(valid_min=1.0, valid_max=9.0, max_missing=0.0),
            ),
            "altitude": VariableRecipe(
                f"{atlas.folder / 'altitude.h5'}#altitude",
                ["latitude", "longitude"],
                scale=HEIGHT,
                offset=-450.0,
                missing=SEA,
                fill=0.0,
                unit="m",
                quality=Rules(max_missing=0.5),
            ),
        },
        coordinates={
            "latitude": Axis(20.0, -0.5, "degrees_north"),
            "longitude": Axis(-10.0, 0.25, "degrees_east"),
            "month": Axis(1, 1, "month"),
        },
        tiling=Tiling("latitude", "longitude", TILE, REGION),
    )
    return replace(whole, **changes)


def change(recipe: Recipe, variable: str, **changes: Any) -> Recipe:
    """The recipe with some keys of one variable changed."""
    return replace(recipe, variables={**recipe.variables, variable: replace(recipe.variables[variable], **changes)})


def write_series(folder: Path, values: npt.NDArray[Any], **variable: Any) -> Recipe:
    """A recipe of one untiled variable `a` [time, y, x] (fewer axes too), in a file of its own."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "series.h5", "w") as file:
        file["a"] = values
    dims = ["time", "y", "x"][: values.ndim]
    return Recipe(str(folder / "store"), {"a": VariableRecipe(f"{folder / 'series.h5'}#a", dims, **variable)})


FORECAST = SampleSpec(
    inputs={
        "x": [Field("turbidity", at=(0, 1, 2)), Field("altitude")],
        "month": [Field("month", at=(3,), raw=True)],
    },
    targets={"y": [Field("turbidity", at=(3,))]},
    window=Window("month", 4, cyclic=True),
)
"""Three months and the altitude in, the fourth month out, round the year."""


@contextmanager
def data_module(store: Source | str, **changes: Any) -> Iterator[ZarrDataModule]:
    options: dict[str, Any] = {
        "inputs": dict(FORECAST.inputs),
        "targets": dict(FORECAST.targets),
        "window": FORECAST.window,
        "holdout": Holdout("region", 0.34),
        "global_batch": 16,
        **changes,
    }
    module = ZarrDataModule(store if isinstance(store, str) else store.url, **options)
    module.setup()
    try:
        yield module
    finally:
        module.teardown()


def ids(batches: Any) -> list[int]:
    return [sample for batch in batches for sample in batch["id"][batch["valid"]].tolist()]


def take(iterator: Iterator[Any], count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]
