"""A small atlas in HDF5, and the store that ingest makes of it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode leaves sys.path alone; this lets the test files of this folder share data_room.py.
sys.path.insert(0, str(Path(__file__).parent))

from data_room import Atlas, make_recipe, write_atlas
from object_store import ObjectStorage, running_s3

from gpuops.data.source import Source
from gpuops.data.writing.ingest import ingest


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """Arrays and the files that hold them."""
    return write_atlas(tmp_path_factory.mktemp("atlas"))


@pytest.fixture(scope="session")
def store(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The atlas ingested once; read-only: a test that damages it copies it first."""
    return ingest(make_recipe(atlas, tmp_path_factory.mktemp("store") / "atlas"))


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStorage]:
    """An S3-compatible endpoint on loopback; `s3.bucket()` makes a bucket."""
    with running_s3() as storage:
        yield storage
