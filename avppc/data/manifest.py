"""Finds the videos of a data set, and what their places and its manifest say about them.

    ROOT/WORD/{train,val,test}/*.mp4     labelled: the label is WORD's number among the sorted words (LRW's layout)
    ROOT/_UNLABELED/**                   training clips without label
    any other tree                       training clips without label
    ROOT/manifest.jsonl                  optional: {"path": ..., "speaker": 3} or {"path": ..., "face": 3} a line

Nothing outside ROOT is read: links that leave it are refused, and so are paths such as "../x" in the manifest.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from avppc.clip import NO_LABEL
from avppc.data.packed import SPLITS

MANIFEST_NAME = "manifest.jsonl"
UNLABELED_FOLDER = "_UNLABELED"
NO_SPEAKER = -1
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv"}
VIDEO_SUFFIXES |= {".ogg", ".flv", ".wmv", ".3gp"}


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


@dataclass
class Scan:
    """What lies below a root."""

    words: tuple[str, ...] = ()
    videos: list[Video] = field(default_factory=list)
    """Sorted by path."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Paths that are not even opened, and why."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files of which ending are no videos."""


def scan(root: Path) -> Scan:
    """Lists the videos below a root, in the same order on every machine.

    Raises:
        ValueError: root is not a folder, or holds LRW's layout one level further down (a test split would be trained
            on), or its manifest is damaged or names paths outside root.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    speakers = read_speakers(root / MANIFEST_NAME)
    result = Scan()
    found = []
    for path, status in _files(root, result):
        place = _place(PurePosixPath(path), root)
        found.append((path, place, status))
    result.words = tuple(sorted({word for _, (word, _), _ in found if word is not None}))
    labels = {word: label for label, word in enumerate(result.words)}
    for path, (word, split), status in sorted(found):
        label = NO_LABEL if word is None else labels[word]
        speaker = speakers.pop(path, NO_SPEAKER)
        result.videos.append(Video(path, split, label, speaker, status[0], status[1]))
    listed_only = set(speakers) - {path for path, _ in result.refused}
    result.refused += [(path, f"listed in {MANIFEST_NAME}, but there is no such video") for path in listed_only]
    result.refused.sort()
    return result


def read_speakers(path: Path) -> dict[str, int]:
    """Number of the speaker of each path that a manifest lists, -1 where it says none; empty where there is none."""
    if not path.is_file():
        return {}
    raw: dict[str, int | str | None] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, speaker = _manifest_line(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            raw[name] = speaker
    if all(isinstance(speaker, int) for speaker in raw.values() if speaker is not None):
        return {name: NO_SPEAKER if speaker is None else int(speaker) for name, speaker in raw.items()}
    numbers = {name: number for number, name in enumerate(sorted({str(s) for s in raw.values() if s is not None}))}
    return {name: NO_SPEAKER if speaker is None else numbers[str(speaker)] for name, speaker in raw.items()}


def _manifest_line(entry: Any) -> tuple[str, int | str | None]:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError('expected an object with a "path"')
    path = PurePosixPath(entry["path"])
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in entry["path"] or "\\" in entry["path"]:
        raise ValueError(f"path must lie below the manifest's folder, without '..'; got {entry['path']!r}")
    speaker = entry.get("speaker", entry.get("face"))
    if isinstance(speaker, bool) or not isinstance(speaker, (int, str, type(None))):
        raise ValueError(f"speaker must be a number or a name, got {speaker!r}")
    if isinstance(speaker, int) and not 0 <= speaker < 1 << 63:
        raise ValueError(f"speaker must be at least 0, got {speaker}")
    return path.as_posix(), speaker


def _files(root: Path, result: Scan) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path below root, size and time of each video; all that is something else goes into the result."""
    inside = root.resolve()
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                is_video = suffix in VIDEO_SUFFIXES and not entry.name.startswith(".")
                problem = _link_problem(entry, inside, is_video)
                if problem is not None:
                    result.refused.append((printable(path), problem))
                elif not is_video:
                    result.others[suffix or entry.name] += 1
                elif printable(path) != path:
                    result.refused.append((printable(path), "its name is not valid UTF-8"))
                elif not entry.is_file():
                    result.refused.append((path, "not a regular file"))
                else:
                    status = entry.stat()
                    yield path, (status.st_size, status.st_mtime_ns)


def _link_problem(entry: os.DirEntry[str], inside: Path, is_video: bool) -> str | None:
    if not entry.is_symlink():
        return None
    target = Path(entry.path).resolve()
    if entry.is_dir():
        return "a link to a folder is not followed"
    if not is_video:
        return None
    if not target.is_relative_to(inside):
        return "a link that leaves the data's folder is not followed"
    return None if target.is_file() else "a link to nothing"


def _place(path: PurePosixPath, root: Path) -> tuple[str | None, str]:
    """Word and split of a path."""
    parts = path.parts
    if parts[0] == UNLABELED_FOLDER:
        return None, "train"
    if len(parts) == 3 and parts[1] in SPLITS:
        return parts[0], parts[1]
    if len(parts) > 3 and parts[-2] in SPLITS:
        raise ValueError(f"{root} has LRW's layout further down ({path}): pass {root.joinpath(*parts[:-3])}")
    return None, "train"


def printable(path: str) -> str:
    """The path as valid UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()
