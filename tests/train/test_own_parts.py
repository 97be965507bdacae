"""Pretraining with an encoder, a task and clips of one's own, as docs/library.md has them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from tiny_runs import make_clip, tiny_config
from torch import nn

import avppc
from avppc.cli import main
from avppc.data.source import OwnClips
from avppc.models.encoders import OwnEncoder
from avppc.train.run_folder import clips_of


class Clips:
    """24 clips, as tuples of arrays."""

    def __init__(self, count: int = 24, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        clip = make_clip(index % 3, index, self.seed)
        return clip["video"], clip["audio"]


class Frames(nn.Module):
    """Features of frames by themselves."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.frames = nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.project = nn.Linear(4 * 49, features)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        frames = self.frames(video.flatten(0, 1).unsqueeze(1))
        return self.project(frames).unflatten(0, video.shape[:2])


class Local(Frames):
    reach = 0


def make_encoder(kind: type[Frames] = Frames) -> Frames:
    torch.manual_seed(3)
    return kind()


def model_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("kind", [Frames, Local])
def test_an_own_encoder_learns_in_every_task_and_its_file_is_loaded(
    kind: type[Frames], tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("av-permutative", "visual-permutative", "time-arrow", "synchronization", "correspondence"):
        encoder, run = make_encoder(kind), tmp_path / task
        before = encoder.project.weight.detach().clone()
        file = avppc.pretrain(tiny_config(tiny_set, run, steps=2, task=task), encoder=encoder)
        assert not torch.equal(encoder.project.weight, before)
        again = kind()
        load_model(again, file)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in encoder.state_dict().items())
    with pytest.raises(ValueError, match=r"has the weights of test_own_parts\.(Frames|Local), an encoder of your own"):
        avppc.load_encoder(file)
    assert main(["evaluate", str(run)]) == 2
    assert "an encoder of your own" in capsys.readouterr().err


def test_own_clips_are_trained_on_as_packed_ones_are(tiny_set: Path, tmp_path: Path) -> None:
    avppc.pretrain(tiny_config(tiny_set, tmp_path / "packed", steps=3))
    avppc.pretrain(tiny_config(Path("mine"), tmp_path / "own", steps=3), dataset=Clips())
    packed, own = model_of(tmp_path / "packed", 3), model_of(tmp_path / "own", 3)
    assert all(torch.equal(value, own[name]) for name, value in packed.items())


def test_a_run_of_own_parts_goes_on_bit_for_bit(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(Clips):
        asked = 0

        def __getitem__(self, index: int) -> Any:
            Stopping.asked += 1
            if Stopping.asked > 60:
                raise Stop
            return super().__getitem__(index)

    whole, stopped = (tiny_config(Path("mine"), tmp_path / name, steps=8) for name in ("whole", "stopped"))
    avppc.pretrain(whole, encoder=make_encoder(), dataset=Clips())
    with pytest.raises(Stop):
        avppc.pretrain(stopped, encoder=make_encoder(), dataset=Stopping())
    assert (stopped.out / "checkpoints").is_dir()
    avppc.pretrain(stopped, encoder=Frames(), dataset=Clips())
    one, other = model_of(whole.out, 8), model_of(stopped.out, 8)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(ValueError, match="holds a run on other clips"):
        avppc.pretrain(stopped, encoder=make_encoder(), dataset=Clips(seed=1))


class Mean(avppc.ProxyTask):
    """Past and future have the same brightness."""

    def __init__(self, config: avppc.TaskConfig) -> None:
        super().__init__(config, with_audio=False)

    def forward(self, batch: avppc.ClipBatch, generator: torch.Generator) -> avppc.TaskOutput:
        past, future = self.embed_video(self.cut(batch, generator).video, generator).chunk(2)
        loss = (past - future).square().mean()
        return avppc.TaskOutput(loss, {"loss": loss.detach()})


def test_an_own_task(tiny_set: Path, tmp_path: Path) -> None:
    file = avppc.pretrain(tiny_config(tiny_set, tmp_path / "run", steps=2), task=Mean)
    assert avppc.load_encoder(file).config.features == 16
    with pytest.raises(TypeError, match="task must make a ProxyTask, got dict"):
        avppc.pretrain(tiny_config(tiny_set, tmp_path / "other"), task=lambda config: {})  # type: ignore[arg-type, return-value]


class TestRefusals:
    def test_an_encoder_of_other_features(self, tiny_set: Path, tmp_path: Path) -> None:
        text = r"encoder must give \[N, T, D\] = \[\d+, \d+, 16\] \(D: encoder.features .*\) for video .*, got .*, 8\]"
        with pytest.raises(ValueError, match=text):
            avppc.pretrain(tiny_config(tiny_set, tmp_path / "run"), encoder=Frames(8))
        with pytest.raises(TypeError, match=r"encoder must be a torch.nn.Module, got function"):
            OwnEncoder(make_encoder, 16)  # type: ignore[arg-type]
        module = Frames()
        module.reach = -1  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"encoder.reach must be from 0"):
            OwnEncoder(module, 16)

    @pytest.mark.parametrize(
        ("item", "text"),
        [
            (3, r"dataset\[0\] must be a Clip or \(video, audio\), got int"),
            ((torch.zeros(29, 96, 96), torch.zeros(29 * 640, dtype=torch.int16)), r"dataset\[0\]: video must .*uint8"),
            ((torch.zeros(29, 96, 96, dtype=torch.uint8), torch.zeros(5, dtype=torch.int16)), r"dataset\[0\]: audio"),
        ],
    )
    def test_items_that_are_no_clips(self, item: Any, text: str) -> None:
        with pytest.raises((TypeError, ValueError), match=text):
            OwnClips([item])
        with pytest.raises(ValueError, match="dataset must hold at least one clip"):
            OwnClips([])

    def test_speakers_and_checksums_of_the_data_set_count(self, tmp_path: Path) -> None:
        dataset = Clips()
        dataset.speakers, dataset.sha256 = [0, 1] * 12, "version 1"  # type: ignore[attr-defined]
        clips = OwnClips(dataset)
        assert clips.speakers.tolist() == [0, 1] * 12
        first, dataset.sha256 = clips.sha256, "version 2"  # type: ignore[attr-defined]
        assert OwnClips(dataset).sha256 != first
        config = tiny_config(Path("mine"), tmp_path / "run", steps=1, speakers_per_batch=2)
        avppc.pretrain(config, dataset=dataset)
        assert clips_of(config.out) == OwnClips(dataset).sha256
        dataset.speakers = [0]  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"dataset.speakers must have 24 entries like the data set, got 1"):
            OwnClips(dataset)


def test_paths_may_be_texts() -> None:
    config = avppc.PretrainConfig("packed", "runs/x")  # type: ignore[arg-type]
    assert (config.data, config.out) == (Path("packed"), Path("runs/x"))
    with pytest.raises(TypeError, match=r"data must be a pathlib.Path, got int 3"):
        avppc.PretrainConfig(3, "runs/x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data must be a path without a zero byte"):
        avppc.PretrainConfig("a\0", "runs/x")  # type: ignore[arg-type]


def test_a_file_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "video.mp4").write_bytes(b"")
    flags = ["embed", str(tmp_path / "video.mp4"), "--encoder", "talking-mouths", "--out", str(tmp_path / "x.npz")]
    assert main(flags) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "data must be a folder of packed shards or of videos, and" in error
    assert "one video's clip is avppc.load_clip(path) in Python" in error


def test_names_on_demand_are_there_and_shown() -> None:
    assert set(avppc.ON_DEMAND) <= set(dir(avppc))
    assert not set(avppc.ON_DEMAND) & set(avppc.__all__)  # `from avppc import *` needs torch alone
    for name in avppc.ON_DEMAND:
        assert inspect.isclass(getattr(avppc, name)) or inspect.isfunction(getattr(avppc, name))
    with pytest.raises(AttributeError, match="module 'avppc' has no attribute 'nothing'"):
        avppc.nothing  # noqa: B018
