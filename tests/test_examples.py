"""The examples run, and do what they say."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    """The main function of an example."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_plain_torch_finds_the_partners(capsys: pytest.CaptureFixture[str]) -> None:
    stats = example("plain_torch")(steps=100)
    assert stats.accuracy.item() > 0.5  # by chance 1 in 128
    assert "find their partner among 128" in capsys.readouterr().out


def test_lightning_learns_the_subtasks() -> None:
    pytest.importorskip("pytorch_lightning", reason="needs `pip install pytorch-lightning`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns of its own dependencies and of few data workers
        assert example("lightning_module")(epochs=4) > 0.3  # by chance 1 in 64


def test_clip_style_losses_agree() -> None:
    assert example("clip_style")(batch=200, dim=32) < 1e-5
