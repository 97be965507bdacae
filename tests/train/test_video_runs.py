"""Runs on videos that were never packed: the same steps, bit for bit, as on packed shards of the same videos."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_videos import write_lrw_tree, write_video
from no_worker import PoolHere, in_this_process
from tiny_runs import tiny_config

from avppc.cli import main
from avppc.config import EmbedConfig, EvaluateConfig, PretrainConfig, VideoConfig
from avppc.data.on_the_fly import listing, videos
from avppc.data.prepare import prepare
from avppc.data.video.source import DecodeError
from avppc.evaluate.lipreading.evaluate import evaluate
from avppc.export import embed as embed_module
from avppc.export.embed import embed
from avppc.models.encoder_file import ENCODER_FILE
from avppc.settings import read_checked_json
from avppc.train.checkpoint import CheckpointSaver, read_tensors
from avppc.train.config import BenchTrainConfig
from avppc.train.log import read_metrics
from avppc.train.loop import pretrain
from avppc.train.run_folder import VIDEOS_FILE, source_of

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}
SETTINGS = {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Lists, packs and decodes in this process; lists go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVPPC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(prepare, "handle_units", in_this_process)
        patch.setattr(listing, "handle_units", in_this_process)
        patch.setattr(videos, "WorkerPool", PoolHere)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "videos"
    write_lrw_tree(folder, ["ABOUT", "HOUSE"], {"train": 4, "val": 1, "test": 2}, **SMALL)
    write_video(folder / "ABOUT" / "train" / "short.mp4", frames=20, **SMALL)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """A run on the videos, and one on their packed clips."""
    packed = data.parent / "packed"
    prepare.execute(prepare.PrepareConfig(data, packed))
    out = {name: data.parent / f"run-{name}" for name in ("pyav", "packed")}
    pretrain(tiny_config(data, out["pyav"], loader="pyav", **SETTINGS))
    pretrain(tiny_config(packed, out["packed"], **SETTINGS))
    return out


def curve(run: Path) -> list[dict[str, object]]:
    """The metrics but for those of time."""
    return [
        {name: value for name, value in row.items() if name not in ("clips_per_second", "data_wait")}
        for row in read_metrics(run)
    ]


def test_the_same_curve_and_weights(runs: dict[str, Path]) -> None:
    assert len(curve(runs["pyav"])) == 4
    assert curve(runs["pyav"]) == curve(runs["packed"])
    ours, theirs = (read_tensors(run / ENCODER_FILE) for run in runs.values())
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_run_says_what_it_saw(runs: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (runs["pyav"] / VIDEOS_FILE).read_text().splitlines()]
    assert len(lines) == 8
    assert lines[0]["path"] == "ABOUT/train/ABOUT_00001.mp4"
    (refused,) = map(json.loads, (runs["pyav"] / "refused.jsonl").read_text().splitlines())
    assert refused["path"] == "ABOUT/train/short.mp4"
    assert not (runs["packed"] / VIDEOS_FILE).exists()


def test_a_run_goes_on_with_its_own_videos(
    data: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two steps, it ends as the undisturbed one, though its folder has got another video; not so where
    one of its own has changed."""
    out = tmp_path / "run"
    config = tiny_config(data, out, loader="pyav", **SETTINGS)
    taken = []

    def stop(self, step, tensors, progress, save=CheckpointSaver.save):
        save(self, step, tensors, progress)
        taken.append(step)
        if len(taken) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointSaver, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    new = write_video(data / "HOUSE" / "train" / "new.mp4", seed=99, **SMALL)
    try:
        pretrain(replace(config, workers=3))  # of the call alone
        assert taken == [2, 4]
        assert curve(out) == curve(runs["pyav"])
        ours, theirs = (read_tensors(run / ENCODER_FILE) for run in (out, runs["pyav"]))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    finally:
        new.unlink()
    path = data / "HOUSE" / "train" / "HOUSE_00002.mp4"
    content, status = path.read_bytes(), path.stat()
    write_video(path, seed=98, **SMALL)
    try:
        with pytest.raises(ValueError, match=r"1 of 8 videos of .*: HOUSE/train/HOUSE_00002\.mp4 \(its SHA-256 was"):
            pretrain(config)
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_clips_or_settings_are_another_run(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    out = runs["pyav"]
    for changes in ({"videos": VideoConfig(stride=30)}, {"videos": VideoConfig(crop="centre")}):
        with pytest.raises(ValueError, match="holds a run"):
            pretrain(tiny_config(data, out, loader="pyav", **SETTINGS, **changes))
    with pytest.raises(ValueError, match="holds a run on other clips"):
        pretrain(tiny_config(data.parent / "packed", out, **SETTINGS))
    with pytest.raises(ValueError, match="is a packed data set"):
        pretrain(tiny_config(data.parent / "packed", tmp_path / "out", videos=VideoConfig(stride=3), **SETTINGS))
    with pytest.raises(ValueError, match="out must be a folder apart from data"):
        pretrain(tiny_config(data, data / "run", **SETTINGS))
    assert not (tmp_path / "out").exists()


def test_evaluate_and_embed_read_the_same(
    data: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, vectors = [], []
    for name, run in runs.items():
        config = EvaluateConfig(
            run,
            rows=("frozen", "finetuned"),
            labels_per_word=2,
            draws=1,
            training_draws=1,
            heads=("bins",),
            epochs=2,
            training_epochs=1,
            threads=1,
            workers=1,
            device="cpu",
        )
        rows = evaluate(config, show=False)
        answers.append([(row.row, row.confusion) for row in rows])
        embed(
            EmbedConfig(data if name == "pyav" else data.parent / "packed", run, tmp_path / f"{name}.npz", device="cpu")
        )
        with np.load(tmp_path / f"{name}.npz") as archive:
            vectors.append({key: archive[key] for key in ("embeddings", "ids", "labels", "sources")})
    assert answers[0] == answers[1]
    for key, values in vectors[0].items():
        assert np.array_equal(values, vectors[1][key]), key


def test_videos_of_a_run_on_packed_clips_are_not_guessed_at(data: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="was trained on one, which does not say how its clips were cut"):
        source_of(runs["packed"], data)
    assert source_of(runs["pyav"], None).loader == "pyav"


def test_embed_skips_what_cannot_be_decoded(
    data: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = videos.ClipJob.decode

    def fail(self, task):
        if task.video.path == "HOUSE/test/HOUSE_00001.mp4":
            raise DecodeError("", "it is gone")
        return decode(self, task)

    monkeypatch.setattr(videos.ClipJob, "decode", fail)
    clips, skipped = embed(EmbedConfig(data, runs["pyav"], tmp_path / "out.npz", splits=("test",), device="cpu"))
    assert clips == 3
    assert [(clip.split, clip.source, clip.reason) for clip in skipped] == [
        ("test", "HOUSE/test/HOUSE_00001.mp4", "it is gone")
    ]


def test_embed_cuts_videos_as_those_of_the_run(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    content = read_checked_json(runs["pyav"] / "config.json")
    assert content["loader"] == "pyav"
    assert content["videos"]["crop"] == "auto"
    config = EmbedConfig(data, runs["pyav"], tmp_path / "out.npz")
    assert embed_module._source(config).videos == VideoConfig()
    other = replace(config, videos=VideoConfig(crop="centre"))
    assert embed_module._source(other).videos == VideoConfig(crop="centre")


def test_flags(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen = []
    monkeypatch.setattr("avppc.train.loop.pretrain", seen.append)
    flags = ["--loader", "torchcodec", "--videos.crop", "centre", "--videos.stride", "0", "--workers", "3"]
    assert main(["pretrain", "--data", str(data), "--out", str(tmp_path), *flags]) == 0
    (config,) = seen
    assert isinstance(config, PretrainConfig)
    assert (config.loader, config.workers) == ("torchcodec", 3)
    assert (config.videos.crop, config.videos.stride) == ("centre", 0)
    for make in (
        lambda: EvaluateConfig(tmp_path, loader="dali"),  # it hands out batches for training alone
        lambda: EmbedConfig(data, tmp_path, tmp_path / "a.npz", loader="dali"),
        lambda: PretrainConfig(data, tmp_path, loader="ffmpeg"),
        lambda: BenchTrainConfig(data, loader="ffmpeg"),
    ):
        with pytest.raises(ValueError, match="loader must be one of 'auto', 'packed', "):
            make()
