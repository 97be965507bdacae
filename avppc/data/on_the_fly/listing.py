"""Which clips the videos of a folder give: each is decoded once to find out, and what was found is kept.

CACHE/videos-*/list.jsonl      what is known of each video, a line for a few of them; the last line about a video holds
CACHE/videos-*/tracks/         where the mouths are, for crops that follow them
CACHE/videos-*/refused.jsonl   what could not be used, and why, as `avppc prepare` writes it; and notes.jsonl

The clips are those that `avppc prepare` packs with the same settings, in the same order: its own code cuts them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avppc.data.config import PrepareConfig, VideoConfig, VideoDecoder
from avppc.data.packed.remote import cache_folder
from avppc.data.prepare.pool import PASSING, Report, Unit, handle_units
from avppc.data.prepare.prepare import check_installed, find_videos, settings_of_clips
from avppc.data.prepare.summary import NOTES_NAME, REFUSED_NAME
from avppc.data.prepare.worker import CHANGED, DecodeJob, Notes, UnitRecord, kind_of, label_of, source_of
from avppc.data.scan import VIDEO_SUFFIXES, Scan, Video
from avppc.data.sound_file import SOUND_FILE
from avppc.data.video.inspect import VideoFacts, inspect_video
from avppc.data.video.reader import DecodedClip
from avppc.data.video.source import UNREADABLE, DecodeError, damage_as_decode_error
from avppc.data.video.track import MouthTrack
from avppc.files import (
    LineFile,
    json_bytes,
    read_bytes,
    real_path,
    remove_leftovers,
    replace_file,
    sha256_of,
    sole_use,
    write_json_lines,
)
from avppc.printing import Console, ProgressBar, as_line
from avppc.settings import parse_checked_json, with_checksum

LIST_VERSION = 1  # grows when a list says something else of the same videos
_LIST_NAME = "list.jsonl"
TRACK_FOLDER = "tracks"
TRACK_ROW = np.dtype([("stamp", "<i8"), ("place", "<f8", (4,))])
"""Of a file of tracks: a frame's time stamp and MouthTrack's square there."""
_MOST_VIDEOS_PER_UNIT = 64
_SHOWN = 5  # videos that an error names

Entry = dict[str, Any]
"""What a list says of a video: "path", "stamp" (by which it is known that it holds), "clips" ([start frame, number of
the word or null, CRC-32]), "refused" ([source, reason]), "notes"; where there are clips "sha256", "sound_sha256" and
"facts"; and "track" (file, first row and the one after the last) where the crop follows the mouth."""


def settings_for(data: Path, videos: VideoConfig, backend: VideoDecoder, workers: int = 0) -> PrepareConfig:
    """The settings by which `avppc prepare` would cut the clips; `out` is the folder of the list.

    Raises:
        ValueError: settings that do not go together; or there is no home folder, and AVPPC_CACHE is not set.
    """
    chosen = {item.name: getattr(videos, item.name) for item in fields(videos)}
    place = cache_folder(str(real_path(data)))
    config = PrepareConfig(data, place, decoder=backend, workers=workers, **chosen)
    digest = hashlib.sha256(json_bytes([LIST_VERSION, settings_of_clips(config)])).hexdigest()
    return replace(config, out=place.with_name(f"videos-{place.name.lstrip('-')}-{digest[:16]}"))


def checksum_of(video: NDArray[np.uint8], audio: NDArray[np.int16]) -> int:
    """CRC-32 of a clip, by which it is known whether it was decoded to the same values again."""
    return zlib.crc32(audio.tobytes(), zlib.crc32(video.tobytes()))


class ListJob:
    """Decodes the videos of a unit as `avppc prepare` does, and keeps what it finds, not the clips."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self._decoding = DecodeJob(config)

    def handle(self, unit: Unit, refused: dict[str, str], report: Report) -> list[Entry]:
        """The entries of the unit's videos."""
        tracks: list[MouthTrack] = []
        name, rows = f"{unit.digest[:32]}.npy", 0
        entries = []
        for video in unit.videos:
            report.video(video.path)
            entry = self._entry(video, refused.get(video.path), report)
            track = self._decoding.track
            if entry["clips"] and isinstance(track, MouthTrack):
                tracks.append(track)
                entry["track"] = [name, rows, rows := rows + len(track.places)]
            entries.append(entry)
            report.video_done()
        if tracks:
            report.video("")  # a slow disk is not the video's fault
            _write_tracks(self.config.out / TRACK_FOLDER / name, tracks)
        return entries

    def _entry(self, video: Video, refused: str | None, report: Report) -> Entry:
        record, clips = UnitRecord(""), []
        if refused is not None:
            record.refused.append((video.path, refused))
        else:
            notes = Notes()
            for word, clip in self._decoding.clips_of(video, record, report):
                clips.append([clip.start_frame, word, _checksum(clip)])
                notes.add(clip.notes)
                report.clip()
            record.notes += [(video.path, note) for note in notes.lines()]
        facts: Entry = {}
        if clips:
            try:
                facts = self._facts(video)
            except DecodeError as error:
                record.refused.append((video.path, error.reason))
                clips = []
        lists = {"clips": clips, "refused": record.refused, "notes": [note for _, note in record.notes]}
        return {"path": video.path, "stamp": stamp_of(self.config, video), **lists, **facts}

    def _facts(self, video: Video) -> Entry:
        """Checksums of the files, and what DALI would have to know of the video."""
        path = self.config.data / video.path
        with damage_as_decode_error(path):
            digest = sha256_of(path)
            found = inspect_video(path, self.config.frames)
            sound = video.sound_path if any(note.startswith(SOUND_FILE) for note in found.notes) else None
            sound_digest = None if sound is None else sha256_of(self.config.data / sound)
            status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != (video.bytes, video.mtime_ns):
            raise DecodeError(str(path), f"{CHANGED} while it was read")
        facts = [found.video_codec, found.pixel_format, found.width, found.height, found.notes]
        return {"sha256": digest, "sound_sha256": sound_digest, "facts": facts}

    def clean_up(self) -> None:
        """Removes what processes that have ended left half written."""
        for folder in (self.config.out, self.config.out / TRACK_FOLDER):
            remove_leftovers(folder)


def _checksum(clip: DecodedClip) -> int:
    return checksum_of(clip.video.numpy(), clip.audio.numpy())


def _write_tracks(path: Path, tracks: Sequence[MouthTrack]) -> None:
    rows = np.array([item for track in tracks for item in track.places.items()], TRACK_ROW)
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def stamp_of(config: PrepareConfig, video: Video) -> list[Any]:
    """All that, beside the settings, decides what clips a video gives; equal ones stand for an equal entry."""
    words = None if video.words is None else [[word.first, word.last] for word in video.words]
    sound = None if video.sound is None else astuple(video.sound)
    single = video.label >= 0 or config.stride == 0
    stamp = [video.bytes, video.mtime_ns, sound, video.box, single, words, words is not None and video.split == "train"]
    read_back: list[Any] = json.loads(json.dumps(stamp))  # where tuples are lists
    return read_back


@dataclass(frozen=True, eq=False)
class ClipList:
    """The clips of one split, in the order in which `avppc prepare` packs them."""

    config: PrepareConfig
    videos: list[Video]
    """Those that give clips, sorted by path."""
    entries: list[Entry]
    """What is known of each."""
    numbers: NDArray[np.int64]
    """[n] whose clip it is: its video's place in `videos`."""

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """[n, 3] first frame, number of the word inside the video or -1, CRC-32."""
        rows = [
            [start, -1 if word is None else word, crc] for entry in self.entries for start, word, crc in entry["clips"]
        ]
        return np.array(rows, np.int64).reshape(-1, 3)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Where each clip comes from, as the index of a packed set says it."""
        starts = self.columns[:, 0].tolist()
        pairs = zip(self.numbers.tolist(), starts, strict=True)
        return tuple(source_of(self.videos[number].path, start) for number, start in pairs)

    def labels(self) -> list[int]:
        """[n] numbers of the words of the whole set, -1 where a clip has none."""
        pairs = zip(self.numbers.tolist(), self.columns[:, 1].tolist(), strict=True)
        return [label_of(self.videos[number], None if word < 0 else word) for number, word in pairs]

    def facts(self, number: int) -> VideoFacts:
        """What DALI has to know of a video."""
        codec, pixels, width, height, notes = self.entries[number]["facts"]
        return VideoFacts(video_codec=codec, pixel_format=pixels, width=width, height=height, notes=notes)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of which clips these are, in which order: of the files' contents, the places and the settings."""
        digest = hashlib.sha256(json_bytes([LIST_VERSION, settings_of_clips(self.config)]))
        for video, entry in zip(self.videos, self.entries, strict=True):
            words = None if self.config.word_context is None else entry["stamp"][5]
            starts = [[start, word] for start, word, _ in entry["clips"]]
            known = [video.path, entry["sha256"], entry["sound_sha256"], video.box, words, starts]
            digest.update(json.dumps(known).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Listing:
    """The videos of a folder, and what is known of each."""

    config: PrepareConfig
    found: Scan
    entries: Mapping[str, Entry]
    """By path."""

    def split(self, name: str) -> ClipList:
        """The clips of a split; there may be none."""
        videos = [video for video in self.found.videos if video.split == name and self.entries[video.path]["clips"]]
        entries = [self.entries[video.path] for video in videos]
        numbers = np.repeat(np.arange(len(videos)), [len(entry["clips"]) for entry in entries])
        return ClipList(self.config, videos, entries, numbers)

    def refused(self) -> list[tuple[str, str]]:
        """What could not be used, and why, sorted."""
        refused = [(str(source), str(reason)) for entry in self.entries.values() for source, reason in entry["refused"]]
        return sorted(self.found.refused + refused)


def list_videos(config: PrepareConfig, kept: Mapping[str, str] | None = None) -> Listing:
    """Finds the clips of all videos; those that were listed before and have not changed since are not read again.

    Args:
        config: of settings_for.
        kept: SHA-256 by path, of the videos that a run was begun on: no others are taken.

    Raises:
        ValueError: there are no videos, or one of `kept` is gone, has changed or cannot be used any more; the text
            names them. Or as find_videos.
        ImportError: a package is not installed.
        OSError: the list cannot be written.
    """
    found, _ = find_videos(config)
    if not found.videos and not found.refused:
        raise ValueError(f"{config.data} has no videos ({', '.join(sorted(VIDEO_SUFFIXES))})")
    if kept is not None:
        found.videos = [video for video in found.videos if video.path in kept]
        found.refused = []
    check_installed(config)
    (config.out / TRACK_FOLDER).mkdir(parents=True, exist_ok=True)
    with sole_use(config.out, wait=True):  # of several processes on a machine the first lists, the others find it done
        known = _read(config.out / _LIST_NAME)
        todo = [video for video in found.videos if not _holds(config, known.get(video.path), video)]
        if todo:
            _list(config, todo, known)
        listing = Listing(config, found, {video.path: known[video.path] for video in found.videos})
        if todo and kept is None:
            _write_records(listing)
    if kept is not None:
        _check_kept(listing, kept)
    return listing


def _read(path: Path) -> dict[str, Entry]:
    """What a list says of each video; a line that is damaged, or was cut short by a kill, says nothing."""
    known: dict[str, Entry] = {}
    for line in read_bytes(path).splitlines() if path.exists() else ():
        try:
            content = parse_checked_json(line)
            known |= {entry["path"]: entry for entry in content["videos"]}
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _holds(config: PrepareConfig, entry: Entry | None, video: Video) -> bool:
    """Whether an entry is about the video as it is now, and another try would find no more."""
    if entry is None or entry["stamp"] != stamp_of(config, video):
        return False
    if any(reason.startswith((UNREADABLE, CHANGED, *PASSING)) for _, reason in entry["refused"]):
        return False
    return "track" not in entry or (config.out / TRACK_FOLDER / entry["track"][0]).is_file()


def _list(config: PrepareConfig, todo: list[Video], known: dict[str, Entry]) -> None:
    """Lists videos; each unit is kept as soon as it is done."""
    console, started = Console(stderr=True, soft_wrap=True), time.monotonic()
    size = min(_MOST_VIDEOS_PER_UNIT, -(-len(todo) // (4 * config.processes)))
    groups = [tuple(todo[start : start + size]) for start in range(0, len(todo), size)]
    units = [Unit(str(number), _digest(config, group), group) for number, group in enumerate(groups)]
    console.print(f"listing the clips of {len(todo):,} videos of {config.data}, each decoded once")
    with (
        closing(LineFile(config.out / _LIST_NAME)) as file,
        ProgressBar("list", len(todo), "videos", rated="clips", console=console) as progress,
    ):
        for step in handle_units(ListJob(config), units, config.processes, config.timeout_seconds):
            progress.advance(step.videos, step.clips)
            if step.unit is not None:
                file.add(json.dumps(with_checksum({"videos": step.record})))
                known |= {entry["path"]: entry for entry in step.record}
    clips = sum(len(known[video.path]["clips"]) for video in todo)
    console.print(f"{clips:,} clips listed in {time.monotonic() - started:.1f} s")


def _digest(config: PrepareConfig, videos: Sequence[Video]) -> str:
    content = [settings_of_clips(config), [[video.path, stamp_of(config, video)] for video in videos]]
    return hashlib.sha256(json_bytes(content)).hexdigest()


def _write_records(listing: Listing) -> None:
    """Writes refused.jsonl and notes.jsonl, and says what was refused."""
    folder, refused = listing.config.out, listing.refused()
    notes = [{"path": path, "note": note} for path, entry in listing.entries.items() for note in entry["notes"]]
    write_json_lines(folder / REFUSED_NAME, ({"path": path, "reason": reason} for path, reason in refused))
    write_json_lines(folder / NOTES_NAME, notes)
    console = Console(stderr=True, soft_wrap=True)
    for kind, count in Counter(kind_of(as_line(reason)) for _, reason in refused).most_common(_SHOWN):
        console.print(f"refused {count:,}: {kind}")
    if refused:
        console.print(f"they are listed in {folder / REFUSED_NAME}")


def _check_kept(listing: Listing, kept: Mapping[str, str]) -> None:
    """ValueError that names the videos that a run was begun on and that are not what they were."""
    changed = []
    for path, digest in kept.items():
        entry = listing.entries.get(path)
        if entry is None:
            there = (listing.config.data / path).exists()
            changed.append(f"{path} ({'not taken any more' if there else 'gone'})")
        elif not entry["clips"]:
            changed.append(f"{path} ({entry['refused'][0][1] if entry['refused'] else 'no clips'})")
        elif entry["sha256"] != digest:
            changed.append(f"{path} (its SHA-256 was {digest[:12]}..., is {entry['sha256'][:12]}...)")
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ValueError(
            f"{len(changed)} of {len(kept)} videos of {listing.config.data} on which the run was begun have changed: "
            f"{'; '.join(changed[:_SHOWN])}{more}. Put them back to go on with it, or give another --out"
        )
