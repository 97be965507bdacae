"""What `avppc index` and `prepare` print at their end: what they found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from avppc.clip import NO_LABEL, SPLITS, VIDEO_FPS
from avppc.data.config import PrepareConfig, SharedWork
from avppc.data.prepare.worker import UnitRecord, kind_of
from avppc.data.scan import Scan, find_places
from avppc.data.sentences import Sentences, find_sentences
from avppc.data.video.reader import LONGER
from avppc.printing import as_line, counted

REFUSED_NAME = "refused.jsonl"
NOTES_NAME = "notes.jsonl"
SHEET_NAME = "crops.png"

KINDS_SHOWN = 8


def print_summary(
    config: PrepareConfig,
    found: Scan,
    done: int,
    records: Mapping[str, UnitRecord],
    refused: list[tuple[str, str]],
    notes: list[tuple[str, str]],
    seconds: float,
) -> None:
    """Prints what the data set holds, and what was converted or refused.

    Args:
        found: the videos.
        done: how many of them are in the records.
        records: of the finished units.
        refused: path and reason.
        notes: path and note.
        seconds: taken.
    """
    counts = {split: [0, 0, 0] for split in SPLITS}
    for name, record in records.items():
        for shard in record.shards:
            count = counts[name.split("-")[0]]
            count[0] += shard.clips
            count[1] += 1
            count[2] += shard.bytes
    videos = f"{len(found.videos)} videos" if done == len(found.videos) else f"{done} of the {len(found.videos)} videos"
    print(f"{config.out}: {videos} of {config.data}, {counted(len(found.words), 'word')}, {seconds:.1f} s")
    for split, (clips, shards, size) in counts.items():
        if clips:
            print(f"  {split:5} {clips:8,} clips in {shards:,} shards, {size / 1e9:.3f} GB")
    if not any(clips for clips, _, _ in counts.values()):
        print("  no usable clip")
    else:
        look = f"; look at {config.out / SHEET_NAME}" if done == len(found.videos) else ""
        print(f"  crop: {describe_crop(config)}{look}")
    searched, with_face = (
        sum(getattr(record, name) for record in records.values()) for name in ("frames_searched", "frames_with_face")
    )
    if searched:
        print(f"  faces: in {with_face / searched:.2%} of {searched:,} frames of these; what each lacks: {NOTES_NAME}")
    if not any(video.split == "train" for video in found.videos) and found.videos:
        print("  nothing to train on: all lie in folders named val or test; prepare such a folder by itself to do so")
    _print_doubts_about_words(found, notes, config.frames)
    if found.others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.others.most_common(KINDS_SHOWN)))
        print(f"  not videos, left alone: {kinds}")
    print_kinds("converted", NOTES_NAME, [note for _, note in notes])
    print_kinds("refused", REFUSED_NAME, [reason for _, reason in refused])


def print_understood(found: Scan, config: SharedWork) -> bool:
    """Prints what `avppc prepare` would make of these videos: layout, words, speakers, splits.

    Args:
        found: the videos, without words.

    Returns:
        Whether nothing is refused for its words.

    Raises:
        ValueError, OSError: as find_sentences.
    """
    layout = "tree" if config.words is not None else config.layout
    try:
        places = find_places([video.path for video in found.videos], config.data, layout)
    except ValueError as error:
        print(f"layout: {error}")
        return False
    if words := {place.word for place in places.values()} - {None}:
        kind = f"{len(words):,} words in folders, as in LRW"
    elif (inside := find_sentences(found, config)) is not None:
        print_sentences(*inside)
        refused = inside[1].refused
        for path, reason in refused[:KINDS_SHOWN]:
            print(f"    {as_line(path)}: {as_line(reason)}")
        if len(refused) > KINDS_SHOWN:
            print(f"    and {len(refused) - KINDS_SHOWN:,} more")
        return not refused
    else:
        kind = "no words"
    of_split: Counter[str] = Counter(place.split for place in places.values())
    counts = ", ".join(f"{split} {of_split[split]:,}" for split in SPLITS if of_split[split])
    print(f"layout: {kind}; {counts}; {_speakers({video.speaker_name for video in found.videos})}")
    return True


def _speakers(names: set[str]) -> str:
    count = len(names - {""})
    return f"{count:,} speaker{'s' if count > 1 else ''}" if count else "speakers unknown"


def print_sentences(found: Scan, sentences: Sentences) -> None:
    """Prints what was understood of the words inside the videos."""
    listed = [video for video in found.videos if video.words is not None]
    count = sum(len(video.words or ()) for video in listed)
    speakers = _speakers({video.speaker_name for video in listed})
    print(f"{sentences.source}: {count:,} words, {len(found.words)} different, in {len(listed):,} videos; {speakers}")
    for split in SPLITS:
        videos = [video for video in listed if video.split == split]
        if videos:
            words = [word.label for video in videos for word in video.words or ()]
            people = _speakers({video.speaker_name for video in videos})
            different = f"{len(set(words)):,} different"
            print(f"  {split:5} {len(videos):7,} sentences, {len(words):9,} words, {different}; {people}")
    shared = ", ".join(f"{count:,} {kind}" for kind, count in sentences.shared.items())
    print(f"  splits by {sentences.by} ({sentences.splits_from}); in two splits: {shared}")
    others = len(found.videos) - len(listed)
    rare = [as_line(word) for word, _ in sentences.rare.most_common(KINDS_SHOWN)]
    for count, what in (
        (others, "videos without known words: cut into clips without labels"),
        (sentences.ignored, "words left out as pauses (--words-ignore)"),
        (sentences.duplicates, "rows that say the same as another one"),
        (sentences.unused, "files of words, or recordings of the table, without a video here"),
        (len(sentences.refused), "refusals of words, or of videos for them"),
        (sentences.rare.total(), f"words left out that training has too few of (--words-least): {', '.join(rare)}"),
    ):
        if count:
            print(f"  {count:,} {what}")


def _print_doubts_about_words(found: Scan, notes: list[tuple[str, str]], frames: int) -> None:
    """Warns where most videos of words are longer than the one clip kept of each: their folders may be no words."""
    words = {video.path: found.words[video.label] for video in found.videos if video.label != NO_LABEL}
    longer = [words[path] for path, note in notes if path in words and note.startswith(LONGER)]
    if 2 * len(longer) > len(words):
        print(
            f"  {len(longer):,} of {len(words):,} videos of words ({', '.join(sorted(set(longer))[:3])}, ...) go on "
            f"after the one clip kept of each, its first {frames / VIDEO_FPS:.2f} s. If these folders are no words, "
            "--layout tree cuts their videos into clips without labels."
        )


def describe_crop(config: PrepareConfig) -> str:
    """Which part of each frame is stored; where it is not known to be the mouth, also which crops would find that."""
    rows, columns = (f"{first} to {after - 1}" for first, after in (config.crop_rows, config.crop_columns))
    window = f"rows {rows}, columns {columns}"
    square = "the middle square of the whole frame"
    finds = "; --crop mesh or cascade finds the mouth"
    if config.crop == "auto":
        return f"{square}, of 256 x 256 video LRW's window ({window}){finds}"
    if config.crop == "centre":
        share = "" if config.centre_fraction == 1 else f", {config.centre_fraction:g} of its shorter side"
        return f"{square}{share}{finds}"
    return {
        "window": window,
        "box": "each video's box in the manifest",
        "mesh": "the mouth, as the face mesh finds it",
        "cascade": "the mouth, as the cascade finds it",
    }[config.crop]


def print_kinds(title: str, name: str, texts: list[str]) -> None:
    """How often each kind of text (what stands before its details) occurs."""
    if not texts:
        return
    print(f"  {title}: {len(texts):,}, listed in {name}")
    kinds = Counter(kind_of(as_line(text)) for text in texts).most_common()
    for kind, count in kinds[:KINDS_SHOWN]:
        print(f"    {count:6,}  {kind}")
    if len(kinds) > KINDS_SHOWN:
        print(f"    {sum(count for _, count in kinds[KINDS_SHOWN:]):6,}  of {len(kinds) - KINDS_SHOWN} other kinds")
