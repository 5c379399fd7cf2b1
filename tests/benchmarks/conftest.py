"""What the tests of the scripts in benchmarks/gpu share: their modules, importable by name."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(SCRIPTS))
