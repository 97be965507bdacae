"""The talking mouths: a synthetic data set with true audio-visual and temporal structure, in LRW's layout.

espeak-ng speaks and tells when each phoneme begins; visemes move a drawn mouth; a camera and a room spoil both.
"""

from __future__ import annotations

from typing import Any

__all__ = ["run", "write_contact_sheet"]


def __getattr__(name: str) -> Any:
    """Loads the generator, and with it OpenCV and espeak-ng, where it is first used."""
    if name == "run":
        from avppc.synth.dataset import run

        return run
    if name == "write_contact_sheet":
        from avppc.synth.contact_sheet import write_contact_sheet

        return write_contact_sheet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
