"""`avppc index`: a manifest of what a folder of videos holds, one JSON object a line.

    {"path": "A/talk.mp4", "bytes": ..., "mtime_ns": ..., "duration_seconds": 8.3, "fps": 30.0, ..., "problems": [],
     "sha256": ...}

Nothing is decoded: headers and packets tell enough. What the manifest already says of speakers, boxes and so on stays.
The index of packed shards is another file: ../packed/index.py.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from avppc.data.config import IndexConfig
from avppc.data.manifest import MANIFEST_NAME, is_portable, read_manifest_lines
from avppc.data.prepare.pool import PASSING, Report, Unit, handle_units
from avppc.data.prepare.summary import print_kinds, print_understood
from avppc.data.scan import VIDEO_SUFFIXES, Scan, Video, scan
from avppc.data.sound_file import SOUND_FILE
from avppc.data.video.inspect import VideoFacts, inspect_video
from avppc.data.video.source import UNREADABLE, DecodeError, damage_as_decode_error
from avppc.files import check_writable, remove_files, sha256_of, write_json_lines
from avppc.printing import Console, ProgressBar, as_line

_VIDEOS_PER_UNIT = 64
_SAVE_SECONDS = 30.0
_SOUND_KEYS = ("sound", "sound_bytes", "sound_mtime_ns")  # of a file beside the video
_OWN_KEYS = {"path", "bytes", "mtime_ns", "clip_frames", "sha256", "usable", *_SOUND_KEYS, "sound_sha256"}
_OWN_KEYS |= {*VideoFacts.__dataclass_fields__}

Entries = dict[str, dict[str, Any]]


def execute(config: IndexConfig) -> int:
    """Says what the folder is taken for, and writes the manifest; 0: no problem found, 3: some videos or words have
    problems, 1: there are no videos, 4: a share is done, which only the environment asked for, and others are missing.

    Raises:
        ValueError: the data folder is none, or the list or the manifest there is damaged, or the file of words is.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    out = config.data / MANIFEST_NAME if config.out is None else config.out
    found = scan(config.data, config.paths, layout="tree")  # whichever videos are words: the facts are the same
    if not found.videos and not found.refused:
        Console(stderr=True, quiet=False, soft_wrap=True).print(
            f"{config.data} has no videos ({', '.join(sorted(VIDEO_SUFFIXES))})"
        )
        return 1
    understood = print_understood(found, config)
    number, shares = config.share()
    mine = found.videos[number::shares]
    target = out if shares == 1 else out.with_name(f"{_part_prefix(out)}{number}-of-{shares}")
    check_writable(target)
    entries = _known_entries(out, found, mine)
    todo = [video for video in mine if not _is_current(entries[video.path], video, config.frames)]
    _inspect_all(config, todo, entries, target, console)
    _write(target, entries)
    if shares > 1:
        entries = _known_entries(out, found, found.videos)
    missing = sum(not _is_listed(entries[video.path], video, config.frames) for video in found.videos)
    if missing == 0:
        _write(out, entries)
        remove_files(out.parent, [part.name for part in _parts(out)])
    _print_summary(out, found, entries, len(todo), time.monotonic() - started)
    if missing:
        print(f"{missing:,} videos are for other shares (--shard); the one that ends last writes {out}")
        if (code := config.end_of_share()) is not None:
            return code
    return 3 if not understood or any(entry.get("problems") for entry in entries.values()) else 0


def _part_prefix(out: Path) -> str:
    """How the names of the parts begin: files in which each share keeps its lines until all shares are done."""
    return f".{out.name}."


def _parts(out: Path) -> list[Path]:
    """The parts of the shares that have begun."""
    name = re.compile(re.escape(_part_prefix(out)) + r"\d+-of-\d+")
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name))


def _known_entries(out: Path, found: Scan, videos: Sequence[Video]) -> Entries:
    """Lines that the manifest or the shares' parts have of these videos, and one for each that is refused unopened."""
    before = read_known(out)
    read = [read_known(part) for part in _parts(out)]
    entries: Entries = {}
    for video in videos:
        known = before.get(video.path, {})
        entries[video.path] = known | {"path": video.path}
        for part in read:
            entry = part.get(video.path, {})
            if entry.get("mtime_ns") == video.mtime_ns and entry != known:
                entries[video.path] = _others(known) | {key: entry[key] for key in entry if key in _OWN_KEYS}
    for path, problem in found.refused:
        entries[path] = _others(before.get(path, {})) | {"path": path, "problems": [problem]}
    return entries


class InspectJob:
    """Reads the facts of the videos of a unit."""

    def __init__(self, data: Path, frames: int) -> None:
        self.data = data
        self.frames = frames

    def handle(self, unit: Unit, refused: dict[str, str], report: Report) -> Entries:
        """The unit's manifest lines."""
        entries: Entries = {}
        for video in unit.videos:
            report.video(video.path)
            facts = _problem(refused[video.path]) if video.path in refused else self._facts(video)
            entries[video.path] = _stamp(video, self.frames) | facts
            report.video_done()
        return entries

    def _facts(self, video: Video) -> dict[str, Any]:
        path = self.data / video.path
        try:
            with damage_as_decode_error(path):
                digest = sha256_of(path)
                found = inspect_video(path, self.frames)
                facts = found.as_json() | {"sha256": digest}
                if video.sound_path is not None and any(note.startswith(SOUND_FILE) for note in found.notes):
                    facts["sound_sha256"] = sha256_of(self.data / video.sound_path)
        except DecodeError as error:
            return _problem(error.reason)
        return facts if found.usable else facts | {"usable": False}

    def clean_up(self) -> None:
        """Nothing to do: these workers write no files."""


def _problem(reason: str) -> dict[str, Any]:
    """The entries for a video that gives no clip; where another try may help, `avppc prepare` does not leave it out."""
    passing = reason.startswith((UNREADABLE, *PASSING))
    return {"problems": [reason]} if passing else {"problems": [reason], "usable": False}


def read_known(out: Path) -> Entries:
    """What a manifest says already; facts that this command cannot have written are left out, to be read anew.

    Raises:
        ValueError: a line is damaged; the text tells which.
    """
    known = {path: entry for path, (_, entry) in read_manifest_lines(out).items()}
    return {path: entry if _has_sound_facts(entry) else _others(entry) for path, entry in known.items()}


def _has_sound_facts(entry: dict[str, Any]) -> bool:
    empty = asdict(VideoFacts())
    if any(not isinstance(entry[name], _kinds(empty[name])) for name in entry.keys() & empty.keys()):
        return False
    if not all(isinstance(text, str) for name in ("problems", "notes") for text in entry.get(name, [])):
        return False
    return not entry.get("video_codec") or empty.keys() <= entry.keys()


def _kinds(value: object) -> tuple[type, ...]:
    """The types that a fact, of which this is a value, may have in JSON."""
    return (int, float) if isinstance(value, float) else (type(value),)


def _inspect_all(config: IndexConfig, todo: list[Video], entries: Entries, out: Path, console: Console) -> None:
    groups = [tuple(todo[start : start + _VIDEOS_PER_UNIT]) for start in range(0, len(todo), _VIDEOS_PER_UNIT)]
    units = [Unit(str(number), "", videos) for number, videos in enumerate(groups)]
    job, saved = InspectJob(config.data, config.frames), time.monotonic()
    with ProgressBar("index", len(todo), "videos", console=console) as progress:
        for step in handle_units(job, units, config.processes, config.timeout_seconds):
            progress.advance(step.videos)
            if step.unit is None:
                continue
            for path, facts in step.record.items():
                entries[path] = _others(entries[path]) | facts
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                _write(out, entries)


def _stamp(video: Video, frames: int) -> dict[str, Any]:
    """The entries that must be equal at the next call for a line to hold: of the files, and how long a clip is."""
    stamp = {"path": video.path, "bytes": video.bytes, "mtime_ns": video.mtime_ns, "clip_frames": frames}
    return stamp if video.sound is None else stamp | dict(zip(_SOUND_KEYS, astuple(video.sound), strict=True))


def _is_listed(known: dict[str, Any], video: Video, frames: int) -> bool:
    """Whether a line is about the file as it is now."""
    stamp = dict.fromkeys(_SOUND_KEYS) | _stamp(video, frames)
    return "problems" in known and all(known.get(key) == value for key, value in stamp.items())


def _is_current(known: dict[str, Any], video: Video, frames: int) -> bool:
    """Whether a line has all that reading the file again would tell."""
    return _is_listed(known, video, frames) and ("sha256" in known or known.get("usable") is False)


def _others(entry: dict[str, Any]) -> dict[str, Any]:
    """The entries of a line that are not from this command, such as speaker and box."""
    return {key: value for key, value in entry.items() if key not in _OWN_KEYS}


def _write(out: Path, entries: Entries) -> None:
    # A path that no manifest may name belongs to a file that is refused whatever the manifest says.
    write_json_lines(out, [entries[path] for path in sorted(entries) if is_portable(path)])


def _print_summary(out: Path, found: Scan, entries: Entries, read: int, seconds: float) -> None:
    usable = [entry for entry in entries.values() if not entry.get("problems")]
    hours = sum(entry.get("duration_seconds", 0.0) for entry in entries.values()) / 3600
    print(f"{out}: {len(found.videos):,} videos, {hours:.2f} h; {read:,} read in {seconds:.1f} s")
    print(f"  without problems: {len(usable):,}")
    for title, name in (("codecs", "video_codec"), ("sizes", "size"), ("frame rates", "fps")):
        counts = Counter(_value(entry, name) for entry in entries.values() if entry.get("video_codec"))
        if counts:
            print(f"  {title}: " + ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(5)))
    print_kinds("will be converted", str(out), [note for entry in entries.values() for note in entry.get("notes", [])])
    print_kinds("problems", str(out), [text for entry in entries.values() for text in entry.get("problems", [])])


def _value(entry: dict[str, Any], name: str) -> str:
    if name == "size":
        return f"{entry['width']} x {entry['height']}"
    return f"{entry[name]:.4g}" if name == "fps" else as_line(str(entry[name]))
