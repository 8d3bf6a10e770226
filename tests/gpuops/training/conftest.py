"""A store, a model and runs of them, for each file of tests its own."""

from pathlib import Path

import pytest

from tests.gpuops.training.test_faults import Room


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="module")
def alone(room: Room) -> Path:
    """A run of two ranks on one host that nobody disturbed."""
    run = room.root / "alone"
    room.fit(run)
    return run
