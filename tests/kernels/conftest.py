import sys
from pathlib import Path

# pytest's importlib mode leaves sys.path alone; this lets the test files of this folder share transform_oracle.py.
sys.path.insert(0, str(Path(__file__).parent))
