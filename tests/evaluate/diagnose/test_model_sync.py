from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_check_sync import write_talking
from tiny_runs import tiny_config, write_tiny_set

from avppc.cli import main
from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.diagnose.check_sync import estimate_offset_by_model
from avppc.tasks.base import ProxyTask
from avppc.train.loop import pretrain


class LoudMouths:
    """Sees how dark the mouth is and hears how loud the sound is, frame by frame; the score is their correlation, and
    more for loud sounds, whatever is seen."""

    has_pair_scores = True
    span_frames = 13
    biased = 0.0
    offset_pair_scores = ProxyTask.offset_pair_scores

    def embed_video(self, video, generator):
        dark = -video.double().mean((2, 3))
        return torch.nn.functional.normalize(dark - dark.mean(1, keepdim=True), dim=1)

    def embed_audio(self, audio, generator):
        loud = audio.double().unflatten(1, (-1, 640)).square().mean(2).add(1).log()
        self.bias = self.biased * loud.mean(1)
        return torch.nn.functional.normalize(loud - loud.mean(1, keepdim=True), dim=1)

    def pair_scores(self, seen, heard):
        return seen @ heard.T + self.bias


def trained(**changes: object) -> SimpleNamespace:
    task = LoudMouths()
    for name, value in changes.items():
        setattr(task, name, value)
    return SimpleNamespace(
        task=task, device=torch.device("cpu"), bf16=False, generator=lambda: None, config=SimpleNamespace(task="fake")
    )


@pytest.mark.parametrize("biased", [0.0, 5.0], ids=["fair", "prefers-loud-sounds"])
@pytest.mark.parametrize("shift", [-5, 0, 3])
def test_known_shifts_are_found(tmp_path, shift, biased):
    dataset = PackedDataset(write_talking(tmp_path / "set", [shift] * 100))
    found = estimate_offset_by_model(trained(biased=biased), dataset, 1000, 7)
    assert found.lags.tolist() == list(range(-7, 8))
    assert found.is_clear
    assert found.offset_frames == pytest.approx(shift, abs=0.3)
    assert len(found.video_offsets) == 100
    assert (found.video_offsets == shift).mean() > 0.5


def test_unrelated_sound_is_told(tmp_path):
    dataset = PackedDataset(write_talking(tmp_path / "set", [0] * 150, related=False))
    assert not estimate_offset_by_model(trained(), dataset, 1000, 8).is_clear


def test_clips_of_one_video_are_judged_together_and_the_reach_is_what_the_clips_allow(tmp_path):
    dataset = PackedDataset(write_talking(tmp_path / "set", [2] * 120, videos_of=4))
    found = estimate_offset_by_model(trained(span_frames=20), dataset, 1000, 8)
    assert found.lags.tolist() == list(range(-4, 5))
    assert len(found.video_offsets) == 30
    assert np.mean(found.video_offsets == 2) > 0.8


def test_tasks_without_a_score(tmp_path):
    dataset = PackedDataset(write_talking(tmp_path / "set", [0] * 8))
    fake = trained(has_pair_scores=False, offset_scores=lambda batch, generator: None)
    with pytest.raises(ValueError, match="run: its task, fake, does not compare sound and picture"):
        estimate_offset_by_model(fake, dataset, 1000, 8)
    with pytest.raises(ValueError, match="run: it looks at 28 frames, clips of 29 leave no room"):
        estimate_offset_by_model(trained(span_frames=28), dataset, 1000, 8)


def test_scores_of_wider_steps(tmp_path):
    """A task that tells offsets of two frames, five of them; the best is the one before the middle."""
    dataset = PackedDataset(write_talking(tmp_path / "set", [0] * 8))
    scores = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.0])
    fake = trained(has_pair_scores=False, offset_frames=2, offset_scores=lambda batch, _: scores.repeat(len(batch), 1))
    found = estimate_offset_by_model(fake, dataset, 1000, 8)
    assert found.lags.tolist() == [-4, -2, 0, 2, 4]
    assert (found.video_offsets == -2).all()
    assert -2 < found.offset_frames < -1


@pytest.mark.parametrize("task", ["av-permutative", "synchronization"])
def test_command(tmp_path: Path, capsys, task) -> None:
    """Both ways side by side, from a run on disk; it has learned nothing in two steps."""
    data = write_tiny_set(tmp_path / "data")
    config = replace(tiny_config(data, tmp_path / "run"), steps=2, task=task)
    pretrain(config)
    capsys.readouterr()
    flags = ["--data", str(data), "--run", str(config.out), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["check-sync", *flags]) in (0, 1, 3)
    numbers = json.loads((tmp_path / "out" / "sync.json").read_text())
    assert numbers["by_run"]["run"] == str(config.out)
    assert sum(numbers["by_run"]["videos_with_offset"].values()) == 24
    assert set(numbers["by_run"]["mean_score"]) == set(numbers["correlation"])
    assert numbers["verdict"] != "shifted"
    printed = capsys.readouterr().out
    assert "by loudness" in printed
    assert "by the run" in printed
    assert main(["check-sync", *flags[:2], "--run", str(tmp_path / "none")]) == 2
