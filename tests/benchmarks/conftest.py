"""Makes the scripts of benchmarks/gpu, benchmarks/results.py and outcome.py importable by name."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(ROOT / "benchmarks"))  # last: both folders have a linear.py
