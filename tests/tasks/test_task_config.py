"""The settings of a task are a part of those of a run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from avppc.config import CutConfig, ObjectiveConfig, PretrainConfig, TaskConfig
from avppc.tasks.registry import make_task


def test_a_task_is_made_without_data_and_run() -> None:
    task = make_task("av-permutative", TaskConfig(cut=CutConfig(9, 2, 9), objective=ObjectiveConfig(moments="none")))
    assert task.frames_needed == 20
    with pytest.raises(ValueError, match=r"cut.past_frames must leave spans a moment, 7 frames after .*; got 6"):
        make_task("av-permutative", TaskConfig(cut=CutConfig(8, 2, 8), objective=ObjectiveConfig(moments="element")))


def test_spans_too_short_for_a_moment_have_no_pair_scores() -> None:
    assert make_task("av-permutative", TaskConfig(cut=CutConfig(9, 2, 9))).has_pair_scores
    assert not make_task("av-permutative", TaskConfig(cut=CutConfig(8, 2, 8))).has_pair_scores


def test_a_run_has_the_same_settings_with_the_same_defaults() -> None:
    run, task = PretrainConfig(Path("packed"), Path("run")), TaskConfig()
    assert {field.name: getattr(run, field.name) for field in fields(task)} == {
        field.name: getattr(task, field.name) for field in fields(task)
    }
    assert [field.name for field in fields(run)][:3] == ["data", "out", "preset"]


def test_both_check_them_alike() -> None:
    for make in (TaskConfig, lambda **changes: PretrainConfig(Path("packed"), Path("run"), **changes)):
        with pytest.raises(ValueError, match="accumulate"):
            make(accumulate=0)
