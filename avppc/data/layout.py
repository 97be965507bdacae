"""What the folders of a data set say of its videos: which word is spoken, and which split a video belongs to.

    ROOT/WORD/{train,val,test}/FILE      clips of a word (LRW's layout)
    ROOT/.../{train,val,test}/.../FILE   clips without label, of that split
    any other place                      training clips without label

A video in a folder that names a split is never in another one: of several names on its path test goes before val, val
before train. The names may be written otherwise (see SPLIT_NAMES), in capitals, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from avppc.clip import UNLABELED_FOLDER, SplitName
from avppc.data.config import Layout

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

_STRICTEST_FIRST: tuple[SplitName, ...] = ("test", "val", "train")


@dataclass(frozen=True)
class Place:
    """What the place of a video says of it."""

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
