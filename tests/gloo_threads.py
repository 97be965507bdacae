"""Threads that Gloo leaves behind: one that frees a tensor while Python shuts down aborts the process."""

from __future__ import annotations

from pathlib import Path


def check_gloo_has_ended() -> None:
    """AssertionError while this process has threads that Gloo has started."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    left = [name for name in names if "gloo" in name]
    assert not left, f"threads outlive their process group: {left}"
