"""Shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# Helper modules of one part (such as train/tiny_runs.py) serve the tests of others.
for folder in (
    "data/packed",
    "data/prepare",
    "data/video",
    "evaluate/report",
    "ops",
    "ops/info_nce",
    "ops/info_nce/triton",
    "ops/log_mel",
    "tasks",
    "train",
):
    sys.path.insert(0, str(Path(__file__).parent / folder))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

TESTED = os.environ.get("AVPPC_TESTED")
"""A folder: `make sanitize` tests the package in it, not that of the source tree."""


def pytest_configure() -> None:
    import avppc

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background: the tests of Ctrl-C want it heard
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if TESTED and not Path(avppc.__file__).is_relative_to(Path(TESTED).resolve()):
        raise pytest.UsageError(f"{TESTED} was to be tested, but {avppc.__file__} is imported")
