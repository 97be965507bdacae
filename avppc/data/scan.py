"""Finds the videos of a data set, and what their places and its manifest say about them.

    ROOT/WORD/{train,val,test}/FILE      clips of a word (LRW's layout)
    ROOT/.../{train,val,test}/.../FILE   clips without label, of that split
    any other place                      training clips without label

A video in a folder that names a split is never in another one: of several names on its path test goes before val, val
before train. The names may be written otherwise (see SPLIT_NAMES), in capitals, too. A label is the word's number among
the sorted words. Instead of all below ROOT, a list may name the videos: another manifest, or a text file of one path
below ROOT a line.

Nothing outside ROOT is read: links that leave it are refused, and so are paths such as "../x" in a manifest or a list.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from avppc.clip import NO_LABEL, UNLABELED_FOLDER, SplitName
from avppc.data.config import Layout
from avppc.data.manifest import (
    INDEX_COMMAND,
    MANIFEST_NAME,
    NO_SPEAKER,
    Box,
    Entry,
    is_portable,
    number_speakers,
    printable,
    read_list,
    read_manifest,
)
from avppc.data.sound_file import sound_beside, sound_names
from avppc.files import real_path

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".qt", ".f4v", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".ogv"}
VIDEO_SUFFIXES |= {".ogg", ".ogm", ".mpg", ".mpeg", ".vob", ".mod", ".ts", ".mts", ".m2ts", ".tod", ".flv", ".wmv"}
VIDEO_SUFFIXES |= {".asf", ".mxf", ".dv"}

SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Split of the videos in a folder of this name; names are compared without regard to case."""

WORD_FILE_SUFFIXES = (".align", ".textgrid")
"""In small letters; such a file says when the words of a video are spoken (see words.py)."""

_STRICTEST_FIRST: tuple[SplitName, ...] = ("test", "val", "train")
_GRID_NAME = re.compile(r"[blps][bgrw][abiw][a-z][0-9z][anps]")  # the six words of a sentence, a letter each
_GRID_SPEAKER = re.compile(r"s\d{1,2}")
_NUMBERED = re.compile(r"\d{5}")  # a file of LRS3 or VoxCeleb2
_VOXCELEB_SPEAKER = re.compile(r"id\d{5}")
_YOUTUBE = re.compile(r"[\w-]{11}")  # the name of a film there, of which LRS3 has one a speaker


@dataclass(frozen=True)
class SoundFile:
    """A file beside a video that holds its sound, if the video itself has none."""

    name: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class WordSpan:
    """A word inside a video."""

    label: int
    """Index into the words."""
    first: float
    """When it begins, in frames of 1/25 s from the first picture."""
    last: float
    """When it ends, in the same."""


@dataclass(frozen=True)
class Video:
    """A video file, with what its path, the file system and the manifest say of it."""

    path: str
    """Below the data's root, with "/"."""
    split: str
    label: int
    """Index into the words, or -1."""
    speaker: int
    """As the manifest says, or the folders, or -1."""
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
    speaker_name: str = ""
    """The speaker, by name."""
    words: tuple[WordSpan, ...] | None = None
    """The words inside it, in the order of their times; None: it is one word, or none is known."""

    @property
    def sound_path(self) -> str | None:
        """Path of the sound file below the data's root."""
        return None if self.sound is None else PurePosixPath(self.path).with_name(self.sound.name).as_posix()


@dataclass
class Scan:
    """The videos below a root, and what else was found there."""

    words: tuple[str, ...] = ()
    videos: list[Video] = field(default_factory=list)
    """Sorted by path."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Paths that are not even opened, and why."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files of which ending are neither videos nor the manifest, nor share the name of a video beside them;
    and how many hidden folders there are."""
    word_files: list[str] = field(default_factory=list)
    """Paths of the files that may say when the words of a video are spoken (see words.py)."""


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
        found = dict(_files(root, result))
    else:
        if not listed.is_file():
            raise ValueError(f"there is no list of videos {listed}")
        is_manifest = listed.suffix == ".jsonl"
        named = read_manifest(listed) if is_manifest else read_list(listed)
        manifest = {path: entry if is_manifest else manifest.get(path, entry) for path, entry in named.items()}
        found = dict(_listed_files(root, named, result))
    places = find_places(found, root, layout)
    names = {path: entry.speaker_name for path, entry in manifest.items()}
    names = {path: name for path in found if (name := names.get(path) or folder_of_speaker(path))}
    numbers = number_speakers(names)
    only_manifest = not any(folder_of_speaker(path) for path in found)
    result.words = tuple(sorted({place.word for place in places.values() if place.word is not None}))
    labels = {word: label for label, word in enumerate(result.words)}
    for path, (bytes_, mtime_ns, sound) in sorted(found.items()):
        word, split = places[path].word, places[path].split
        entry = manifest.pop(path, Entry())
        if result.words and word is None and split != "train":
            result.refused.append((path, f"no word is known of it, and its folders say {split!r}: not trained on"))
        elif entry.unusable is not None and entry.unusable.still_holds(
            bytes_, clip_frames, None if sound is None else sound.bytes
        ):
            result.refused.append((path, f"left out: {INDEX_COMMAND} has found: {entry.unusable.reason}"))
        else:
            label = NO_LABEL if word is None else labels[word]
            speaker = entry.speaker if only_manifest else numbers.get(path, NO_SPEAKER)
            facts = (split, label, speaker, bytes_, mtime_ns, entry.box, entry.sha256, sound, entry.sound_sha256)
            result.videos.append(Video(path, *facts, names.get(path, "")))
    name = MANIFEST_NAME if listed is None else listed.name
    not_found = manifest.keys() - {path for path, _ in result.refused}
    result.refused += [(path, f"listed in {name}, but there is no such video") for path in not_found]
    result.refused.sort()
    return result


FoundVideo = tuple[str, tuple[int, int, SoundFile | None]]
"""Path below root; bytes and mtime_ns of the video; the sound beside it."""


def _listed_files(root: Path, paths: Iterable[str], result: Scan) -> Iterator[FoundVideo]:
    """As _files, but yields the videos among these paths only."""
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
            yield (
                path,
                (*_size_and_time(place.stat()), None if sound is None else _sound_file(sound.name, sound.stat())),
            )


def _size_and_time(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _sound_file(name: str, status: os.stat_result) -> SoundFile:
    return SoundFile(name, *_size_and_time(status))


def _files(root: Path, result: Scan) -> Iterator[FoundVideo]:
    """Walks through the folders below root and yields each video; everything else goes into the result."""
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
                    yield path, (*_size_and_time(entry.stat()), _sound_in(sounds, os.path.splitext(entry.name)[0]))
                else:
                    stem, suffix = os.path.splitext(entry.name)
                    if is_word_file(entry.name):
                        result.word_files.append(path)
                    elif stem not in beside and path != MANIFEST_NAME:
                        result.others[suffix.lower() or entry.name] += 1
            except OSError as error:  # it is gone by now, say
                result.refused.append((printable(path), f"cannot be read: {error.strerror}"))


def _file_problem(entry: os.DirEntry[str], path: str, inside: Path) -> str | None:
    """Why a video is refused unopened; None where it is not, and for files that are no videos."""
    is_video = _is_video_name(entry.name)
    if (problem := _link_problem(entry, inside, is_video)) is not None or not is_video:
        return problem
    if not is_portable(path):
        return "its name has a backslash"
    if printable(path) != path:
        return "its name is not valid UTF-8"
    return None if entry.is_file() else "not a regular file"


def _sound_in(files: Mapping[str, os.DirEntry[str]], stem: str) -> SoundFile | None:
    """As sound_beside, but looked up among the folder's entries, which saves a system call for each possible name."""
    name = next((name for name in sound_names(stem) if name in files), None)
    return None if name is None else _sound_file(name, files[name].stat())


def _is_video_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith(".")


def is_word_file(name: str) -> bool:
    """Whether a file's name is that of an .align file or a TextGrid."""
    return name.lower().endswith(WORD_FILE_SUFFIXES) and not name.startswith(".")


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


@dataclass(frozen=True)
class Place:
    """Word and split of a video, as its path below the root tells them."""

    word: str | None
    split: SplitName


def find_places(paths: Iterable[str], root: Path, layout: Layout = "auto") -> dict[str, Place]:
    """Word and split of each path below root.

    Args:
        layout: "words": every ROOT/WORD/{train,val,test}/FILE belongs to a word; "tree": no video does; "auto": a
            folder is a word unless there are videos further down in it, or it is the only one and its files are not
            named after it (as WORD_00001.mp4).

    Raises:
        ValueError: "auto", and LRW's layout begins below root; "words", and no video lies in such a place.
    """
    parsed = {path: PurePosixPath(path) for path in paths}
    words = set() if layout == "tree" else _words(list(parsed.values()), layout)
    if not words and parsed and layout == "words":
        raise ValueError(f"layout 'words' needs videos in {root}/WORD/{{train,val,test}}; {min(parsed)} lies elsewhere")
    if not words and layout == "auto":
        _check_not_further_down(parsed.values(), root)
    return {path: _place(parts, words) for path, parts in parsed.items()}


def _place(path: PurePosixPath, words: set[str]) -> Place:
    if path.parts[0] in words and _is_clip_of_word(path):
        return Place(path.parts[0], SPLIT_NAMES[path.parts[1].lower()])
    splits = {_split_of(folder) for folder in path.parts[:-1]}
    return Place(None, next((split for split in _STRICTEST_FIRST if split in splits), "train"))


def _words(paths: Sequence[PurePosixPath], layout: Layout) -> set[str]:
    """The folders right below the root that are words."""
    found = {path.parts[0] for path in paths if _is_clip_of_word(path)}
    if layout == "words":
        return found
    named = {path.parts[0] for path in paths if _is_clip_of_word(path) and _is_named_after(path, path.parts[0])}
    deeper = {path.parts[0] for path in paths if len(path.parts) > 3}
    found = {folder for folder in found if folder in named or (folder not in deeper and _split_of(folder) is None)}
    return found if len(found) > 1 else found & named


def _is_clip_of_word(path: PurePosixPath) -> bool:
    """Whether a path has the form WORD/SPLIT/FILE."""
    parts = path.parts
    return len(parts) == 3 and _split_of(parts[1]) is not None and parts[0] != UNLABELED_FOLDER and parts[0][0] != "."


def _is_named_after(path: PurePosixPath, folder: str) -> bool:
    return path.name.startswith(f"{folder}_")


def _split_of(folder: str) -> SplitName | None:
    return SPLIT_NAMES.get(folder.lower())


def _check_not_further_down(paths: Iterable[PurePosixPath], root: Path) -> None:
    """ValueError where all the words of LRW's layout lie in a folder below root: they would lose their labels."""
    for path in sorted(paths):
        parts = path.parts
        if (
            len(parts) > 3
            and parts[0] != UNLABELED_FOLDER
            and _split_of(parts[-2])
            and _is_named_after(path, parts[-3])
        ):
            raise ValueError(
                f"{root} has LRW's layout further down ({path}): pass --data {root.joinpath(*parts[:-3])} for its "
                "words, or --layout tree to take all videos without labels"
            )


def names_split(path: str) -> bool:
    """Whether a folder on the way to a video has the name of a split."""
    return any(_split_of(folder) is not None for folder in PurePosixPath(path).parts[:-1])


def folder_of_speaker(path: str) -> str:
    """The folder that names the speaker: s1 in s1/bbaf2n.mpg (GRID), id00012 in id00012/FILM/00001.mp4
    (VoxCeleb2), the film in FILM/00001.mp4 (LRS3); "" where the path is of another kind."""
    parts = PurePosixPath(path).parts
    folders, stem = parts[:-1], PurePosixPath(path).stem
    if _GRID_NAME.fullmatch(stem):
        return next((folder for folder in reversed(folders) if _GRID_SPEAKER.fullmatch(folder)), "")
    if _NUMBERED.fullmatch(stem):
        if len(folders) > 1 and _VOXCELEB_SPEAKER.fullmatch(folders[-2]):
            return folders[-2]
        return folders[-1] if folders and _YOUTUBE.fullmatch(folders[-1]) else ""
    return ""
