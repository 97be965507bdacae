"""What pages show of the data: clips as small pictures, the mouth over time and the sound below it; a video as a film.

A film is the video encoded again: small, so that any browser plays it, with its first picture at 0 s, as clips count,
and without what else is in the file, such as where a phone was when it was recorded.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from avppc.clip import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from avppc.data.contact_sheet import png_bytes, strip
from avppc.data.source import DataSource
from avppc.data.video.clock import AudioTimeline
from avppc.data.video.crop import Geometry, geometry_of
from avppc.data.video.pictures import PictureDecoder, decode_packet, decode_pictures
from avppc.data.video.reader import choose_sound, choose_video, has_sound, seconds_of
from avppc.data.video.source import DecodeError, damage_as_decode_error, open_video
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.op import log_mel
from avppc.tasks.config import CutConfig

TILES = 15
"""Frames shown of a clip, at most."""

_MOST_PIXELS = 480  # of the film's shorter side
_CLOCK = Fraction(1, 12_800)  # seconds, a tick of the film's time stamps; 512 of them are 1/25 s
_KEY_FRAMES = 25  # pictures between two: a browser seeks to any picture at once
_SOUND_BITS = 48_000  # a second
_SOUND_PIECE = SAMPLE_RATE_HZ  # samples that are encoded at a time
_LEAST_BITS = 40_000  # a second, of the pictures
_ENCODERS = (
    ("mp4", "video/mp4", "libx264", {"preset": "veryfast", "crf": "25", "movflags": "+faststart"}, "aac"),
    ("webm", "video/webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "6", "crf": "33"}, "libopus"),
)
"""Format, media type, encoder of the pictures with its options, encoder of the sound; the first that is there."""


@dataclass(frozen=True)
class ClipStrip:
    """One clip. The pictures are data URIs of PNG files; their width is the clip's time."""

    word: str | None
    source: str
    mouth: str
    sound: str


@dataclass(frozen=True)
class ClipSheet:
    """Clips of one split."""

    split: str
    clips_in_split: int
    frames: int
    """Frames of each clip."""
    tiles: int
    """Frames shown of each clip."""
    spans: list[tuple[str, int]]
    """"past", "gap", "future" and "unused" with their frames, from left to right."""
    strips: list[ClipStrip]


def make_clip_sheet(source: DataSource, cut: CutConfig, features: LogMelConfig, clips: int = 6) -> ClipSheet:
    """Clips of as many different words as possible, from the test split if there is one; the same clips each time.

    Raises:
        FileNotFoundError, ValueError: there is no data set, or it is damaged.
    """
    available = source.splits()
    split = next((name for name in ("test", "val", "train") if available.get(name)), "train")
    with source.open(split, verify=False) as dataset:
        rows = _spread_over_words(dataset.labels, clips)
        batch = dataset.batch(rows)
        frames = dataset.shape.frames
        tiles = min(TILES, frames)
        # each tile shows the frame in its middle, so that tiles, sound and spans share one clock
        shown = (torch.arange(tiles) + 0.5).mul(frames / tiles).long()
        strips = [
            ClipStrip(
                word=dataset.words[label] if label >= 0 else None,
                source=dataset.sources[row],
                mouth=_png(strip(list(video[shown].numpy()))),
                sound=_png(_mel_picture(audio, frames, features)),
            )
            for row, label, video, audio in zip(
                rows.tolist(), batch.labels.tolist(), batch.video, batch.audio, strict=True
            )
        ]
        return ClipSheet(split, len(dataset), frames, tiles, _spans(cut, frames), strips)


def _spread_over_words(
    labels: Tensor,  # [n]
    clips: int,
) -> Tensor:
    """Row numbers of clips of `clips` words spread over the vocabulary; if there are fewer, rows spread over all."""
    words = labels.unique()
    if len(words) < clips:
        return torch.linspace(0, len(labels) - 1, min(clips, len(labels))).long().unique()
    chosen = []
    for place, word in enumerate(words[torch.linspace(0, len(words) - 1, clips).long()].tolist()):
        of_word = torch.where(labels == word)[0]
        chosen.append(int(of_word[place * len(of_word) // clips]))
    return torch.tensor(chosen)


def _spans(cut: CutConfig, frames: int) -> list[tuple[str, int]]:
    """Which frames of the clip are past, gap, future and unused, as far as there are frames."""
    spans, start = [], 0
    wanted = (("past", cut.past_frames), ("gap", cut.gap_frames), ("future", cut.future_frames), ("unused", frames))
    for name, length in wanted:
        length = min(length, frames - start)
        if length > 0:
            spans.append((name, length))
        start += length
    return spans


def _mel_picture(audio: Tensor, frames: int, features: LogMelConfig) -> NDArray[np.uint8]:
    """[bands, mel frames]: low bands at the bottom; grey from the clip's 2nd to its 99.5th percentile."""
    mel = log_mel(audio.unsqueeze(0), features)[0].float()
    mel = mel[: frames * SAMPLES_PER_FRAME // features.hop_samples]
    low, high = (torch.quantile(mel, share).item() for share in (0.02, 0.995))
    scaled = (mel - low) / max(high - low, 1e-6)
    return scaled.clamp(0, 1).mul(255).to(torch.uint8).T.flip(0).numpy()


def _png(picture: NDArray[np.uint8]) -> str:
    """[rows, columns] gray as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()


@dataclass(frozen=True)
class Picture:
    """How a video is shown, and how long it lasts."""

    geometry: Geometry
    width: int
    """As it is shown, square pixels of the video."""
    height: int
    origin_seconds: Fraction
    """Time stamp of the first picture: the zero of the clips' clock."""
    time_base: Fraction
    seconds: float
    """From the first picture to the end, as the file declares it or its packets say; 0.0 where neither does."""


def look_at(path: Path) -> Picture:
    """Reads how a video is shown from its first picture; DecodeError where it has none."""
    with damage_as_decode_error(path), open_video(path) as container:
        video = choose_video(container)
        first = next(decode_pictures(container, video), None)
        if first is None or first.pts is None or video.time_base is None:
            raise ValueError("the video stream has no pictures")
        geometry = geometry_of(first, video.sample_aspect_ratio)
        height, width = geometry.shown_size(first.height, first.width)
        origin = first.pts * video.time_base
        declared = seconds_of(video, video.duration)
        seconds = declared if declared is not None else Fraction(container.duration or 0, av.time_base)
        return Picture(geometry, width, height, origin, video.time_base, float(seconds) or _last_packet(path, origin))


def _last_packet(path: Path, origin: Fraction) -> float:
    """Seconds from the first picture to the last packet: recordings of browsers do not declare their length."""
    last = origin
    with contextlib.suppress(av.FFmpegError), open_video(path) as container:
        for packet in container.demux(choose_video(container)):
            if packet.pts is not None and packet.time_base is not None:
                last = max(last, packet.pts * packet.time_base)
    return float(last - origin)


def make_film(path: Path, picture: Picture, out: Path, most_bytes: int, advance: Callable[[float], None]) -> str:
    """Writes a small film of a video whose first picture is at 0 s; returns its media type.

    A video that is damaged gives a film of what comes before. Memory does not grow with its length.

    Args:
        out: the file to write.
        most_bytes: about which the film is not to exceed; long videos get fewer bits a second.
        advance: called with the seconds done since the last call.

    Raises:
        DecodeError: there is no picture before the damage.
        ValueError: no encoder that browsers play is there.
        OSError: the disk does not take the film, or cannot be read.
    """
    form, media_type, encoder, options, sound_encoder = _find_encoder()
    with _FilmFile(out) as file, av.open(file, "w", format=form) as target:
        written = 0
        try:
            with damage_as_decode_error(path), open_video(path) as container:
                maker = _FilmMaker(container, picture, target, encoder, options, sound_encoder, most_bytes)
                for seconds in maker.run():
                    file.check()
                    written += 1
                    advance(seconds)
        except DecodeError:
            if not written:
                raise
        maker.finish()
    return media_type


class _FilmFile:
    """A file that PyAV writes to; used as a context manager.

    PyAV tells an error of a file in many ways, some of them without its cause, or not at all. It is told none: after
    the first one nothing more is written, and `check` and the end of the block raise that one.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)  # by which FFmpeg opens it once more, to put the index first
        self._file = path.open("w+b")
        self._error: OSError | None = None
        self._place = 0

    def __enter__(self) -> _FilmFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._file.close()
        except OSError as closing:
            self._error = self._error or closing
        if kind is None or (error is not None and issubclass(kind, OSError | RuntimeError)):
            self.check()

    def check(self) -> None:
        """Raises the first error of the file, if it had any."""
        if self._error is not None:
            raise self._error

    def write(self, piece: bytes) -> int:
        """Takes bytes; returns their number."""
        if self._error is None:
            try:
                self._file.write(piece)
            except OSError as error:
                self._error = error
        return len(piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes on elsewhere; returns where."""
        if self._error is None:
            try:
                self._place = self._file.seek(offset, whence)
            except OSError as error:  # of what was not written yet
                self._error = error
        return self._place

    def tell(self) -> int:
        """Where the next bytes go."""
        return self._file.tell() if self._error is None else self._place


def _find_encoder() -> tuple[str, str, str, dict[str, str], str]:
    for entry in _ENCODERS:
        with contextlib.suppress(av.codec.codec.UnknownCodecError):
            for name in (entry[2], entry[4]):
                av.Codec(name, "w")
            return entry
    raise ValueError("PyAV has no encoder of H.264 and AAC, nor of VP9 and Opus: no film can be made for the page")


class _FilmMaker:
    """Decodes a video and encodes it again, picture by picture."""

    def __init__(
        self,
        container: InputContainer,
        picture: Picture,
        target: OutputContainer,
        encoder: str,
        options: dict[str, str],
        sound_encoder: str,
        most_bytes: int,
    ) -> None:
        self._container, self._picture, self._target = container, picture, target
        self._source: VideoStream = choose_video(container)
        self._source.codec_context.thread_type = "AUTO"
        self._heard: AudioStream | None = choose_sound(container) if has_sound(container) else None
        self._height, self._width = _film_size(picture)
        encoding = target.add_stream(encoder, rate=25, options=self._options(options, most_bytes))
        self._stream = cast(VideoStream, encoding)
        self._stream.width, self._stream.height, self._stream.pix_fmt = self._width, self._height, "yuv420p"
        self._stream.codec_context.time_base = _CLOCK
        self._stream.codec_context.gop_size = _KEY_FRAMES
        self._stream.codec_context.thread_count = torch.get_num_threads()
        self._last = -1  # ticks
        self._sound: AudioTimeline | None = None
        if self._heard is not None:
            self._sound = AudioTimeline(picture.origin_seconds)
            sound_encoding = target.add_stream(sound_encoder, rate=SAMPLE_RATE_HZ, layout="mono")
            self._sound_stream = cast(AudioStream, sound_encoding)
            self._sound_stream.bit_rate = _SOUND_BITS
            self._sound_done = 0  # samples

    def _options(self, options: dict[str, str], most_bytes: int) -> dict[str, str]:
        bits = 0.9 * 8 * most_bytes / max(self._picture.seconds, 1.0) - (_SOUND_BITS if self._heard else 0)
        most = f"{max(int(bits), _LEAST_BITS)}"
        return {**options, "maxrate": most, "bufsize": most}

    def run(self) -> Iterator[float]:
        """Encodes all that can be decoded; yields the seconds of each picture since the one before."""
        decoder = PictureDecoder(self._container, self._source)
        for packet in self._container.demux(*filter(None, (self._source, self._heard))):
            if packet.stream is self._source:
                for frame in decoder.decode(packet):
                    yield self._add_picture(frame)
                continue
            assert self._sound is not None
            for sound in decode_packet(packet):
                assert isinstance(sound, av.AudioFrame)
                self._sound.push(sound)
            self._add_sound(last=False)

    def _add_picture(self, frame: av.VideoFrame) -> float:
        assert frame.pts is not None
        seconds = frame.pts * self._picture.time_base - self._picture.origin_seconds
        stamp = max(round(seconds / _CLOCK), self._last + 1)
        turned = self._picture.geometry.transpose
        width, height = (self._height, self._width) if turned else (self._width, self._height)
        rgb = self._picture.geometry.turn(frame.to_ndarray(format="rgb24", width=width, height=height))
        shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(format="yuv420p")
        shown.pts, shown.time_base = stamp, _CLOCK
        self._target.mux(self._stream.encode(shown))
        passed, self._last = stamp - max(self._last, 0), stamp
        return float(passed * _CLOCK)

    def _add_sound(self, *, last: bool) -> None:
        assert self._sound is not None
        end = self._sound.end if last else self._sound.end // _SOUND_PIECE * _SOUND_PIECE
        while self._sound_done < end:
            count = min(_SOUND_PIECE, end - self._sound_done)
            samples, _ = self._sound.take(self._sound_done, count)
            piece = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            piece.sample_rate, piece.pts = SAMPLE_RATE_HZ, self._sound_done
            piece.time_base = Fraction(1, SAMPLE_RATE_HZ)
            self._target.mux(self._sound_stream.encode(piece))
            self._sound_done += count
            self._sound.drop_before(self._sound_done)

    def finish(self) -> None:
        """Encodes what is held back."""
        if self._sound is not None:
            self._sound.finish()
            self._add_sound(last=True)
            self._target.mux(self._sound_stream.encode(None))
        self._target.mux(self._stream.encode(None))


def _film_size(picture: Picture) -> tuple[int, int]:
    """Height and width of the film, both even: at most 480 pixels on the shorter side."""
    shrink = min(1.0, _MOST_PIXELS / min(picture.height, picture.width))
    height, width = (max(2, round(shrink * side / 2) * 2) for side in (picture.height, picture.width))
    return height, width
