"""The manifest of a data set: what a file beside the videos says of each of them.

    ROOT/manifest.jsonl   optional, a line a video: {"path": ..., "speaker": 3, "box": [9, 8, 105, 104]}

"speaker" (or "face") is a number or a name, "box" the left, top, right and bottom of the mouth in pixels of the picture
as it is shown; `avppc index` adds what it finds in the files: "usable", false where they give no clip, "sha256", their
checksum, and "sound_sha256", that of the sound file beside a video that has no sound itself.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from avppc.files import name_in_errors, parse_json

MANIFEST_NAME = "manifest.jsonl"
INDEX_COMMAND = "`avppc index`"
NO_SPEAKER = -1
_SHA256 = re.compile("[0-9a-f]{64}")

Box = tuple[int, int, int, int]
"""Left, top, and the column and row after the last, in pixels of the picture as it is shown."""


@dataclass(frozen=True)
class Unusable:
    """Why `avppc index` found that a video gives no clip, and the facts on which that depends."""

    reason: str
    bytes: int
    """Size of the file."""
    clip_frames: int
    """Frames a clip needs."""
    sound_bytes: int | None
    """Size of the sound file beside it, if there was any."""

    def still_holds(self, bytes: int, clip_frames: int | None, sound_bytes: int | None) -> bool:
        """Whether the files are as large as they were, and a clip needs as many frames."""
        return (self.bytes, self.clip_frames, self.sound_bytes) == (bytes, clip_frames, sound_bytes)


@dataclass(frozen=True)
class Entry:
    """A manifest's line about a video."""

    speaker: int = NO_SPEAKER
    speaker_name: str = ""
    """The speaker as the manifest spells it."""
    box: Box | None = None
    sha256: str | None = None
    """Of the file, when it was listed."""
    unusable: Unusable | None = None
    sound_sha256: str | None = None
    """Of the sound file beside it, where the video has no sound itself."""


def read_manifest(path: Path) -> dict[str, Entry]:
    """What a manifest says of each path it lists; empty where there is none.

    Raises:
        ValueError: a line is damaged, or names a path outside the manifest's folder; it tells which line.
    """
    entries: dict[str, Entry] = {}
    speakers: dict[str, int | str] = {}
    for name, (number, line) in read_manifest_lines(path).items():
        with _line_in_errors(path, number):
            if (speaker := _speaker(line)) is not None:
                speakers[name] = speaker
            entries[name] = Entry(
                box=_box(line),
                sha256=_sha256(line, "sha256"),
                unusable=_unusable(line),
                sound_sha256=_sha256(line, "sound_sha256"),
            )
    for name, number in number_speakers(speakers).items():
        entries[name] = replace(entries[name], speaker=number, speaker_name=str(speakers[name]))
    return entries


def read_manifest_lines(path: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Number and content of the line of each path that a manifest lists; empty where there is none."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    if not path.is_file():
        return found
    with name_in_errors(path), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with _line_in_errors(path, number):
                entry = parse_json(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                    raise ValueError('expected an object with a "path"')
                found[_safe_path(entry["path"])] = (number, entry)
    return found


def read_list(path: Path) -> dict[str, Entry]:
    """The paths in a text file, one a line; ValueError that tells the line where one is not below the data's folder."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list of videos: {error}") from error
    found: dict[str, Entry] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            with _line_in_errors(path, number):
                found[_safe_path(line.removesuffix("\r"))] = Entry()
    return found


@contextlib.contextmanager
def _line_in_errors(path: Path, number: int) -> Iterator[None]:
    """Puts the file's name and the number of the line before the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _safe_path(text: str) -> str:
    path = PurePosixPath(text)
    if printable(text) != text:
        raise ValueError(f"path must be valid UTF-8, got {text!r}")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in text or not is_portable(text):
        raise ValueError(f"path must lie below the data's folder, without '..'; got {text!r}")
    return path.as_posix()


def number_speakers(speakers: Mapping[str, int | str]) -> dict[str, int]:
    """The speaker of each path as a number: as it is, or where one of them has a name, its place among all names,
    sorted."""
    if not any(isinstance(speaker, str) for speaker in speakers.values()):
        return {path: int(speaker) for path, speaker in speakers.items()}
    numbers = {name: number for number, name in enumerate(sorted(set(map(str, speakers.values()))))}
    return {path: numbers[str(speaker)] for path, speaker in speakers.items()}


def _speaker(entry: dict[str, Any]) -> int | str | None:
    speaker = entry.get("speaker", entry.get("face"))
    if isinstance(speaker, bool) or not isinstance(speaker, (int, str, type(None))):
        raise ValueError(f"speaker must be a number or a name, got {speaker!r}")
    if isinstance(speaker, int) and not 0 <= speaker < 1 << 63:
        raise ValueError(f"speaker must be at least 0, got {speaker}")
    return speaker


def _box(entry: dict[str, Any]) -> Box | None:
    box = entry.get("box")
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or any(type(side) is not int for side in box):
        raise ValueError(f"box must be [left, top, right, bottom] in whole pixels, got {box!r}")
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 << 16 and 0 <= top < bottom <= 1 << 16):
        raise ValueError(f"box must have 0 <= left < right and 0 <= top < bottom, got {box}")
    return left, top, right, bottom


def _sha256(entry: dict[str, Any], name: str) -> str | None:
    digest = entry.get(name)
    if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise ValueError(f"{name} must be 64 hexadecimal digits, got {digest!r}")
    return digest


def _unusable(entry: dict[str, Any]) -> Unusable | None:
    usable = entry.get("usable", True)
    if usable is True:
        return None
    size, frames, problems = (entry.get(name) for name in ("bytes", "clip_frames", "problems"))
    if usable is not False or type(size) is not int or type(frames) is not int or not isinstance(problems, list):
        problem = f"usable must be true, or false beside the bytes, clip_frames and problems of {INDEX_COMMAND}"
        raise ValueError(f"{problem}; got {usable!r}")
    sound = entry.get("sound_bytes")
    if sound is not None and type(sound) is not int:
        raise ValueError(f"sound_bytes must be a whole number, got {sound!r}")
    return Unusable(str(problems[0]) if problems else "nothing said", size, frames, sound)


def is_portable(path: str) -> bool:
    """Whether a path means the same on every system (no backslash): manifests name no others."""
    return "\\" not in path


def printable(path: str) -> str:
    """The path with escapes in place of what is not valid UTF-8, as file names on Linux may hold."""
    return path.encode("utf-8", "backslashreplace").decode()
