"""Words inside longer recordings: which clip of which video is a word, and to which split the video belongs.

A sentence is a recording, or several whose files have the same name (the same sentence of several speakers, in GRID).
Where nobody says the splits, a sentence or a speaker falls to one by its own name and the seed: what others there are
makes no difference.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePosixPath

from avppc.clip import NO_LABEL, SPLITS
from avppc.data.config import WORD_SETTINGS, SharedWork
from avppc.data.manifest import number_speakers
from avppc.data.scan import SPLIT_NAMES, Scan, Video, WordSpan, names_split
from avppc.data.words import Word, words_of_videos

_MAX_SEEDS = 200  # tried to find one that leaves no split of few names empty
_REFUSED = ""  # stands for the split of a video that is left out

Words = Mapping[str, list[Word]]
"""The words of each video, by its path."""


@dataclass
class Sentences:
    """What was understood of the words inside videos."""

    source: str
    """Where the words come from."""
    by: str
    """"sentence" or "speaker": what is kept apart."""
    splits_from: str = ""
    """Who says the splits."""
    ignored: int = 0
    """Words left out as pauses."""
    duplicates: int = 0
    """Rows that say the same as another one."""
    unused: int = 0
    """Files of words, or recordings of a table that a list of videos leaves out, without a video here."""
    rare: Counter[str] = field(default_factory=Counter)
    """Words that training has too few examples of, and how many there are in all."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Recordings, and why words of them, or all of them, are left out."""
    shared: dict[str, int] = field(default_factory=dict)
    """How many sentences (by the name of their files) and speakers are in two splits."""


def find_sentences(found: Scan, config: SharedWork) -> tuple[Scan, Sentences] | None:
    """The videos with the words inside them, and their splits; None where there are none, and none were asked for.

    Raises:
        ValueError: the words' file is none, or fits no video; a split is empty, or shares a speaker with another one;
            or settings ask for words where there are none.
        OSError: the words' file cannot be read.
    """
    if config.words is not None:
        return _find(found, config)
    if config.layout != "auto" or found.words or not found.word_files:
        given = [name for name, value in _settings(config).items() if value != WORD_SETTINGS[name]]
        if given:
            raise ValueError(f"{given[0]} is about words inside longer videos, and there are none: give words, a file")
        return None
    try:
        return _find(found, config)
    except ValueError as error:  # nobody has asked for it
        raise ValueError(f"{error}; layout 'tree' takes the videos without their words") from error


def _settings(config: SharedWork) -> dict[str, object]:
    """The settings about words inside videos that this command has."""
    return {each.name: getattr(config, each.name) for each in fields(config) if each.name in WORD_SETTINGS}


def _find(found: Scan, config: SharedWork) -> tuple[Scan, Sentences]:
    by_path, listed = words_of_videos(found, config)
    sentences = Sentences(listed.source, config.split_by, ignored=listed.ignored, unused=listed.unused)
    sentences.refused = list(listed.refused)
    words = {path: _one_after_the_other(path, all_of_it, sentences) for path, all_of_it in by_path.items()}
    words = {path: some for path, some in words.items() if some}
    speakers = _speakers(found.videos, words, sentences)
    words = {path: some for path, some in words.items() if path in speakers}
    if not words:
        first = f", as {sentences.refused[0][0]}: {sentences.refused[0][1]}" if sentences.refused else ""
        raise ValueError(f"{listed.source}: no word of it is in a video below {config.data}{first}")
    splits = _splits(found, words, speakers, listed.has_splits, sentences, config)
    words = _without_rare(words, splits, sentences, config)
    result = _labelled(found, words, splits, speakers, sentences)
    _check(result, sentences)
    result.refused = sorted({*found.refused, *sentences.refused})
    return result, sentences


def _one_after_the_other(path: str, words: list[Word], sentences: Sentences) -> list[Word]:
    """The words in the order of their times, each once. Of two that lie over each other, so that the middle of one is
    in the other, nobody knows which is right: both are refused."""
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


def _speakers(videos: list[Video], words: Words, sentences: Sentences) -> dict[str, str]:
    """The name of each video's speaker, "" where it is not known: the table's, else the manifest's, else the folders'.

    Videos that a table gives several speakers are refused.
    """
    found = {}
    for video in videos:
        named = {word.speaker: word for word in words.get(video.path, ()) if word.speaker}
        if len(named) > 1:
            places = "; ".join(word.origin for word in named.values())
            sentences.refused.append((video.path, f"several speakers of it: {', '.join(sorted(named))}; {places}"))
        else:
            found[video.path] = next(iter(named), video.speaker_name)
    return found


# Which split


def sentence_of(path: str) -> str:
    """What a recording is called where sentences are split: its file's name, or its path where that is a number."""
    stem = PurePosixPath(path).stem
    return stem if re.search(r"[^\W\d_]", stem) else str(PurePosixPath(path).with_suffix(""))


def _splits(
    found: Scan,
    words: Words,
    speakers: Mapping[str, str],
    by_table: bool,
    sentences: Sentences,
    config: SharedWork,
) -> dict[str, str]:
    """The split of each video, _REFUSED where it has none."""
    of_speaker = config.split_by == "speaker"
    names = {path: speaker if of_speaker else sentence_of(path) for path, speaker in speakers.items()}
    if unknown := [path for path in words if not names[path]]:
        raise ValueError(
            f"split_by 'speaker' needs the speaker of each video with words; {len(unknown)} have none, such as "
            f"{unknown[0]}: name it in the table's column speaker, in the manifest or by folders (GRID's s1, s2, ...)"
        )
    if by_table:
        sentences.splits_from = "the table"
        splits = {path: _table_split(path, listed, sentences) for path, listed in words.items()}
    elif any(names_split(path) for path in words):
        sentences.splits_from = "the folders"
        splits = {video.path: video.split for video in found.videos if video.path in words}
    else:
        sentences.splits_from = f"shares, seed {config.split_seed}"
        drawn = draw_splits({names[path] for path in words}, config)
        splits = {path: drawn[names[path]] for path in words}
    # What has no words goes with the others of its name, so that none that is tested is trained on.
    of_name = {names[path]: split for path, split in splits.items() if split}
    for video in found.videos:
        if video.path in speakers and video.path not in splits:
            splits[video.path] = of_name.get(names[video.path], video.split)
    return splits


def _table_split(path: str, words: list[Word], sentences: Sentences) -> str:
    """The split that the rows of a table say of a video."""
    named = {word.split.casefold(): word for word in words}
    unknown = [word for name, word in named.items() if name not in SPLIT_NAMES]
    chosen = {SPLIT_NAMES[name] for name in named if name in SPLIT_NAMES}
    if len(chosen) == 1 and not unknown:
        return chosen.pop()
    if unknown:
        problem = f"no split of it is known ({', '.join(SPLITS)}): {unknown[0].split!r}, {unknown[0].origin}"
    else:
        problem = f"in several splits: {', '.join(sorted(chosen))}; {'; '.join(word.origin for word in named.values())}"
    sentences.refused.append((path, problem))
    return _REFUSED


def draw_splits(names: set[str], config: SharedWork) -> dict[str, str]:
    """The split of each sentence or speaker: by its name, the seed and the shares alone.

    Raises:
        ValueError: a split that has a share gets none of them, or a name that was given is not among them.
    """
    by = config.split_by
    for setting in ("val_names", "test_names"):
        if unknown := sorted({*getattr(config, setting)} - names):
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"{setting} must be among the {len(names):,} {by}s ({some}, ...), got {unknown[0]!r}")
    found = {name: _draw(name, config, config.split_seed) for name in names}
    wanted = {"train"}
    wanted |= {"val"} if config.val_share or config.val_names else set()
    wanted |= {"test"} if config.test_share or config.test_names else set()
    if missing := sorted(wanted - {*found.values()}):
        seeds = range(_MAX_SEEDS if len(names) < _MAX_SEEDS else 0)
        other = next((seed for seed in seeds if wanted <= {_draw(name, config, seed) for name in names}), None)
        way = "larger shares" if other is None else f"--split-seed {other}, or larger shares"
        raise ValueError(
            f"none of the {len(names):,} {by}s falls to split {missing[0]!r} (val_share {config.val_share}, test_share "
            f"{config.test_share}, split_seed {config.split_seed}): take {way}, or name some by --val-names and "
            "--test-names; a share of 0 leaves a split out"
        )
    return found


def _draw(name: str, config: SharedWork, seed: int) -> str:
    """Where one name falls."""
    if name in config.test_names:
        return "test"
    if name in config.val_names:
        return "val"
    test = 0.0 if config.test_names else config.test_share
    val = 0.0 if config.val_names else config.val_share
    text = f"{seed}/{config.split_by}/{name}"
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / (1 << 64)
    return "test" if place < test else "val" if place < test + val else "train"


# What comes out


def _without_rare(
    words: Words, splits: Mapping[str, str], sentences: Sentences, config: SharedWork
) -> dict[str, list[Word]]:
    """The words that training has enough examples of: nobody could learn to read the others."""
    trained = Counter(word.text for path, listed in words.items() if splits[path] == "train" for word in listed)
    kept: dict[str, list[Word]] = {}
    for path, listed in words.items():
        if splits[path] == _REFUSED:
            continue
        kept[path] = [word for word in listed if trained[word.text] >= config.words_least]
        sentences.rare.update(word.text for word in listed if trained[word.text] < config.words_least)
    if not any(kept.values()):
        most = f", {max(trained.values())} at most" if trained else ""
        needed = f"{config.words_least} training examples, as words_least asks{most}"
        raise ValueError(f"{sentences.source}: no word has {needed}")
    return kept


def _labelled(
    found: Scan,
    words: Words,
    splits: Mapping[str, str],
    speakers: Mapping[str, str],
    sentences: Sentences,
) -> Scan:
    """The videos with the words inside them, their splits and their speakers; videos of no use are refused."""
    known = tuple(sorted({word.text for listed in words.values() for word in listed}))
    labels = {word: label for label, word in enumerate(known)}
    named = {path: name for path, name in speakers.items() if name}
    counted = all(re.fullmatch(r"0|[1-9]\d{0,17}", name) for name in named.values())
    numbers = number_speakers({path: int(name) if counted else name for path, name in named.items()})
    result = Scan(known, [], [], found.others, found.word_files)
    for video in found.videos:
        split, listed = splits.get(video.path, _REFUSED), words.get(video.path)
        if split == _REFUSED:
            continue
        if not listed and split != "train":
            reason = f"no word is known of it, and it is in split {split!r}: not trained on"
            sentences.refused.append((video.path, reason))
            continue
        spans = None if listed is None else tuple(WordSpan(labels[word.text], word.first, word.last) for word in listed)
        speaker = numbers.get(video.path, video.speaker)
        name = speakers[video.path]
        result.videos.append(
            replace(video, split=split, label=NO_LABEL, speaker=speaker, speaker_name=name, words=spans)
        )
    return result


def _check(found: Scan, sentences: Sentences) -> None:
    """Counts what is in two splits; ValueError where speakers are, and were to be kept apart."""
    places: dict[str, dict[str, set[str]]] = {"sentences": defaultdict(set), "speakers": defaultdict(set)}
    for video in found.videos:
        places["sentences"][sentence_of(video.path)].add(video.split)
        if video.speaker_name:
            places["speakers"][video.speaker_name].add(video.split)
    shared = {kind: sorted(name for name in of_kind if len(of_kind[name]) > 1) for kind, of_kind in places.items()}
    sentences.shared = {kind: len(names) for kind, names in shared.items()}
    if sentences.by == "speaker" and (names := shared["speakers"]):
        of_first = ", ".join(sorted(places["speakers"][names[0]]))
        raise ValueError(
            f"{len(names)} speakers are in two splits, such as {names[0]!r} in {of_first}: split_by 'speaker' keeps "
            f"speakers apart, and {sentences.splits_from} says otherwise"
        )
