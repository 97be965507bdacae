"""The instruction sets that the C++ kernels are compiled for, one after the other."""

from __future__ import annotations

import pytest

from avppc.ops import _library

LEVELS = ("baseline", "avx2", "avx512")


def set_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels use this instruction set and no better one; skips where the machine lacks it."""
    monkeypatch.setenv("AVPPC_CPU_LEVEL", level)
    try:
        _library.build_info()
    except RuntimeError as error:
        pytest.skip(str(error))
