"""What a process of `avppc prepare` does: decodes the videos of a unit into shards."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch

from avppc.clip import CROP_SIZE, NO_LABEL, SAMPLES_PER_FRAME, VIDEO_FPS
from avppc.data.config import TRACKED_CROPS, PrepareConfig
from avppc.data.packed.index import SHARD_FOLDER, UNIT_FOLDER
from avppc.data.packed.shard import ClipShape, ShardRecord, ShardWriter
from avppc.data.prepare.pool import Report, Unit
from avppc.data.scan import Video, WordSpan
from avppc.data.video.crop import Crop, Track
from avppc.data.video.decode import OnRefused, decode_clips, decode_clips_at
from avppc.data.video.faces import make_crop, make_finder
from avppc.data.video.reader import DecodedClip
from avppc.data.video.source import DecodeError, damage_as_decode_error
from avppc.data.video.track import MAX_GAP_SECONDS, FaceFinder, MouthTrack
from avppc.files import remove_leftovers, sha256_of
from avppc.settings import write_checked_json

SHARD_OF_UNIT = re.compile(r"(.+)-\d\d+\.safetensors")
"""The name of a unit's shard; the group is the unit's."""
CHANGED = "changed"  # begins the reason for a file that is not what the manifest says

_END_TOLERANCE_FRAMES = 1  # by which a word may end after its video: the times of words are rounded
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def unit_name(split: str, number: int) -> str:
    """The name of a split's unit, from which those of its record and of its shards are made."""
    return f"{split}-{number:05}"


def shard_name(unit: str, number: int) -> str:
    """The name of a unit's shard."""
    return f"{unit}-{number:02}.safetensors"


@dataclass
class UnitRecord:
    """The result of a unit; it is written to OUT/units/NAME.json when all its shards are."""

    digest: str
    shards: list[ShardRecord] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Source and reason."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Path and what was converted or filled in."""
    frames_searched: int = 0
    """Frames in which a face was looked for."""
    frames_with_face: int = 0


class DecodeJob:
    """Decodes units of videos into the shards of OUT."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self._writer: ShardWriter | None = None  # made in the process that uses it
        self._finder: FaceFinder | None = None
        self.track: Track | None = None
        """Where the mouth of the last video is, if the crop follows it."""

    def handle(self, unit: Unit, refused: dict[str, str], report: Report) -> UnitRecord:
        """Writes the unit's shards, then its record."""
        config = self.config
        if self._writer is None:
            self._writer = ShardWriter(ClipShape(config.frames, CROP_SIZE, CROP_SIZE), config.clips_per_shard)
        writer, record = self._writer, UnitRecord(unit.digest)
        folder = config.out / SHARD_FOLDER

        def write(path: str = "") -> None:
            report.video("")  # a slow disk is not the video's fault
            record.shards.append(writer.write(folder / shard_name(unit.name, len(record.shards))))
            report.video(path)

        for video in unit.videos:
            report.video(video.path)
            if video.path in refused:
                record.refused.append((video.path, refused[video.path]))
                report.video_done()
                continue
            notes = Notes()
            for word, clip in self.clips_of(video, record, report):
                source = source_of(video.path, clip.start_frame)
                writer.add(
                    source,
                    video=clip.video.numpy(),
                    audio=clip.audio.numpy(),
                    label=label_of(video, word),
                    clip_id=clip_id(source),
                    speaker=video.speaker,
                )
                notes.add(clip.notes)
                report.clip()
                if writer.full:
                    write(video.path)
            record.notes += [(video.path, note) for note in notes.lines()]
            report.video_done()
        if len(writer):
            write()
        write_checked_json(config.out / UNIT_FOLDER / f"{unit.name}.json", asdict(record))
        return record

    def clips_of(self, video: Video, record: UnitRecord, report: Report) -> Iterator[tuple[int | None, DecodedClip]]:
        """The clips of a video, each with the number of its word inside the video, None where it has none; what is
        refused goes into the record."""
        config = self.config

        def alive() -> None:
            report.video(video.path)

        def refuse(start: int, reason: str) -> None:
            record.refused.append((source_of(video.path, start), reason))

        try:
            self._check_content(video)
            crop = self._crop_of(video, record, alive)
            self.track = crop.track
            if video.words is not None:
                yield from self._clips_of_words(video, crop, refuse, alive)
                return
            stride = None if self._single(video) else config.stride
            clips = decode_clips(
                config.data / video.path,
                num_frames=config.frames,
                stride=stride,
                crop=crop,
                on_refused=refuse,
                backend=config.backend,
            )
            yield from ((None, clip) for clip in clips)
        except DecodeError as error:
            record.refused.append((video.path, error.reason))

    def _clips_of_words(
        self, video: Video, crop: Crop, refuse: OnRefused, alive: Callable[[], None]
    ) -> Iterator[tuple[int | None, DecodedClip]]:
        """A clip around the middle of each word in a video; of training videos other clips, too."""
        config, words = self.config, video.words or ()
        for number, clip in decode_clips_at(
            config.data / video.path,
            [start_of_clip(word, config.frames) for word in words],
            num_frames=config.frames,
            others=config.sentence_clips if video.split == "train" else "none",
            stride=config.stride,
            crop=crop,
            on_refused=refuse,
            alive=alive,
        ):
            if number is None:
                yield None, clip
            elif problem := _beyond_end(words[number], clip):
                refuse(clip.start_frame, problem)
            else:
                yield number, clip_of_word(clip, words[number], config.word_context)

    def _check_content(self, video: Video) -> None:
        """DecodeError where a file's checksum is not the manifest's: a decoder does not notice all wrong bits."""
        for path, expected in ((video.path, video.sha256), (video.sound_path, video.sound_sha256)):
            if path is None or expected is None:
                continue
            with damage_as_decode_error(self.config.data / path):
                digest = sha256_of(self.config.data / path)
            if digest != expected:
                of_sound = "" if path == video.path else f" ({path})"
                raise DecodeError(
                    video.path,
                    f"{CHANGED} since it was listed{of_sound}: its SHA-256 is {digest}, the manifest says {expected}; "
                    "where the new content is right, `avppc index` lists it",
                )

    def _crop_of(self, video: Video, record: UnitRecord, alive: Callable[[], None]) -> Crop:
        """The crop of a video; DecodeError where there is no face, or not the box that the manifest should give."""
        if self._finder is None and self.config.crop in TRACKED_CROPS:
            self._finder = make_finder(self.config.crop)
        path = self.config.data / video.path
        single = self._single(video) and video.words is None
        needed = self.config.frames / VIDEO_FPS + MAX_GAP_SECONDS if single else None
        crop = make_crop(self.config, path, self._finder, box=video.box, until_seconds=needed, alive=alive)
        if isinstance(crop.track, MouthTrack):
            record.frames_searched += crop.track.frames
            record.frames_with_face += crop.track.seen
            record.notes += [(video.path, note) for note in crop.track.notes]
        return crop

    def _single(self, video: Video) -> bool:
        """Whether the video gives one clip, its first frames: a label belongs to one clip."""
        return video.label != NO_LABEL or self.config.stride == 0

    def clean_up(self) -> None:
        """Removes what processes that have ended left half written."""
        for folder in (SHARD_FOLDER, UNIT_FOLDER):
            remove_leftovers(self.config.out / folder)


def source_of(path: str, start_frame: int) -> str:
    """What names a clip: its video's path and, unless it is the first frame, where it starts."""
    return f"{path}#{start_frame}" if start_frame else path


def label_of(video: Video, word: int | None) -> int:
    """The label of a clip of a video, by the number of its word inside the video."""
    return video.label if word is None else (video.words or ())[word].label


def start_of_clip(word: WordSpan, frames: int) -> int:
    """The frame of a video from which a clip of so many frames has a word in its middle, as far as the video allows."""
    return max(0, math.floor((word.first + word.last - frames + 1) / 2))


def _beyond_end(word: WordSpan, clip: DecodedClip) -> str:
    """Why a word is not in its clip, the last of the video; "" where it is."""
    end = clip.start_frame + len(clip.video)
    if word.last <= end + _END_TOLERANCE_FRAMES:
        return ""
    begin, last = word.first / VIDEO_FPS, word.last / VIDEO_FPS
    return f"word beyond the end of the video: {begin:.2f} to {last:.2f} s of {end / VIDEO_FPS:.2f} s"


def clip_of_word(clip: DecodedClip, word: WordSpan, context: int | None) -> DecodedClip:
    """The clip, with a note where the word is not in its middle.

    Args:
        context: frames shown and heard before and after the word, beyond which the nearest frame is held and the sound
            is silent; None: all.
    """
    frames = len(clip.video)
    notes = clip.notes
    off = math.floor((word.first + word.last - frames + 1) / 2) - clip.start_frame
    if off:
        notes = (*notes, f"word not in the middle of its clip: {'late' if off > 0 else 'early'} by {abs(off)} frames")
    if context is None:
        return replace(clip, notes=notes)
    first = min(max(math.floor(word.first) - context - clip.start_frame, 0), frames - 1)
    last = min(max(math.ceil(word.last) + context - clip.start_frame, first + 1), frames)
    video = clip.video[torch.arange(frames).clamp(first, last - 1)]
    audio = torch.zeros_like(clip.audio)
    heard = slice(first * SAMPLES_PER_FRAME, last * SAMPLES_PER_FRAME)
    audio[heard] = clip.audio[heard]
    return replace(clip, video=video, audio=audio, notes=notes)


def clip_id(source: str) -> int:
    """63 bits of a hash of the source: the same number whatever else is in the data set."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little") >> 1


def kind_of(text: str) -> str:
    """The kind of a note or reason: its text without details and values."""
    return re.sub(r" [\d.]+(-[\d.]+)?$", "", text.split(":")[0].split("(")[0].strip())


class Notes:
    """The notes on the clips of one video, one a kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}

    def add(self, notes: Iterable[str]) -> None:
        """Adds the notes on a clip."""
        for note in notes:
            found = self._kinds.setdefault(kind_of(note), [])
            if note not in found:
                found.append(note)

    def lines(self) -> list[str]:
        """One note a kind: with a range where they differ in one number, else the first and how many others exist."""
        return [_merged(found) for found in self._kinds.values()]


def _merged(notes: list[str]) -> str:
    if len(notes) == 1:
        return notes[0]
    pieces = [_NUMBER.split(note) for note in notes]  # text, number, text, ...
    first = pieces[0]
    if all(other[::2] == first[::2] for other in pieces):
        differing = [
            place for place in range(1, len(first), 2) if any(other[place] != first[place] for other in pieces)
        ]
        if len(differing) == 1:
            values = sorted((other[differing[0]] for other in pieces), key=float)
            first[differing[0]] = f"{values[0]}-{values[-1]}"
            return "".join(first)
    return f"{notes[0]}; otherwise in other clips, {len(notes) - 1} times"
