"""Settings of `avppc doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from avppc.checks import check_choice, check_types

REQUIRABLE = ("cpp", "cuda", "triton", "pyav", "torchcodec", "dali", "nvdec")


@dataclass(frozen=True)
class DoctorConfig:
    """What this installation has, which backend each op uses and why, and whether the ops are right here.

    The exit code is 0 if all is well, 1 if a self-test fails or something that is required is missing.
    """

    json: bool = False
    """Prints one JSON object instead of text."""
    self_test: bool = True
    """Compares each op with its definition in float64, which takes some seconds."""
    require: tuple[str, ...] = ()
    """What must be there: cpp, cuda, triton, pyav, torchcodec, dali, nvdec."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.require:
            check_choice("require", name, REQUIRABLE)
