"""What `avppc index` and `prepare` print at their end: what they found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from avppc.clip import NO_LABEL, SPLITS, VIDEO_FPS
from avppc.data.config import PrepareConfig
from avppc.data.prepare.worker import UnitRecord, kind_of
from avppc.data.scan import Scan
from avppc.data.sentences import Sentences
from avppc.data.video.reader import LONGER
from avppc.printing import as_line

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
    print(f"{config.out}: {videos} of {config.data}, {len(found.words)} words, {seconds:.1f} s")
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


def print_sentences(found: Scan, sentences: Sentences) -> None:
    """Prints what was understood of the words inside the videos."""
    listed = [video for video in found.videos if video.words is not None]
    count = sum(len(video.words or ()) for video in listed)
    speakers = {video.speaker_name for video in listed} - {""}
    print(
        f"{count:,} words, {len(found.words)} different ones, in {len(listed):,} videos of "
        f"{len(speakers) or 'unknown'} speakers: {sentences.source}"
    )
    for split in SPLITS:
        videos = [video for video in listed if video.split == split]
        if videos:
            words = [word.label for video in videos for word in video.words or ()]
            people = {video.speaker_name for video in videos} - {""}
            print(
                f"  {split:5} {len(videos):6,} sentences, {len(words):7,} words, {len(set(words))} different"
                + (f", {len(people)} speakers" if people else "")
            )
    shared = ", ".join(f"{count} {kind}" for kind, count in sentences.shared.items())
    print(f"  splits by {sentences.by} ({sentences.splits_from}); in two splits: {shared}")
    others = len(found.videos) - len(listed)
    for count, what in (
        (others, "videos without known words: cut into clips without labels"),
        (sentences.ignored, "words left out as pauses (--words-ignore)"),
        (sentences.duplicates, "rows that say the same as another one"),
        (sentences.unused_files, "files of words without a video here"),
        (len(sentences.unseen), f"words that training has no example of: {', '.join(sentences.unseen[:5])}"),
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
