"""The tiny data set, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import write_tiny_set


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("tiny") / "packed")
