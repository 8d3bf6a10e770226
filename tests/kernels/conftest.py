import sys
from pathlib import Path

# pytest's importlib mode leaves sys.path alone; this lets the test files of this folder share what is beside them, and
# what the benchmarks compile kernels with.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
