"""Shared by all tests."""

from __future__ import annotations

import sys
from pathlib import Path

# Helper modules of one part (such as train/tiny_runs.py) serve the tests of others.
for folder in ("data", "evaluate", "train"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
