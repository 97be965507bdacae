"""`avppc features`: what log_mel makes of a file's sound, as numbers and as a picture.

PyAV decodes the sound to 16 kHz, mono, int16, whatever the file holds.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from avppc.clip import SAMPLE_RATE_HZ
from avppc.data.config import FeaturesConfig
from avppc.data.sound_file import SOUND_FORMATS, missing_of_wave
from avppc.data.video.clock import AudioTimeline
from avppc.data.video.pictures import decode_packet
from avppc.data.video.reader import choose_audio
from avppc.data.video.source import DecodeError, damage_as_decode_error, open_media
from avppc.files import write_atomically
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.op import log_mel
from avppc.ops.log_mel.reference import band_centers_hz
from avppc.printing import Console
from avppc.processes import limited_memory

_UNITS = {"none": "power", "ln": "ln power", "log10": "log10 power", "db": "dB"}
_TICKS_HZ = (125, 250, 500, 1000, 2000, 4000, 7500)


def execute(config: FeaturesConfig) -> int:
    """Prints shape and range of the features; writes them and their picture to the files that are asked for."""
    with limited_memory():
        samples = read_sound(config.source)  # [S]
    settings = config.settings
    if settings.num_frames(len(samples)) == 0:
        raise DecodeError(str(config.source), f"too short: {len(samples)} samples at 16 kHz make no frame")
    features = log_mel(torch.from_numpy(samples), settings).numpy()  # [F, features]
    console = Console(soft_wrap=True)
    console.print(
        f"{config.source}: {len(samples) / SAMPLE_RATE_HZ:.2f} s -> {len(features):,} frames of {features.shape[1]} "
        f"{'coefficients' if config.mfcc else 'bands'} ({config.preset}), "
        f"{features.min():.3f} to {features.max():.3f}, mean {features.mean():.3f}",
    )
    if config.out is not None:
        content = io.BytesIO()  # numpy does not say why a file could not be written
        np.save(content, features, allow_pickle=False)
        write_atomically(config.out, content.getvalue())
        console.print(f"wrote {config.out}")
    if config.plot is not None:
        draw(config.plot, config.source.name, samples, features, settings, config.preset)
        console.print(f"wrote {config.plot}")
    return 0


def draw(
    path: Path,
    name: str,
    samples: NDArray[np.int16],  # [S]
    features: NDArray[np.float32],  # [F, features]
    config: LogMelConfig,
    preset: str,
) -> None:
    """Writes a picture: the waveform above the features, on one time axis."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        grid = figure.subplots(2, 2, sharex="col", height_ratios=(1, 3.2), width_ratios=(60, 1))
        (wave, corner), (image, scale) = grid
        seconds = len(samples) / SAMPLE_RATE_HZ
        low, high = _envelope(samples / 32768.0)
        wave.fill_between(np.linspace(0, seconds, len(low)), low, high, color="#2560a8", linewidth=0.4, step="mid")
        wave.set(ylim=(-1.05, 1.05), ylabel="waveform", title=f"{name}  ({preset})")
        wave.tick_params(labelbottom=False)
        corner.set_axis_off()
        # Frame t stands for the hop around its window's middle.
        hop = config.hop_samples / SAMPLE_RATE_HZ
        middle = (config.first_sample + config.window_samples / 2) / SAMPLE_RATE_HZ
        extent = (middle - hop / 2, middle + (len(features) - 0.5) * hop, -0.5, features.shape[1] - 0.5)
        shown = image.imshow(
            features.T, origin="lower", aspect="auto", extent=extent, cmap="magma", interpolation="nearest"
        )
        image.set(xlabel="seconds", ylabel="coefficient" if config.mfcc else "Hz", xlim=(0, seconds))
        if not config.mfcc:
            centers = band_centers_hz(config).numpy()
            ticks = [hz for hz in _TICKS_HZ if centers[0] <= hz <= centers[-1]]
            image.set_yticks(np.interp(ticks, centers, np.arange(len(centers))), [f"{hz:,}" for hz in ticks])
        scaled = (config.output_scale, config.output_shift) != (1.0, 0.0)
        unit = "MFCC" if config.mfcc else _UNITS[config.log] + (", scaled" if scaled else "")
        figure.colorbar(shown, cax=scale, label=unit)
        content = io.BytesIO()
        figure.savefig(content, dpi=160, format=path.suffix.removeprefix("."))
        write_atomically(path, content.getvalue())


def _envelope(wave: NDArray[np.float64], columns: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest value of each of at most so many equal parts."""
    starts = np.unique(np.linspace(0, len(wave), min(columns, len(wave)), endpoint=False).astype(int))
    return np.minimum.reduceat(wave, starts), np.maximum.reduceat(wave, starts)


def read_sound(path: str | os.PathLike[str]) -> NDArray[np.int16]:  # [S]
    """The samples of the file's default audio stream from its first one on, at 16 kHz; channels are mixed.

    Samples stand where their time stamps say; a hole between them is silence.

    Raises:
        DecodeError: not a sound or video file, damaged, or without sound.
    """
    with damage_as_decode_error(
        path, f"damaged, or neither sound nor video of a known format ({SOUND_FORMATS})"
    ) as name:
        with open(path, "rb") as file:  # the system's own word on what is missing or not allowed
            missing = missing_of_wave(file)
        samples = _decode(name)
        if missing > 0:
            raise DecodeError(name, f"truncated: {missing} bytes are missing")
        return samples


def _decode(name: str) -> NDArray[np.int16]:
    timeline = None
    with open_media(name, SOUND_FORMATS) as container:
        stream = choose_audio(container)
        if stream is None:
            raise DecodeError(name, "has no sound")
        for packet in container.demux(stream):
            for frame in decode_packet(packet):
                assert isinstance(frame, av.AudioFrame)
                if timeline is None:
                    if frame.pts is None or frame.time_base is None:
                        raise DecodeError(name, "the audio has frames without time stamps")
                    timeline = AudioTimeline(frame.pts * frame.time_base)
                timeline.push(frame)
    if timeline is None:
        raise DecodeError(name, "its audio stream is empty")
    timeline.finish()
    return timeline.take(0, timeline.end)[0]
