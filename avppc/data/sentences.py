"""Words inside longer recordings: which video says which words when, and to which split it belongs.

A sentence is a recording, or several whose files have the same name (the same sentence of several speakers, in GRID).
Where nobody says the splits, a sentence or a speaker falls to one by its own name and the seed: what others there are
makes no difference.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from avppc.clip import NO_LABEL, SPLITS
from avppc.data.config import SharedWork
from avppc.data.manifest import number_speakers
from avppc.data.scan import (
    SPLIT_NAMES,
    VIDEO_SUFFIXES,
    Scan,
    Video,
    WordSpan,
    folder_of_speaker,
    is_word_file,
    names_split,
)
from avppc.data.words import Word, WordList, read_table, read_word_file

_MAX_SEEDS = 1000  # tried to find one that leaves no split empty


@dataclass
class Sentences:
    """What was understood of the words inside videos."""

    source: str
    """Where the words come from."""
    splits_from: str
    """Who says the splits."""
    by: str
    """"sentence" or "speaker"."""
    ignored: int = 0
    """Words left out as pauses."""
    duplicates: int = 0
    """Rows that say the same as another one."""
    unused_files: int = 0
    """Files of words without a video here."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Recordings and why words of them, or all of it, are left out."""
    unseen: list[str] = field(default_factory=list)
    """Words that are tested and never trained."""
    shared: dict[str, int] = field(default_factory=dict)
    """How many sentences (by the name of their files) and speakers are in two splits."""


def find_sentences(found: Scan, config: SharedWork) -> tuple[Scan, Sentences] | None:
    """The videos with the words inside them, and their splits; None where there are none, and none were asked for.

    Raises:
        ValueError: the words' file is none, or fits no video; or a split is empty, or has a speaker of another one.
        OSError: the words' file cannot be read.
    """
    if config.words is None and (config.layout != "auto" or found.words or not found.word_files):
        return None
    ignore = frozenset(word.strip().casefold() for word in config.words_ignore)
    videos = {video.path: video for video in found.videos}
    if config.words is not None and config.words.is_file() and not is_word_file(config.words.name):
        sentences = Sentences(f"the table {config.words}", "", config.split_by)
        listed = read_table(config.words, ignore)
        by_path, splits = _match_rows(listed, videos, sentences, config)
    else:
        sentences = Sentences("", "", config.split_by)
        by_path, splits = _read_word_files(found, videos, sentences, config, ignore), None
    kept = {path: _without_overlaps(path, words, sentences) for path, words in by_path.items()}
    kept = {path: words for path, words in kept.items() if words}
    if not kept:
        first = f", as {sentences.refused[0][0]}: {sentences.refused[0][1]}" if sentences.refused else ""
        raise ValueError(f"{sentences.source}: no word of it is in a video below {config.data}{first}")
    speakers = _speakers(videos, kept)
    found = _split(found, kept, splits, speakers, sentences, config)
    return found, sentences


# Which video


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


def _match_rows(
    listed: WordList, videos: Mapping[str, Video], sentences: Sentences, config: SharedWork
) -> tuple[dict[str, list[Word]], dict[str, str] | None]:
    """The words of each video, and its split where the table says it."""
    by_name = _by_name(videos)
    sentences.ignored = listed.ignored
    sentences.refused += listed.refused
    found: dict[str, list[Word]] = defaultdict(list)
    missing: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], str | None] = {}
    for word in listed.words:
        key = (word.clip, word.speaker)
        if key not in places:
            places[key], problem = _video_of(*key, videos, by_name)
            if problem:
                missing[word.clip, problem] = 0
        path = places[key]
        if path is not None:
            found[path].append(word)
        else:
            missing[next(each for each in missing if each[0] == word.clip)] += 1
    sentences.refused += [(clip, f"{problem}: {count} words of it") for (clip, problem), count in missing.items()]
    return found, _table_splits(found, sentences) if listed.has_splits else None


def _video_of(
    clip: str, speaker: str, videos: Mapping[str, Video], by_name: Mapping[str, list[str]]
) -> tuple[str | None, str]:
    """The video that a table calls by this name, or why there is none."""
    name = clip.replace("\\", "/").removeprefix("./")
    if name in videos:
        return name, ""
    stem = _stem(name)
    candidates = [path for path in by_name.get(PurePosixPath(stem).name, ()) if f"/{_stem(path)}".endswith(f"/{stem}")]
    if len(candidates) > 1 and speaker:
        candidates = [path for path in candidates if speaker in (videos[path].speaker_name, *PurePosixPath(path).parts)]
    if len(candidates) == 1:
        return candidates[0], ""
    return None, "several videos have this name" if candidates else "there is no such video"


def _table_splits(found: dict[str, list[Word]], sentences: Sentences) -> dict[str, str]:
    """The split of each video; "" where the table contradicts itself about it, or says none."""
    splits: dict[str, str] = {}
    for path in list(found):
        named = {word.split.casefold(): word for word in found[path]}
        unknown = [word for name, word in named.items() if name not in SPLIT_NAMES]
        chosen = {SPLIT_NAMES[name] for name in named if name in SPLIT_NAMES}
        if unknown:
            known = ", ".join(SPLITS)
            problem = f"no split of it ({known}) is known: {unknown[0].split!r}, {unknown[0].origin}"
        elif len(chosen) > 1:
            problem = f"in several splits: {', '.join(sorted(chosen))}; {'; '.join(w.origin for w in named.values())}"
        else:
            splits[path] = chosen.pop()
            continue
        sentences.refused.append((path, problem))
        splits[path] = ""
    return splits


def _read_word_files(
    found: Scan, videos: Mapping[str, Video], sentences: Sentences, config: SharedWork, ignore: frozenset[str]
) -> dict[str, list[Word]]:
    """The words of each video that has a file of them."""
    root, names = config.data, found.word_files
    if config.words is not None:
        root = config.words if config.words.is_dir() else config.words.parent
        if not config.words.exists():
            raise ValueError(f"there is no table or folder of words {config.words}")
        files = config.words.rglob("*") if config.words.is_dir() else [config.words]
        names = [file.relative_to(root).as_posix() for file in files if is_word_file(file.name) and file.is_file()]
    kinds = {PurePosixPath(name).suffix.lower() for name in names}
    if len(kinds) != 1:
        have = (
            "both .align and .TextGrid files: pass --words FOLDER for one kind" if kinds else "no .align or .TextGrid"
        )
        raise ValueError(f"{root} has {have}")
    kind = "GRID's .align" if kinds == {".align"} else ".TextGrid"
    sentences.source = f"{len(names):,} {kind} files below {root}"
    by_path: dict[str, list[Word]] = {}
    for path, name in _match_files(names, videos, sentences).items():
        try:
            listed = read_word_file(root / name, ignore)
        except (ValueError, OSError) as error:
            sentences.refused.append((path, f"words that cannot be read: {error}"))
            continue
        sentences.ignored += listed.ignored
        sentences.refused += [(path, reason) for _, reason in listed.refused]
        by_path[path] = listed.words
    return by_path


def _match_files(names: Sequence[str], videos: Mapping[str, Video], sentences: Sentences) -> dict[str, str]:
    """The file of words of each video: of the same name, with as many folders in common as any, the speaker's above
    all."""
    by_name = _by_name(videos)
    offers: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in sorted(names):
        file = PurePosixPath(name)
        folders, of_file = {*file.parts[:-1]}, folder_of_speaker(name)
        scored = []
        for path in by_name.get(file.stem, ()):
            of_video = folder_of_speaker(path)
            if of_file and of_video and of_file != of_video:
                continue
            scored.append((len(folders & {*PurePosixPath(path).parts[:-1]}), path))
        best = max((score for score, _ in scored), default=0)
        nearest = [path for score, path in scored if score == best]
        for path in nearest:
            offers[path].append((best, name))
        sentences.unused_files += not nearest
    chosen = {}
    for path, scored_names in offers.items():
        most = max(score for score, _ in scored_names)
        best_names = [name for score, name in scored_names if score == most]
        if len(best_names) == 1:
            chosen[path] = best_names[0]
        else:
            sentences.refused.append((path, f"several files have words of it: {', '.join(best_names[:3])}"))
    return chosen


def _without_overlaps(path: str, words: list[Word], sentences: Sentences) -> list[Word]:
    """The words in the order of their times, each once; two of which one begins before the other's middle are refused:
    nobody knows which of them is right."""
    kept: list[Word] = []
    for word in sorted(words, key=lambda word: (word.first, word.last, word.text)):
        if kept and (kept[-1].first, kept[-1].last, kept[-1].text) == (word.first, word.last, word.text):
            sentences.duplicates += 1
        else:
            kept.append(word)
    wrong = set()
    longest = 0  # the one that ends last so far
    for number, word in enumerate(kept[1:], 1):
        before = kept[longest]
        if word.first + word.last < 2 * before.last or 2 * word.first < before.first + before.last:
            wrong |= {longest, number}
        if word.last > before.last:
            longest = number
    for number in sorted(wrong):
        word = kept[number]
        sentences.refused.append((path, f"word that lies over another one: {word.text!r}, {word.origin}"))
    return [word for number, word in enumerate(kept) if number not in wrong]


# Who speaks


def _speakers(videos: Mapping[str, Video], kept: Mapping[str, list[Word]]) -> dict[str, str]:
    """The name of each video's speaker, where it is known: as the table says, else the manifest, else the folders."""
    found = {}
    for path, video in videos.items():
        named = {word.speaker for word in kept.get(path, ()) if word.speaker}
        if len(named) > 1:
            raise ValueError(f"{path} has several speakers in the table: {', '.join(sorted(named))}; one is allowed")
        found[path] = named.pop() if named else video.speaker_name
    return found


# Which split


def sentence_of(path: str) -> str:
    """What a recording is called where sentences are split: its file's name, or its path where that is a number."""
    stem = PurePosixPath(path).stem
    return stem if re.search(r"[^\W\d_]", stem) else str(PurePosixPath(path).with_suffix(""))


def _split(
    found: Scan,
    kept: Mapping[str, list[Word]],
    table: Mapping[str, str] | None,
    speakers: Mapping[str, str],
    sentences: Sentences,
    config: SharedWork,
) -> Scan:
    """The videos with their words and splits; checked."""
    by_speaker = config.split_by == "speaker"
    names = {path: speakers[path] if by_speaker else sentence_of(path) for path in speakers}
    if by_speaker and (unknown := [path for path in kept if not names[path]]):
        raise ValueError(
            f"split_by 'speaker' needs the speaker of each video, {len(unknown)} have none, such as {unknown[0]}: name "
            "it in the table's column speaker, or in the manifest"
        )
    splits: dict[str, str]
    if table is not None:
        splits, sentences.splits_from = dict(table), "the table"
        splits |= {video.path: video.split for video in found.videos if video.path not in splits}
    elif any(names_split(path) for path in kept):
        splits, sentences.splits_from = {video.path: video.split for video in found.videos}, "the folders"
    else:
        of_name = draw_splits({names[path] for path in kept}, config)
        # Of a speaker without words the name decides, too: others of it may follow.
        splits = {
            path: of_name.get(name) or (_draw(name, config) if by_speaker and name else "train")
            for path, name in names.items()
        }
        sentences.splits_from = f"shares, seed {config.split_seed}"
    words = tuple(sorted({word.text for path, listed in kept.items() if splits[path] for word in listed}))
    labels = {word: label for label, word in enumerate(words)}
    known = {path: name for path, name in speakers.items() if name}
    counted = all(re.fullmatch(r"0|[1-9]\d{0,17}", name) for name in known.values())
    numbers = number_speakers({path: int(name) if counted else name for path, name in known.items()})
    result = Scan(words, [], list(found.refused), found.others, found.word_files)
    for video in found.videos:
        split, listed = splits[video.path], kept.get(video.path)
        if split and listed is None and split != "train":
            reason = f"no word is known of it, and it is in split {split!r}: not trained on"
            sentences.refused.append((video.path, reason))
        elif split:
            spans = None if listed is None else tuple(WordSpan(labels[w.text], w.first, w.last) for w in listed)
            speaker = numbers.get(video.path, video.speaker)
            result.videos.append(
                replace(
                    video, split=split, label=NO_LABEL, speaker=speaker, speaker_name=speakers[video.path], words=spans
                )
            )
    _check(result, sentences, by_speaker)
    result.refused = sorted({*result.refused, *sentences.refused})
    return result


def _draw(name: str, config: SharedWork) -> str:
    """The split that a sentence or speaker falls to: by its name, the seed and the shares alone."""
    if name in config.test_names:
        return "test"
    if name in config.val_names:
        return "val"
    test = 0.0 if config.test_names else config.test_share
    val = 0.0 if config.val_names else config.val_share
    text = f"{config.split_seed}/{config.split_by}/{name}"
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / (1 << 64)
    return "test" if place < test else "val" if place < test + val else "train"


def draw_splits(names: set[str], config: SharedWork) -> dict[str, str]:
    """The split of each sentence or speaker.

    Raises:
        ValueError: a split that has a share gets none of them, or a name that was given is not among them.
    """
    by = config.split_by
    for field_name in ("val_names", "test_names"):
        if unknown := sorted({*getattr(config, field_name)} - names):
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"{field_name} must be among the {len(names)} {by}s ({some}, ...), got {unknown[0]!r}")
    found = {name: _draw(name, config) for name in names}
    wanted = {"train"} | {"val"} & ({"val"} if config.val_share or config.val_names else set())
    wanted |= {"test"} if config.test_share or config.test_names else set()
    if missing := sorted(wanted - {*found.values()}):
        seeds = (replace(config, split_seed=seed) for seed in range(_MAX_SEEDS))
        other = next((each.split_seed for each in seeds if wanted <= {_draw(name, each) for name in names}), None)
        way = "larger shares" if other is None else f"--split-seed {other}, or larger shares"
        raise ValueError(
            f"none of the {len(names)} {by}s falls to split {missing[0]!r} (val_share {config.val_share}, test_share "
            f"{config.test_share}, split_seed {config.split_seed}): take {way}, or name some by --val-names and "
            "--test-names; a share of 0 leaves a split out"
        )
    return found


def _check(found: Scan, sentences: Sentences, by_speaker: bool) -> None:
    """Counts what is in two splits; ValueError where a speaker is, and speakers were to be kept apart."""
    words = {
        split: {span.label for video in found.videos if video.split == split for span in video.words or ()}
        for split in SPLITS
    }
    tested = (words["val"] | words["test"]) - words["train"]
    sentences.unseen = [found.words[label] for label in sorted(tested)]
    for kind, name_of in (
        ("sentences", lambda video: sentence_of(video.path)),
        ("speakers", lambda video: video.speaker_name),
    ):
        splits = defaultdict(set)
        for video in found.videos:
            splits[name_of(video)].add(video.split)
        splits.pop("", None)
        shared = sorted(name for name, of_name in splits.items() if len(of_name) > 1)
        sentences.shared[kind] = len(shared)
        if shared and by_speaker and kind == "speakers":
            places = ", ".join(sorted(splits[shared[0]]))
            raise ValueError(
                f"{len(shared)} speakers are in two splits, such as {shared[0]!r} in {places}, where "
                f"{sentences.splits_from} says the splits: split_by 'speaker' keeps them apart"
            )
