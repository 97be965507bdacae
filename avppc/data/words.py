"""Files that say when each word is spoken, and of which video: tables, GRID's .align files, Praat's TextGrids.

    clip     start_frame  end_frame  word      a table, tab or comma; perhaps also split and speaker
    bbaf2n   23.75        29.5       bin

    23750 29500 bin                            an .align file, in 1/25000 s

A row that is wrong is refused with its line, and does not keep the others out; a table that is none is a ValueError.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from avppc.clip import VIDEO_FPS
from avppc.data.config import SharedWork
from avppc.data.scan import VIDEO_SUFFIXES, Scan, Video, folder_of_speaker, is_word_file
from avppc.files import read_bytes

_ALIGN_UNITS_PER_FRAME = 25_000 / VIDEO_FPS  # GRID counts 1/25000 s
_TIMES = (("start_frame", "end_frame", 1.0), ("start_seconds", "end_seconds", float(VIDEO_FPS)))
_HEADER = "clip, start_frame and end_frame (or start_seconds and end_seconds), word, and perhaps split and speaker"
_MAX_FRAMES = 24 * 3600 * VIDEO_FPS
_MAX_LETTERS = 100  # of a word
_NO_VIDEO = "there is no such video"
_TIERS = ("words", "word")
_TOKEN = re.compile(r'"((?:[^"]|"")*)"|(?<!\S)([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?!\S)|(?<!\S)(<\w+>)(?!\S)|!.*')


@dataclass(frozen=True, slots=True)
class Word:
    """A word in a recording, as a file says."""

    clip: str
    """Name of the recording, as the file spells it."""
    first: float
    """When the word begins, in frames of 1/25 s from the recording's first picture."""
    last: float
    """When it ends, in the same."""
    text: str
    origin: str
    """The file, and the line in it."""
    split: str = ""
    speaker: str = ""


@dataclass
class WordList:
    """What was read."""

    words: list[Word] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Name of a recording, and why a word of it is left out."""
    ignored: int = 0
    """Pauses and what else was to be left out."""
    has_splits: bool = False
    """Whether a table says to which split each recording belongs."""
    source: str = ""
    """What was read, in words."""
    unused: int = 0
    """Files of words, or recordings of a table that a list of videos leaves out, without a video here."""

    def add(self, word: Word, ignore: frozenset[str]) -> None:
        """Takes a word, unless it is to be ignored or wrong."""
        if word.text.casefold() in ignore:
            self.ignored += 1
        elif problem := _problem(word):
            self.refused.append((word.clip, f"{problem}: {word.text!r}, {word.origin}"))
        else:
            self.words.append(word)


def _problem(word: Word) -> str:
    """What is wrong with a word, "" where nothing is."""
    if not word.text:
        return "word without a text"
    if not word.text.isprintable():
        return "word with characters that cannot be printed"
    if len(word.text) > _MAX_LETTERS:
        return f"word of more than {_MAX_LETTERS} characters"
    if not (math.isfinite(word.first) and math.isfinite(word.last)):
        return "word whose time is no number"
    if not word.first < word.last:
        return "word that does not end after it begins"
    if word.first < 0 or word.last > _MAX_FRAMES:
        return "word outside any recording"
    return ""


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; ValueError for others, OSError as usual."""
    content = read_bytes(path)
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} in line {line}" if error.start < len(content) else "an odd length"
        raise ValueError(f"{path} must be text in UTF-8, or UTF-16 with a byte order mark; it has {found}") from error
    if "\0" in text:
        raise ValueError(f"{path} must be text, it has zero bytes")
    return text


def _clean(text: str) -> str:
    """One spelling for texts that look the same."""
    return unicodedata.normalize("NFC", text.strip())


def read_table(path: Path, ignore: frozenset[str] = frozenset()) -> WordList:
    """The words of a table; its first line names the columns, of which others than ours are not looked at.

    Args:
        ignore: words to leave out, in small letters.

    Raises:
        ValueError: the file is no such table; the text says what is missing.
    """
    text = text_of(path)
    if not text.strip():
        raise ValueError(f"{path} is empty: a table of words has a line with the columns {_HEADER}")
    line = text.partition("\n")[0]
    rows = _rows(path, text, "\t" if "\t" in line else ",")
    header = [name.strip().casefold() for name in next(rows)[1]]
    start, end, frames_per_unit = _columns(path, header, line)
    found = WordList(has_splits="split" in header)
    places = {name: header.index(name) for name in ("clip", "word", start, end, "split", "speaker") if name in header}
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        origin = f"{path.name}, line {number}"
        if len(row) != len(header):
            name = row[places["clip"]].strip() if places["clip"] < len(row) else path.name
            problem = f"row of {len(row)} columns in a table of {len(header)}"
            found.refused.append((_clean(name) or path.name, f"{problem}: {origin}"))
            continue
        cells = {name: _clean(row[place]) for name, place in places.items()}
        first, last = (round(_number(cells[name]) * frames_per_unit, 6) for name in (start, end))
        if not cells["clip"]:
            found.refused.append((path.name, f"row without a clip: {origin}"))
            continue
        others = (cells.get("split", ""), cells.get("speaker", ""))
        found.add(Word(cells["clip"], first, last, cells["word"], origin, *others), ignore)
    if not (found.words or found.refused or found.ignored):
        raise ValueError(f"{path} has a header and no rows")
    return found


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, and the line in which each of them ends."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
        yield rows.line_num, row


def _columns(path: Path, header: Sequence[str], line: str) -> tuple[str, str, float]:
    """The columns of the times, and how many frames a unit of them is."""
    given = [times for times in _TIMES if {*times[:2]} <= {*header}]
    if {"clip", "word"} <= {*header} and len(given) == 1 and len({*header}) == len(header):
        return given[0]
    if len({*header}) < len(header):
        problem = "it has a column twice"
    elif len(given) > 1:
        problem = "it has frames and seconds, of which one is needed"
    elif ";" in line or "|" in line:
        problem = "columns are separated by tabs or commas"
    else:
        missing = [name for name in ("clip", "word") if name not in header]
        missing += [] if given else ["start_frame and end_frame or start_seconds and end_seconds"]
        problem = f"it lacks {', '.join(missing)}"
    raise ValueError(f"{path}: the first line must name the columns {_HEADER}; it is {line[:80]!r}: {problem}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_word_file(path: Path, ignore: frozenset[str] = frozenset()) -> WordList:
    """The words of one recording, whose name is the file's without its ending: an .align or a .TextGrid file.

    Raises:
        ValueError: the file is none; the text says why. OSError: it cannot be read.
    """
    text = text_of(path)
    found = WordList()
    for first, last, word, place in _align(path, text) if path.suffix.lower() == ".align" else _text_grid(path, text):
        found.add(Word(path.stem, first, last, word, f"{path.name}, {place}"), ignore)
    return found


def _align(path: Path, text: str) -> Iterator[tuple[float, float, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 3:
            raise ValueError(f"{path.name}, line {number}: must be a start, an end and a word, got {line[:80]!r}")
        first, last = (_number(cell) / _ALIGN_UNITS_PER_FRAME for cell in cells[:2])
        yield first, last, _clean(cells[2]), f"line {number}"


def _text_grid(path: Path, text: str) -> Iterator[tuple[float, float, str, str]]:
    """The intervals of the tier of words that have a text.

    Praat's long and short format are the same row of texts in quotes, lone numbers and flags; all else is a remark.
    """
    if "ooTextFile" not in text[:100]:
        raise ValueError(f"{path.name} must begin with ooTextFile, as Praat's text files do")
    tokens = [match for match in _TOKEN.finditer(text) if not match[0].startswith("!")]
    values: list[str | float] = []
    for match in tokens:
        if match[1] is not None:
            values.append(match[1].replace('""', '"'))
        elif match[2] is not None:
            values.append(float(match[2]))
    try:
        tiers = _tiers(values)
    except (IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"{path.name} is no TextGrid, or is cut off: {error}") from error
    named = [name for name in tiers if name.casefold() in _TIERS or name.casefold().endswith((" words", " word"))]
    chosen = named or list(tiers)
    if len(chosen) != 1:
        have = ", ".join(map(repr, tiers)) or "none"
        raise ValueError(f"{path.name} must have one tier of intervals, or one named 'words'; it has {have}")
    for number, (first, last, word) in enumerate(tiers[chosen[0]], 1):
        if word.strip():
            yield round(first * VIDEO_FPS, 6), round(last * VIDEO_FPS, 6), _clean(word), f"interval {number}"


def _tiers(values: Sequence[str | float]) -> dict[str, list[tuple[float, float, str]]]:
    """Name and intervals of each tier of intervals; errors where the values are not those of a TextGrid."""
    place = values.index("TextGrid") + 3  # behind it, start and end of the whole
    tiers: dict[str, list[tuple[float, float, str]]] = {}

    def take(kind: type[str] | type[float]) -> str | float:
        nonlocal place
        value = values[place]
        if not isinstance(value, kind):
            raise ValueError(f"a {'text' if kind is str else 'number'} was expected, got {value!r}")
        place += 1
        return value

    def take_count() -> int:
        number = float(take(float))
        if not number.is_integer() or number < 0:
            raise ValueError(f"a number of tiers or intervals was expected, got {number:g}")
        return int(number)

    for _ in range(take_count()):
        kind, name = str(take(str)), str(take(str))
        take(float), take(float)
        intervals = []
        for _ in range(take_count()):
            if kind == "IntervalTier":
                intervals.append((float(take(float)), float(take(float)), str(take(str))))
            else:
                take(float), take(str)
        if kind == "IntervalTier":
            tiers[name if name not in tiers else f"{name} {len(tiers)}"] = intervals
    return tiers


def words_of_videos(found: Scan, config: SharedWork) -> tuple[dict[str, list[Word]], WordList]:
    """The words of each video that has some, by its path, and what else there was to read.

    Raises:
        ValueError: the words' file is none, or there are files of two kinds. OSError: it cannot be read.
    """
    ignore = frozenset(word.strip().casefold() for word in config.words_ignore)
    videos = {video.path: video for video in found.videos}
    if config.words is not None and not config.words.exists():
        raise ValueError(f"there is no table or folder of words {config.words}")
    if config.words is not None and config.words.is_file() and not is_word_file(config.words.name):
        listed = read_table(config.words, ignore)
        listed.source = f"the table {config.words}"
        return _match_rows(listed, videos, config.paths is not None), listed
    root, names = config.data, found.word_files
    if config.words is not None:
        root = config.words if config.words.is_dir() else config.words.parent
        files = config.words.rglob("*") if config.words.is_dir() else [config.words]
        names = [file.relative_to(root).as_posix() for file in files if is_word_file(file.name) and file.is_file()]
    kinds = {PurePosixPath(name).suffix.lower() for name in names}
    if len(kinds) != 1:
        have = (
            "both .align and .TextGrid files: give the folder of one kind" if kinds else "no .align or .TextGrid file"
        )
        raise ValueError(f"{root} has {have}, words")
    kind = "GRID's .align" if kinds == {".align"} else ".TextGrid"
    listed = WordList(source=f"{len(names):,} {kind} files below {root}")
    return {
        path: _read_one(root, path, name, listed, ignore) for path, name in _match_files(names, videos, listed)
    }, listed


def _read_one(root: Path, path: str, name: str, listed: WordList, ignore: frozenset[str]) -> list[Word]:
    """The words of a video by their own file; what is wrong with it goes into the list."""
    try:
        found = read_word_file(root / name, ignore)
    except (ValueError, OSError) as error:
        listed.refused.append((path, f"words that cannot be read: {error}"))
        return []
    listed.ignored += found.ignored
    listed.refused += [(path, reason) for _, reason in found.refused]
    return found.words


def _stem(name: str) -> str:
    """A path without a video's ending."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in VIDEO_SUFFIXES else name


def _by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """The videos by the name of their file without its ending."""
    found = defaultdict(list)
    for path in paths:
        found[PurePosixPath(_stem(path)).name].append(path)
    return found


def _match_rows(listed: WordList, videos: Mapping[str, Video], picked: bool) -> dict[str, list[Word]]:
    """The words of each video that a table names. Of picked videos it may name others, too."""
    by_name = _by_name(videos)
    of_clip: dict[tuple[str, str], list[Word]] = defaultdict(list)
    for word in listed.words:
        of_clip[word.clip, word.speaker].append(word)
    found: dict[str, list[Word]] = defaultdict(list)
    for (clip, speaker), words in of_clip.items():
        path, problem = _video_of(clip, speaker, videos, by_name)
        if path is None and picked and problem == _NO_VIDEO:
            listed.unused += 1
        elif path is None:
            listed.refused.append((clip, f"{problem}: {len(words)} words of it, the first in {words[0].origin}"))
        else:
            found[path] += words
    return found


def _video_of(
    clip: str, speaker: str, videos: Mapping[str, Video], by_name: Mapping[str, list[str]]
) -> tuple[str | None, str]:
    """The video that a table calls by this name, or why there is none."""
    name = clip.replace("\\", "/").removeprefix("./")
    if name in videos:
        return name, ""
    stem = _stem(name)
    fitting = [path for path in by_name.get(PurePosixPath(stem).name, ()) if f"/{_stem(path)}".endswith(f"/{stem}")]
    if len(fitting) > 1 and speaker:
        fitting = [path for path in fitting if speaker in (videos[path].speaker_name, *PurePosixPath(path).parts)]
    if len(fitting) == 1:
        return fitting[0], ""
    some = ", ".join(fitting[:2])
    return None, f"several videos have this name ({some}, ...)" if fitting else _NO_VIDEO


def _match_files(names: Sequence[str], videos: Mapping[str, Video], listed: WordList) -> Iterator[tuple[str, str]]:
    """Each video and its file of words: of the same name and speaker, and with as many folders in common as any."""
    by_name = _by_name(videos)
    of_videos = {path: (folder_of_speaker(path), {*PurePosixPath(path).parts[:-1]}) for path in videos}
    offers: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in sorted(names):
        file = PurePosixPath(name)
        folders, of_file = {*file.parts[:-1]}, folder_of_speaker(name)
        scored = []
        for path in by_name.get(file.stem, ()):
            of_video, around = of_videos[path]
            if not of_file or not of_video or of_file == of_video:
                scored.append((len(folders & around), path))
        best = max((score for score, _ in scored), default=0)
        nearest = [path for score, path in scored if score == best]
        if len(nearest) == 1:
            offers[nearest[0]].append((best, name))
        elif nearest:
            listed.refused.append((name, f"several videos may have these words: {', '.join(nearest[:3])}"))
        listed.unused += not nearest
    for path, offered in offers.items():
        best = max(score for score, _ in offered)
        chosen = [name for score, name in offered if score == best]
        if len(chosen) == 1:
            yield path, chosen[0]
        else:
            listed.refused.append((path, f"several files have words of it: {', '.join(chosen[:3])}"))
