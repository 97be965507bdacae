"""Small videos made on the fly: a moving pattern, flashes, a tone and clicks at known times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FLASH_LUMA = 235


def moving_pattern(frame: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width] luma of frame number `frame`: blocks that move right by 2 pixels a frame."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(60, 120, (height // 8 + 1, width // 8 + 1), dtype=np.uint8)
    return np.roll(blocks.repeat(8, 0).repeat(8, 1)[:height, :width], 2 * frame, axis=1)


def beep_with_clicks(samples: int, rate: int, clicks: Sequence[float]) -> np.ndarray:
    """[samples] int16: a soft 300 Hz tone, and half a millisecond of full scale from each click time on."""
    wave = 0.02 * np.sin(2 * np.pi * 300 * np.arange(samples) / rate)
    for seconds in clicks:
        start = round(seconds * rate)
        wave[start : start + rate // 2000] = 0.9
    return (wave * 32767).astype(np.int16)


def write_video(
    path: str | Path,
    *,
    frames: int = 29,
    fps: int | Fraction = 25,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    flashes: Sequence[float] = (),
    clicks: Sequence[float] = (),
    audio_start: float = 0.0,
    audio_seconds: float | None = None,
    rate: int = 16_000,
    layout: str = "mono",
    bit_rate: int | None = None,
    video_codec: str | None = "libx264",
    audio_codec: str | None = "aac",
    pixel_format: str = "yuv420p",
    skipped: Sequence[int] = (),
    pattern: Callable[..., np.ndarray] = moving_pattern,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    audio_options: dict[str, str] | None = None,
    **container: Any,
) -> Path:
    """Writes a video of size (height, width); clicks and flashes are given in seconds from the video's start.

    audio_start: when the sound begins; frames whose numbers are in `skipped` are left out, their time stamps too;
    aspect: width of a pixel by its height.
    """
    fps = Fraction(fps)
    packets: list[av.Packet] = []
    with av.open(str(path), "w", options=container.pop("container_options", {}), **container) as output:
        video = audio = None
        if video_codec is not None:
            video = output.add_stream(video_codec, rate=fps, options=options or {"preset": "veryfast"})
            video.height, video.width = size
            video.pix_fmt = pixel_format
            if aspect is not None:
                video.codec_context.sample_aspect_ratio = aspect
        if audio_codec is not None:
            audio = output.add_stream(audio_codec, rate=rate, layout=layout, options=audio_options or {})
            if bit_rate is not None:
                audio.bit_rate = bit_rate  # of the sound, per second; WMA has no usual one
        if video is not None:
            for number in range(frames):
                if number in skipped:
                    continue
                luma = pattern(number, *size, seed=seed)
                if any(abs(number / fps - Fraction(seconds)) < Fraction(1, 2) / fps for seconds in flashes):
                    luma[:] = FLASH_LUMA
                image = _frame(luma, pixel_format)
                image.pts, image.time_base = number, 1 / fps
                packets += video.encode(image)
            packets += video.encode()
        if audio is not None:
            seconds = float(frames / fps) - audio_start if audio_seconds is None else audio_seconds
            wave = beep_with_clicks(round(seconds * rate), rate, [click - audio_start for click in clicks])
            channels = 2 if layout == "stereo" else 1
            sound = av.AudioFrame.from_ndarray(wave.repeat(channels)[None], format="s16", layout=layout)
            sound.sample_rate, sound.time_base = rate, Fraction(1, rate)
            sound.pts = round(audio_start * rate)
            packets += audio.encode(sound)
            packets += audio.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    return Path(path)


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> Path:
    """Makes the first track of an mp4 file be shown with x' = a x + c y, y' = b x + d y."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix lies 40 bytes into the box
    values = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    data[start : start + 32] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(data)
    return path


def lose_packet(source: Path, target: Path, seconds: float) -> Path:
    """Copies a file without the first packet of its sound that begins at `seconds` or later."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        copies = {stream: after.add_stream_from_template(stream) for stream in before.streams}
        lost = False
        for packet in before.demux():
            if packet.dts is None:
                continue
            if not lost and packet.stream.type == "audio" and packet.pts * packet.time_base >= seconds:
                lost = True
                continue
            packet.stream = copies[packet.stream]
            after.mux(packet)
    return target


def join_tracks(target: Path, sources: Sequence[Path], default: int, kind: str = "audio") -> Path:
    """All streams of the first file and those of one kind of the others; that of number `default` is marked so."""
    with contextlib.ExitStack() as stack, av.open(str(target), "w") as after:
        packets: list[av.Packet] = []
        number = 0
        for source in sources:
            before = stack.enter_context(av.open(str(source)))
            streams = [stream for stream in before.streams if source == sources[0] or stream.type == kind]
            copies = {stream: after.add_stream_from_template(stream) for stream in streams}
            for stream, copy in copies.items():
                if stream.type == kind:
                    disposition = av.stream.Disposition
                    copy.disposition = disposition.default if number == default else disposition(0)
                    number += 1
            for packet in before.demux(*copies):
                if packet.dts is not None:
                    packet.stream = copies[packet.stream]
                    packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            after.mux(packet)
    return target


def copy_cut(source: Path, target: Path, start_seconds: float) -> Path:
    """Cuts without decoding, as `ffmpeg -ss START -i SOURCE -c copy TARGET`: from the key frame before the start, with
    an edit list that hides what lies before it."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        before.seek(int(start_seconds * av.time_base), backward=True)
        streams = {stream: after.add_stream_from_template(stream) for stream in before.streams}
        for packet in before.demux():
            if packet.dts is None:
                continue
            shift = round(Fraction(start_seconds) / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = streams[packet.stream]
            after.mux(packet)
    return target


def write_lrw_tree(root: Path, words: Sequence[str], counts: dict[str, int], **options: Any) -> list[Path]:
    """ROOT/WORD/SPLIT/WORD_00001.mp4 with counts[split] clips a word; returns the paths."""
    paths = []
    for word in words:
        for split, count in counts.items():
            folder = root / word / split
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(1, count + 1):
                path = folder / f"{word}_{number:05}.mp4"
                paths.append(write_video(path, seed=len(paths), **options))
    return paths


def click_seconds(audio: np.ndarray) -> float:
    """When the loudest click begins: where the sound first reaches half of its peak, at 16 kHz."""
    level = np.abs(audio.astype(np.float64))
    return float(np.argmax(level >= level.max() / 2)) / 16_000


def flash_frame(video: np.ndarray) -> int:
    """Number of the brightest frame of [T, H, W]."""
    return int(video.astype(np.float64).mean(axis=(1, 2)).argmax())


def _frame(luma: np.ndarray, pixel_format: str) -> av.VideoFrame:
    if pixel_format == "gray":
        return av.VideoFrame.from_ndarray(luma, format="gray")
    height, width = luma.shape
    colourless = np.full((height // 2, width), 128, np.uint8)
    image = av.VideoFrame.from_ndarray(np.concatenate([luma, colourless]), format="yuv420p")
    return image.reformat(format=pixel_format)
