"""Shared by the tests of the operators."""

from __future__ import annotations

import pytest
from cpu_levels import LEVELS, set_level


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, in turn."""
    set_level(request.param, monkeypatch)
    return str(request.param)
