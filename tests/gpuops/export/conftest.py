import sys
from pathlib import Path

import pytest

# pytest's importlib mode leaves sys.path alone; this lets the test files of this folder share small.py.
sys.path.insert(0, str(Path(__file__).parent))

from small import make_bundle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle in every format that is written in seconds; read-only: a test that changes it copies it first."""
    return make_bundle(tmp_path_factory.mktemp("small") / "bundle", "pt2", "onnx", "int8")
