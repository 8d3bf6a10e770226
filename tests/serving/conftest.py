import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode leaves sys.path alone; this lets the test files of this folder share tiny_bundle.py.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_bundle import deployed

from gpuops_serving.server import TritonServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One real tritonserver for all tests that only ask."""
    folder = tmp_path_factory.mktemp("serving")
    with TritonServer(deployed(folder), log=folder / "triton.log", shared_memory=True) as running:
        yield running
