"""Runs that begin with the weights of another: which, where they fit, and that a resumed run goes on from its own."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hand_edited import read_plain
from safetensors.torch import load_file
from tiny_runs import tiny_config

from avppc import EncoderConfig, load_encoder
from avppc.cli import main
from avppc.config import ObjectiveConfig, PretrainConfig
from avppc.processes import Stopped
from avppc.tasks.base import ProxyTask
from avppc.train import loop, run_folder
from avppc.train.loop import pretrain
from avppc.train.run_folder import read_run_config


@pytest.fixture(scope="module")
def first(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others begin from."""
    out = tmp_path_factory.mktemp("first") / "run"
    pretrain(tiny_config(tiny_set, out, steps=4))
    return out


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


class AtStart(Exception):
    """The run is about to take its first step."""


def start(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights with which a run would begin."""
    seen: dict[str, torch.Tensor] = {}

    def stop(config: PretrainConfig, task: ProxyTask, *rest: object) -> None:
        seen.update({name: value.clone() for name, value in task.state_dict().items()})
        raise AtStart

    with monkeypatch.context() as patch:
        patch.setattr(loop, "TrainingStep", stop)
        with pytest.raises(AtStart):
            pretrain(config)
    return seen


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name])}


class TestWhatIsTaken:
    @pytest.mark.parametrize("parts", ["encoder", "all"])
    def test_the_encoder_or_all(
        self, parts: str, first: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes = {"init_from": str(first), "init_parts": parts}
        begun = start(tiny_config(tiny_set, tmp_path / "run", seed=5, **changes), monkeypatch)
        other = differing(begun, weights_of(first, 4))
        if parts == "all":
            assert not other
        else:
            assert not any(name.startswith("video_encoder.") for name in other)
            random = start(tiny_config(tiny_set, tmp_path / "random", seed=5), monkeypatch)
            assert all(name.startswith("video_encoder.") for name in differing(begun, random))
            assert "audio_encoder.project.0.weight" in other

    def test_from_an_encoder_file_and_a_stopped_run(
        self, first: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped = shutil.copytree(first, tmp_path / "stopped")
        (stopped / "encoder.safetensors").unlink()
        encoder = load_encoder(first).state_dict()
        for number, source in enumerate((stopped, first / "encoder.safetensors")):
            config = tiny_config(tiny_set, tmp_path / f"{number}", init_from=str(source))
            begun = start(config, monkeypatch)
            assert all(torch.equal(begun[f"video_encoder.{name}"], value) for name, value in encoder.items())

    def test_from_a_pretrained_encoder_by_its_name(
        self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tiny_config(tiny_set, tmp_path / "run", init_from="talking-mouths", encoder=EncoderConfig())
        begun = start(config, monkeypatch)
        expected = load_encoder("talking-mouths").state_dict()
        assert all(torch.equal(begun[f"video_encoder.{name}"], value) for name, value in expected.items())
        assert read_run_config(tmp_path / "run").init_from == "talking-mouths"

    def test_it_is_kept_with_the_run(self, first: Path, tiny_set: Path, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(first.parent)
            pretrain(tiny_config(tiny_set, tmp_path / "run", steps=1, init_from="run"))
        assert read_run_config(tmp_path / "run").init_from == str(first)
        record = read_plain(tmp_path / "run" / "init.json")
        assert record["from"] == str(first / "encoder.safetensors")
        assert (record["parts"], record["tensors"]) == ("encoder", len(load_encoder(first).state_dict()))
        assert "begins with the weights of run (encoder)" in (tmp_path / "run" / "train.log").read_text()

    def test_other_pictures_for_the_same_weights_are_told(
        self,
        first: Path,
        tiny_set: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        encoder = EncoderConfig(width=4, features=16, channels="motion")
        start(tiny_config(tiny_set, tmp_path / "run", init_from=str(first), encoder=encoder), monkeypatch)
        assert "encoder.channels is 'local-motion' there, 'motion' here" in caplog.text


class TestUnfinished:
    def test_the_encoder_of_a_checkpoint_is_loaded(self, first: Path, tmp_path: Path) -> None:
        checkpoint = first / "checkpoints" / "step_00000004"
        expected = load_encoder(first).state_dict()
        found = load_encoder(checkpoint)
        assert not found.training
        assert not differing(dict(found.state_dict()), dict(expected))
        run = shutil.copytree(first, tmp_path / "run")
        (run / "encoder.safetensors").unlink()
        text = r"the run in .*run is not finished; its newest encoder is in .*run/checkpoints/step_00000004"
        with pytest.raises(FileNotFoundError, match=text):
            load_encoder(run)
        file = run / "checkpoints" / "step_00000004" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged: its checksum is not the one in progress"):
            load_encoder(file.parent)


class TestRefusals:
    def test_shapes_are_named(self, first: Path, tiny_set: Path, tmp_path: Path) -> None:
        config = tiny_config(tiny_set, tmp_path / "run", init_from=str(first), encoder=EncoderConfig(width=4))
        text = (
            r"init_from: video_encoder.project.0.weight is float32 \[16, \d+\] in .*run/encoder.safetensors, "
            r"this task needs float32 \[64, \d+\] \(settings: encoder.features is 16 there, 64 here\)"
        )
        with pytest.raises(ValueError, match=text):
            pretrain(config)
        assert not config.out.exists()  # so that the command, put right, is not that of another run

    def test_all_needs_a_run_of_the_same_task(self, first: Path, tiny_set: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="needs the directory of a run with a checkpoint, got init_from=talking"):
            pretrain(tiny_config(tiny_set, tmp_path / "run", init_from="talking-mouths", init_parts="all"))
        for changes, text in (
            ({"objective": ObjectiveConfig(dim=24)}, r"objective.dim is 16 there, 24 here"),
            ({"task": "time-arrow"}, r"is none in .*, this task needs float32 .*task is 'av-permutative' there"),
        ):
            config = tiny_config(tiny_set, tmp_path / "run", init_from=str(first), init_parts="all", **changes)
            with pytest.raises(ValueError, match=text):
                pretrain(config)

    def test_nothing_there(self, tmp_path: Path, tiny_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ["pretrain", str(tiny_set), "--out", str(tmp_path / "run"), "--batch-size", "8", "--device", "cpu"]
        assert main([*flags, "--init-from", str(tmp_path / "nothing")]) == 2
        assert "there is no encoder at" in capsys.readouterr().err


class TestResume:
    def test_a_resumed_run_goes_on_from_its_own_weights(
        self, first: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = shutil.copytree(first, tmp_path / "source")
        whole = tiny_config(tiny_set, tmp_path / "whole", steps=6, init_from=str(source))
        pretrain(whole)
        stopped = tiny_config(tiny_set, tmp_path / "stopped", steps=6, init_from=str(source))
        take, taken = loop.TrainingStep.take, 0

        def interrupted(self: loop.TrainingStep, *args: object) -> object:
            nonlocal taken
            taken += 1
            if taken == 3:
                signal.raise_signal(signal.SIGINT)
            return take(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(loop.TrainingStep, "take", interrupted)
            with pytest.raises(Stopped):
                pretrain(stopped)
        shutil.rmtree(source)  # it is not needed any more
        monkeypatch.setattr(run_folder, "_weights_at", lambda *args: pytest.fail("it began anew"))
        pretrain(stopped)
        assert not differing(weights_of(stopped.out, 6), weights_of(whole.out, 6))

    def test_another_beginning_is_refused(
        self, first: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = shutil.copytree(first, tmp_path / "source")
        config = tiny_config(tiny_set, tmp_path / "run", steps=2, init_from=str(source))
        start(config, monkeypatch)
        with pytest.raises(ValueError, match=r"init_from is .*source' there, '' here"):
            pretrain(tiny_config(tiny_set, config.out, steps=2))
        pretrain(tiny_config(tiny_set, tmp_path / "other", steps=1, seed=3))
        shutil.copy(tmp_path / "other" / "encoder.safetensors", source)
        with pytest.raises(ValueError, match="began from other weights than those that are at"):
            pretrain(config)
        shutil.copy(first / "encoder.safetensors", source)
        pretrain(config)


class TestHowNotWhat:
    def test_a_run_goes_on_in_another_way(
        self, first: Path, tiny_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = shutil.copytree(first, tmp_path / "run")
        other = {"log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 5, "verify_data": False}
        with caplog.at_level(logging.WARNING):
            pretrain(tiny_config(tiny_set, run, steps=4, **other))
            assert caplog.messages == []
            pretrain(tiny_config(tiny_set, run, steps=4, threads=2))
        assert caplog.messages == [f"{run} goes on with threads 2 instead of 1: the same but for rounding"]
        assert read_run_config(run).threads == 2

    def test_more_steps_are_another_run(self, first: Path, tiny_set: Path) -> None:
        text = rf"steps is 4 there, 9 here.*to train longer, .*--init-from {first} --init-parts all"
        with pytest.raises(ValueError, match=text):
            pretrain(tiny_config(tiny_set, first, steps=9))
