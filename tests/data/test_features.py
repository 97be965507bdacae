"""`avppc features`: the sound of any file, its features as numbers and as a picture."""

from __future__ import annotations

import dataclasses
import os
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from avppc import LogMelConfig, log_mel
from avppc.cli import main
from avppc.config import FeaturesConfig
from avppc.data.features import read_sound
from avppc.data.video.source import DecodeError


def tone(seconds: float, hz: float, rate_hz: int = 16_000) -> NDArray[np.int16]:
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.rint(16_000 * np.sin(2 * np.pi * hz * time)).astype(np.int16)


def write_wav(path: Path, samples: NDArray[np.int16], rate_hz: int = 16_000) -> Path:
    """samples: [S], or [S, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return path


def write_mp4(path: Path, samples: NDArray[np.int16]) -> Path:
    """AAC at 16 kHz without a picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def test_wav_at_16_khz_comes_as_it_is(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32767, 12_345).astype(np.int16)
    assert np.array_equal(read_sound(write_wav(tmp_path / "a.wav", samples)), samples)


def test_other_rates_are_resampled_and_channels_mixed(tmp_path: Path) -> None:
    stereo = np.stack([tone(1.0, 440, 44_100), tone(1.0, 440, 44_100)], axis=1)
    samples = read_sound(write_wav(tmp_path / "a.wav", stereo, 44_100))
    assert abs(len(samples) - 16_000) <= 1
    inner = slice(500, 15_500)
    assert np.abs(samples[:16_000].astype(int) - tone(1.0, 440)[: len(samples)])[inner].max() < 200


def test_mp4_is_decoded_in_time(tmp_path: Path) -> None:
    """A click at 0.5 s is at sample 8000, whatever AAC puts before it."""
    samples = np.zeros(16_000, np.int16)
    samples[8000:8010] = 20_000
    decoded = read_sound(write_mp4(tmp_path / "a.mp4", samples))
    assert abs(int(np.abs(decoded.astype(int)).argmax()) - 8004) <= 10


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "neither sound nor video"),
        (b"RIFF....WAVEfmt", "neither sound nor video"),
        (None, "cannot be read"),
    ],
    ids=["empty", "broken", "missing"],
)
def test_files_that_are_no_sound_are_refused(content: bytes | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DecodeError, match=f"a.wav: .*{text}"):
        read_sound(path)


def test_a_wave_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.arange(1600, dtype=np.int16))
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(DecodeError, match=r"a\.wav: truncated: 1000 bytes are missing"):
        read_sound(path)
    path.write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:])  # as a program that writes into a pipe has it
    assert len(read_sound(path)) == 1600


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for packet in [*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(DecodeError, match=r"a\.mp4: has no sound"):
        read_sound(tmp_path / "a.mp4")


@pytest.mark.parametrize(("preset", "mfcc"), [("whisper", 0), ("kaldi", 13)])
def test_command_writes_the_features_and_a_picture(
    preset: str, mfcc: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tone(2.0, 1000)
    source = write_wav(tmp_path / "[b]tone.wav", samples)
    out, plot = tmp_path / "new" / "a.npy", tmp_path / "new" / "a.png"
    flags = ["--preset", preset, "--mfcc", str(mfcc), "--out", str(out), "--plot", str(plot)]
    assert main(["features", str(source), *flags]) == 0
    config = dataclasses.replace(LogMelConfig.preset(preset), mfcc=mfcc)
    expected = log_mel(torch.from_numpy(samples), config).numpy()
    assert np.array_equal(np.load(out, allow_pickle=False), expected)
    text = capsys.readouterr().out
    assert f"2.00 s -> {len(expected)} frames of {13 if mfcc else 80}" in text
    assert "[b]tone.wav" in text
    picture = np.asarray(Image.open(plot).convert("L"), dtype=int)
    assert picture.shape[0] > 500
    assert len(np.unique(picture)) > 50


def test_command_takes_another_window_transform_and_framing(tmp_path: Path) -> None:
    samples = tone(1.0, 1000)
    source, out = write_wav(tmp_path / "a.wav", samples), tmp_path / "a.npy"
    options = {
        "--preset": "kaldi", "--window": "hamming_symmetric", "--window-samples": "320", "--fft-size": "322",
        "--hop-samples": "80", "--framing": "exact", "--padding": "circular",
    }  # fmt: skip
    flags = [word for option in options.items() for word in option]
    assert main(["features", str(source), *flags, "--out", str(out)]) == 0
    config = dataclasses.replace(
        LogMelConfig.preset("kaldi"), window="hamming_symmetric", window_samples=320, fft_size=322, hop_samples=80,
        framing="exact", padding="circular",
    )  # fmt: skip
    expected = log_mel(torch.from_numpy(samples), config).numpy()
    assert np.array_equal(np.load(out, allow_pickle=False), expected)


@pytest.mark.parametrize("flag", ["--out", "--plot"])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_wav(tmp_path / "a.wav", tone(1.0, 440))
    target = tmp_path / "out" / ("a.npy" if flag == "--out" else "a.png")
    target.parent.mkdir()
    target.write_bytes(b"before")
    fsync = os.fsync

    def disk_is_full(handle: int) -> None:
        fsync(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    assert main(["features", str(source), flag, str(target)]) == 2
    assert f"No space left on device: '{target}'" in "".join(capsys.readouterr().err.split("\n"))
    assert target.read_bytes() == b"before"
    assert list(target.parent.iterdir()) == [target]


def test_command_refuses_what_is_too_short_or_badly_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_wav(tmp_path / "a.wav", tone(0.005, 440))
    assert main(["features", str(source), "--preset", "kaldi"]) == 2
    assert "too short: 80 samples at 16 kHz make no frame" in capsys.readouterr().err
    for changes, text in (
        ({"preset": "sphinx"}, "preset must be one of 'torchaudio'"),
        ({"mfcc": 81}, "mfcc must be from 0 to 80, got 81"),
        ({"fft_size": 300}, "window_samples must be from 2 to 300, got 400"),
        ({"window": "hanning"}, "window must be one of 'hann'"),
        ({"plot": Path("a.jpg")}, "plot must end in .png or .svg or .pdf, got a.jpg"),
        ({"out": Path("a.npz")}, "out must end in .npy, got a.npz"),
    ):
        with pytest.raises(ValueError, match=text):
            FeaturesConfig(source, **changes)
