"""Finds the videos of a data set, and what their places and its manifest say about them.

What the folders mean is in avppc/data/layout.py; the label of a clip is its word's number among the sorted words.

    ROOT/manifest.jsonl   optional, a line a video: {"path": ..., "speaker": 3, "box": [9, 8, 105, 104]}

"speaker" (or "face") is a number or a name, "box" the left, top, right and bottom of the mouth in pixels of the picture
as it is shown; `avppc index` adds what it finds in the files: "usable", false where they give no clip, "sha256", their
checksum, and "sound_sha256", that of the sound file beside a video that has no sound itself. Instead of all below ROOT,
a list may name the videos: another manifest, or a text file of one path below ROOT a line.

Nothing outside ROOT is read: links that leave it are refused, and so are paths such as "../x" in a manifest or a list.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from avppc.clip import NO_LABEL
from avppc.data.config import Layout
from avppc.data.layout import find_places
from avppc.data.sound_file import sound_beside, sound_names
from avppc.files import parse_json, real_path

MANIFEST_NAME = "manifest.jsonl"
INDEX_COMMAND = "`avppc index`"
NO_SPEAKER = -1
_SHA256 = re.compile("[0-9a-f]{64}")
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".qt", ".f4v", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".ogv"}
VIDEO_SUFFIXES |= {".ogg", ".ogm", ".mpg", ".mpeg", ".vob", ".mod", ".ts", ".mts", ".m2ts", ".tod", ".flv", ".wmv"}
VIDEO_SUFFIXES |= {".asf", ".mxf", ".dv"}

Box = tuple[int, int, int, int]
"""Left, top, and the column and row after the last, in pixels of the picture as it is shown."""


@dataclass(frozen=True)
class Unusable:
    """Why a video gives no clip, and what must still hold for that."""

    reason: str
    bytes: int
    """Size of the file."""
    clip_frames: int
    """Frames a clip needs."""
    sound_bytes: int | None
    """Size of the sound file beside it, if there was any."""


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a video."""

    speaker: int = NO_SPEAKER
    box: Box | None = None
    sha256: str | None = None
    """Of the file, when it was listed."""
    unusable: Unusable | None = None
    sound_sha256: str | None = None
    """Of the sound file beside it, where the video has no sound itself."""


@dataclass(frozen=True)
class SoundFile:
    """A file beside a video that holds its sound, if the video itself has none."""

    name: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Video:
    """One file to be decoded."""

    path: str
    """Below the data's root, with "/"."""
    split: str
    label: int
    """Index into the words, or -1."""
    speaker: int
    """As the manifest says, or -1."""
    bytes: int
    mtime_ns: int
    box: Box | None = None
    """Where the manifest says that the mouth is."""
    sha256: str | None = None
    """What the manifest says of the file's content."""
    sound: SoundFile | None = None
    """Beside it, whether it is needed or not."""
    sound_sha256: str | None = None
    """What the manifest says of the sound's content."""

    @property
    def sound_path(self) -> str | None:
        """Of the sound file, below the data's root."""
        return None if self.sound is None else PurePosixPath(self.path).with_name(self.sound.name).as_posix()


@dataclass
class Scan:
    """What lies below a root."""

    words: tuple[str, ...] = ()
    videos: list[Video] = field(default_factory=list)
    """Sorted by path."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Paths that are not even opened, and why."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files of which ending are neither videos nor the manifest, nor share the name of a video beside them;
    and how many hidden folders there are."""


def scan(root: Path, listed: Path | None = None, clip_frames: int | None = None, layout: Layout = "auto") -> Scan:
    """Lists the videos below a root, in the same order on every machine.

    Args:
        listed: a manifest or a text file of paths below root; only these are taken.
        clip_frames: refuse what the manifest says to give no clip of so many frames; None: take it all the same.
        layout: which folders are words, see find_places.

    Raises:
        ValueError: root is not a folder, or does not have the layout, or a manifest or list is damaged or names paths
            outside root.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    manifest = read_manifest(root / MANIFEST_NAME)
    result = Scan()
    if listed is None:
        files = _files(root, result)
    else:
        if not listed.is_file():
            raise ValueError(f"there is no list of videos {listed}")
        if listed.suffix == ".jsonl":
            named = read_manifest(listed)
            manifest |= named
        else:
            named = read_list(listed)
        manifest = {path: manifest.get(path, Entry()) for path in named}
        files = _listed_files(root, named, result)
    found = dict(files)
    places = find_places(found, root, layout)
    result.words = tuple(sorted({place.word for place in places.values() if place.word is not None}))
    labels = {word: label for label, word in enumerate(result.words)}
    for path, (status, sound) in sorted(found.items()):
        word, split = places[path].word, places[path].split
        label = NO_LABEL if word is None else labels[word]
        entry = manifest.pop(path, Entry())
        no_use = entry.unusable
        if result.words and word is None and split != "train":
            result.refused.append((path, f"no word is known of it, and its folders say {split!r}: not trained on"))
        elif no_use is not None and (no_use.bytes, no_use.clip_frames, no_use.sound_bytes) == (
            status[0],
            clip_frames,
            None if sound is None else sound.bytes,
        ):
            result.refused.append((path, f"left out: {INDEX_COMMAND} has found: {no_use.reason}"))
        else:
            result.videos.append(
                Video(path, split, label, entry.speaker, *status, entry.box, entry.sha256, sound, entry.sound_sha256)
            )
    listed_only = set(manifest) - {path for path, _ in result.refused}
    name = MANIFEST_NAME if listed is None else listed.name
    result.refused += [(path, f"listed in {name}, but there is no such video") for path in listed_only]
    result.refused.sort()
    return result


def read_manifest(path: Path) -> dict[str, Entry]:
    """What a manifest says of each path it lists; empty where there is none.

    Raises:
        ValueError: a line is damaged, or names a path outside the manifest's folder; it tells which line.
    """
    lines = read_manifest_lines(path)
    speakers = {name: _speaker(path, number, entry) for name, (number, entry) in lines.items()}
    names = sorted({str(speaker) for speaker in speakers.values() if speaker is not None})
    named = any(isinstance(speaker, str) for speaker in speakers.values())
    numbers = {name: number for number, name in enumerate(names)}
    found = {}
    for name, (number, entry) in lines.items():
        speaker = speakers[name]
        if speaker is None:
            speaker = NO_SPEAKER
        elif named:
            speaker = numbers[str(speaker)]
        found[name] = Entry(
            int(speaker),
            _box(path, number, entry),
            _sha256(path, number, entry, "sha256"),
            _unusable(path, number, entry),
            _sha256(path, number, entry, "sound_sha256"),
        )
    return found


def read_manifest_lines(path: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Number and content of the line of each path that a manifest lists; empty where there is none."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise _line_error(path, number, error) from error
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise _line_error(path, number, 'expected an object with a "path"')
            found[_safe_path(path, number, entry["path"])] = (number, entry)
    return found


def read_list(path: Path) -> dict[str, Entry]:
    """The paths in a text file, one a line; ValueError that tells the line where one is not below the data's folder."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list of videos: {error}") from error
    named = ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip())
    return {_safe_path(path, number, line): Entry() for number, line in named}


def _line_error(path: Path, number: int, problem: object) -> ValueError:
    return ValueError(f"{path}, line {number}: {problem}")


def _safe_path(manifest: Path, number: int, text: str) -> str:
    path = PurePosixPath(text)
    if printable(text) != text:
        raise _line_error(manifest, number, f"path must be valid UTF-8, got {text!r}")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in text or not is_portable(text):
        raise _line_error(manifest, number, f"path must lie below the data's folder, without '..'; got {text!r}")
    return path.as_posix()


def _speaker(manifest: Path, number: int, entry: dict[str, Any]) -> int | str | None:
    speaker = entry.get("speaker", entry.get("face"))
    if isinstance(speaker, bool) or not isinstance(speaker, (int, str, type(None))):
        raise _line_error(manifest, number, f"speaker must be a number or a name, got {speaker!r}")
    if isinstance(speaker, int) and not 0 <= speaker < 1 << 63:
        raise _line_error(manifest, number, f"speaker must be at least 0, got {speaker}")
    return speaker


def _box(manifest: Path, number: int, entry: dict[str, Any]) -> Box | None:
    box = entry.get("box")
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or any(type(side) is not int for side in box):
        raise _line_error(manifest, number, f"box must be [left, top, right, bottom] in whole pixels, got {box!r}")
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 << 16 and 0 <= top < bottom <= 1 << 16):
        raise _line_error(manifest, number, f"box must have 0 <= left < right and 0 <= top < bottom, got {box}")
    return left, top, right, bottom


def _sha256(manifest: Path, number: int, entry: dict[str, Any], name: str) -> str | None:
    digest = entry.get(name)
    if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise _line_error(manifest, number, f"{name} must be 64 hexadecimal digits, got {digest!r}")
    return digest


def _unusable(manifest: Path, number: int, entry: dict[str, Any]) -> Unusable | None:
    usable = entry.get("usable", True)
    if usable is True:
        return None
    size, frames, problems = (entry.get(name) for name in ("bytes", "clip_frames", "problems"))
    if usable is not False or type(size) is not int or type(frames) is not int or not isinstance(problems, list):
        problem = f"usable must be true, or false beside the bytes, clip_frames and problems of {INDEX_COMMAND}"
        raise _line_error(manifest, number, f"{problem}; got {usable!r}")
    sound = entry.get("sound_bytes")
    if sound is not None and type(sound) is not int:
        raise _line_error(manifest, number, f"sound_bytes must be a whole number, got {sound!r}")
    return Unusable(str(problems[0]) if problems else "nothing said", size, frames, sound)


Found = tuple[str, tuple[tuple[int, int], SoundFile | None]]
"""Path below root; size and time of the video; the sound beside it."""


def _listed_files(root: Path, paths: Iterable[str], result: Scan) -> Iterator[Found]:
    """As _files, of the given paths only."""
    inside = real_path(root)
    for path in paths:
        place = root / path
        try:
            os.lstat(place)
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                result.refused.append((path, f"cannot be read: {error.strerror}"))
            continue
        if not real_path(place).is_relative_to(inside):
            result.refused.append((path, "a link that leaves the data's folder is not followed"))
        elif not place.is_file():
            result.refused.append((path, "not a regular file"))
        elif place.suffix.lower() not in VIDEO_SUFFIXES:
            result.refused.append((path, f"not the name of a video ({', '.join(sorted(VIDEO_SUFFIXES))})"))
        else:
            sound = sound_beside(place)
            yield path, (_size_and_time(place.stat()), None if sound is None else _sound_file(sound.name, sound.stat()))


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _sound_file(name: str, status: os.stat_result) -> SoundFile:
    return SoundFile(name, *_size_and_time(status))


def _files(root: Path, result: Scan) -> Iterator[Found]:
    """Each video; everything else goes into the result."""
    inside = real_path(root)
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            if not folder:
                raise
            result.refused.append((printable(folder), f"a folder that cannot be read: {error.strerror}"))
            continue
        sounds = {entry.name: entry for entry in entries if entry.is_file(follow_symlinks=False)}
        beside = {os.path.splitext(entry.name)[0] for entry in entries if _is_video_name(entry.name)}
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name.startswith(".") or entry.name == "lost+found":
                    result.others["hidden folders" if entry.name.startswith(".") else entry.name] += 1
                else:
                    pending.append(path)
                continue
            try:
                if (problem := _file_problem(entry, path, inside)) is not None:
                    result.refused.append((printable(path), problem))
                elif _is_video_name(entry.name):
                    yield path, (_size_and_time(entry.stat()), _sound_in(sounds, os.path.splitext(entry.name)[0]))
                else:
                    stem, suffix = os.path.splitext(entry.name)
                    if stem not in beside and path != MANIFEST_NAME:
                        result.others[suffix.lower() or entry.name] += 1
            except OSError as error:  # it is gone by now, say
                result.refused.append((printable(path), f"cannot be read: {error.strerror}"))


def _file_problem(entry: os.DirEntry[str], path: str, inside: Path) -> str | None:
    """Why a file is not even opened; None for videos, and for all else that is left alone."""
    is_video = _is_video_name(entry.name)
    if (problem := _link_problem(entry, inside, is_video)) is not None or not is_video:
        return problem
    if not is_portable(path):
        return "its name has a backslash"
    if printable(path) != path:
        return "its name is not valid UTF-8"
    return None if entry.is_file() else "not a regular file"


def _sound_in(files: Mapping[str, os.DirEntry[str]], stem: str) -> SoundFile | None:
    """As sound_beside, without asking for each name that there may be."""
    name = next((name for name in sound_names(stem) if name in files), None)
    return None if name is None else _sound_file(name, files[name].stat())


def _is_video_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith(".")


def _link_problem(entry: os.DirEntry[str], inside: Path, is_video: bool) -> str | None:
    if not entry.is_symlink():
        return None
    target = real_path(Path(entry.path))
    if target.is_dir():  # DirEntry's own raises where links go round
        return "a link to a folder is not followed"
    if not is_video:
        return None
    if not target.is_relative_to(inside):
        return "a link that leaves the data's folder is not followed"
    return None if target.is_file() else "a link to nothing"


def is_portable(path: str) -> bool:
    """Whether a path means the same on every system: a manifest names no other."""
    return "\\" not in path


def printable(path: str) -> str:
    """The path as valid UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()
