"""Videos whose sound lies in a file beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from make_videos import click_seconds, flash_frame, write_video

from avppc.cli import main
from avppc.clip import CLIP_SAMPLES, VIDEO_FPS
from avppc.data.on_the_fly.dali import dali_problem
from avppc.data.packed.dataset import PackedDataset
from avppc.data.video.decode import decode_clip, decode_clips
from avppc.data.video.inspect import inspect_video
from avppc.data.video.picked import read_sound_and_frames
from avppc.data.video.source import DecodeError

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}
MOMENTS = (0.6, 6.0)
NOTE = "sound from another file: "


def write_pair(folder: Path, sound: str = "a.wav", codec: str = "pcm_s16le", video: str = "a.mp4", **options) -> Path:
    """A silent video of 8 s and its sound."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / sound, frames=200, video_codec=None, audio_codec=codec, rate=48_000, clicks=MOMENTS)
    return write_video(folder / video, frames=200, audio_codec=None, flashes=MOMENTS, **SMALL | options)


@pytest.mark.parametrize(
    ("sound", "codec"),
    [("a.wav", "pcm_s16le"), ("a.WAV", "pcm_s16le"), ("a.m4a", "aac"), ("a.flac", "flac"), ("a.mp3", "libmp3lame"),
     ("a.opus", "libopus"), ("a.mka", "aac")],
)  # fmt: skip
def test_picture_and_sound_come_together(tmp_path, sound, codec):
    video = write_pair(tmp_path, sound, codec, options={"preset": "ultrafast", "bf": "2"})
    for start in (0, 140):  # 140: after a jump
        clip = decode_clip(video, start_frame=start)
        seconds = MOMENTS[start > 0] - start / VIDEO_FPS
        assert flash_frame(clip.video.numpy()) == round(seconds * VIDEO_FPS)
        assert click_seconds(clip.audio.numpy()) == pytest.approx(seconds, abs=0.003)
        assert [note for note in clip.notes if note.startswith(NOTE)] == [f"{NOTE}{sound}, both begin together"]
    assert len(list(decode_clips(video))) == 6


def test_both_begin_together_whatever_the_clock_of_the_video_says(tmp_path):
    """As of a recording cut out of a stream: the picture's first time stamp is 1.4 s."""
    clip = decode_clip(write_pair(tmp_path, video="a.ts"))
    assert flash_frame(clip.video.numpy()) == 15
    assert click_seconds(clip.audio.numpy()) == pytest.approx(0.6, abs=0.003)


def test_own_sound_goes_first(tmp_path):
    write_pair(tmp_path)
    video = write_video(tmp_path / "a.mp4", clicks=(0.3,), **SMALL)
    clip = decode_clip(video)
    assert click_seconds(clip.audio.numpy()) == pytest.approx(0.3, abs=0.003)
    assert clip.notes == ()


def test_sound_that_ends_early_costs_the_clips_without_it(tmp_path):
    video = write_pair(tmp_path)
    write_video(tmp_path / "a.wav", frames=50, video_codec=None, audio_codec="pcm_s16le")
    refused = {}
    clips = list(decode_clips(video, on_refused=lambda start, reason: refused.update({start: reason})))
    assert [clip.start_frame for clip in clips] == [0, 29]
    assert list(refused) == [58, 87, 116, 145]
    assert refused[58].startswith("sound missing")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text" * 100, "a.wav is damaged or no sound"),
        (b"", "a.wav is damaged or no sound"),
        (None, "is truncated: 1000 bytes"),
    ],
    ids=["text", "empty", "cut"],
)
def test_bad_sound_is_named(tmp_path, content, problem):
    video = write_pair(tmp_path)
    sound = tmp_path / "a.wav"
    sound.write_bytes(sound.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(DecodeError, match=f"a.mp4: no audio stream, and .*{problem}"):
        decode_clip(video)


def test_a_lost_edit_list_of_the_sound_is_noticed(tmp_path):
    """It would shift the sound by what the encoder has put before it."""
    video = write_pair(tmp_path, "a.m4a", "aac")
    sound = tmp_path / "a.m4a"
    content = sound.read_bytes()
    assert content.count(b"elst") == 1
    sound.write_bytes(content.replace(b"elst", b"emst"))
    with pytest.raises(DecodeError, match=r"a\.mp4: no audio stream, and a\.m4a is of no use: "):
        decode_clip(video)


def test_links_and_folders_are_no_sound(tmp_path):
    video = write_pair(tmp_path / "data")
    (tmp_path / "data/a.wav").rename(tmp_path / "secret.wav")
    (tmp_path / "data/a.wav").symlink_to(tmp_path / "secret.wav")
    (tmp_path / "data/a.flac").mkdir()
    with pytest.raises(DecodeError, match=r"no audio stream$"):
        decode_clip(video)


def test_dali_leaves_such_videos_to_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr("avppc.data.on_the_fly.dali.load_dali", lambda: None)
    facts = inspect_video(write_pair(tmp_path))
    assert facts.streams == {"video": 1, "audio": 1}
    assert dali_problem(facts, torch.device("cpu")) == "its sound lies in a file of its own"


def test_it_is_found_where_another_decoder_takes_the_pictures(tmp_path):
    parts = read_sound_and_frames(write_pair(tmp_path), 0, 29)
    assert click_seconds(parts.audio) == pytest.approx(0.6, abs=0.003)
    assert parts.notes == (f"{NOTE}a.wav, both begin together",)


class TestCommands:
    def run(self, command: str, data: Path, *flags: str) -> int:
        return main([command, "--data", str(data), "--workers", "1", *flags])

    def prepare(self, data: Path, *, listed: str = "") -> dict[str, str]:
        """Prepares and returns what was refused, and why."""
        out = data.parent / "out"
        flags = ["--paths", listed] if listed else []
        self.run("prepare", data, "--out", str(out), *flags)
        lines = (out / "refused.jsonl").read_text().splitlines()
        return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}

    def entry(self, data: Path) -> dict:
        return json.loads((data / "manifest.jsonl").read_text())

    def test_it_is_checksummed_as_the_video_is(self, tmp_path):
        """index -> a bit of the sound flips -> prepare refuses the video and names the file."""
        data = tmp_path / "data"
        write_pair(data / "b")
        assert self.run("index", data) == 0
        entry = self.entry(data)
        assert entry["sound"] == "a.wav"
        assert len(entry["sound_sha256"]) == 64
        assert any(note.startswith(NOTE) for note in entry["notes"])
        assert self.prepare(data) == {}
        sound = data / "b/a.wav"
        status, content = sound.stat(), bytearray(sound.read_bytes())
        content[5000] ^= 1
        sound.write_bytes(content)
        os.utime(sound, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert self.prepare(data)["b/a.mp4"].startswith("changed since it was listed (b/a.wav): its SHA-256 is")
        assert self.run("index", data) == 0
        assert self.prepare(data) == {}

    @pytest.mark.parametrize("listed", [False, True], ids=["tree", "list"])
    def test_sound_that_comes_later_is_noticed(self, tmp_path, capsys, listed):
        data, names = tmp_path / "data", tmp_path / "list.txt"
        names.write_text("a.mp4\n")
        write_pair(data)
        (data / "a.wav").rename(tmp_path / "a.wav")
        assert self.run("index", data) == 3
        options = {"listed": str(names)} if listed else {}
        assert self.prepare(data, **options)["a.mp4"] == "left out: `avppc index` has found: no audio stream"
        (tmp_path / "a.wav").rename(data / "a.wav")
        assert self.prepare(data, **options) == {}
        with PackedDataset(tmp_path / "out") as dataset:
            assert len(dataset) == 6
            clip = dataset.batch(torch.tensor([0]))
            assert click_seconds(clip.audio[0].numpy()) == pytest.approx(0.6, abs=0.003)
            assert clip.audio.shape == (1, CLIP_SAMPLES)
        assert self.run("index", data) == 0
        assert self.entry(data)["problems"] == []
        capsys.readouterr()
        assert self.run("index", data) == 0
        assert "; 0 read" in capsys.readouterr().out

    def test_sound_that_changes_is_read_anew(self, tmp_path):
        data = tmp_path / "data"
        write_pair(data)
        self.prepare(data)
        with PackedDataset(tmp_path / "out") as dataset:
            before = dataset.batch(torch.arange(6)).audio.clone()
        write_video(data / "a.wav", frames=200, video_codec=None, audio_codec="pcm_s16le", clicks=(0.3,))
        self.prepare(data)
        with PackedDataset(tmp_path / "out") as dataset:
            after = dataset.batch(torch.arange(6)).audio
        assert click_seconds(after[0].numpy()) == pytest.approx(0.3, abs=0.003)
        assert not np.array_equal(before, after)
