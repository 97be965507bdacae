"""`avppc prepare`: videos in, packed shards out, once and for all epochs.

OUT/shards/train-00000-00.safetensors ...   the clips
OUT/units/train-00000.json ...              which videos went into which shards; what makes the work resumable
OUT/refused.jsonl, OUT/notes.jsonl          videos that could not be used or had to be converted, and why
OUT/crops.png                               some of the clips, to be looked at
OUT/prepare.json                            the folder and the settings it is all made from, how many units it has
OUT/index.json                              written last, when every unit is finished
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avppc.clip import CROP_SIZE, SAMPLES_PER_FRAME, SPLITS
from avppc.data.config import TRACKED_CROPS, WORD_SETTINGS, Layout, PrepareConfig
from avppc.data.contact_sheet import spread, strip, write_contact_sheet
from avppc.data.packed.dataset import PackedDataset, verify_shards
from avppc.data.packed.index import CLAIM_NAME, INDEX_NAME, SHARD_FOLDER, UNIT_FOLDER, PackedIndex, parse_record
from avppc.data.packed.remote import upload_packed
from avppc.data.packed.shard import ClipShape
from avppc.data.prepare.pool import PASSING, Unit, handle_units
from avppc.data.prepare.summary import NOTES_NAME, REFUSED_NAME, SHEET_NAME, print_sentences, print_summary
from avppc.data.prepare.worker import CHANGED, SHARD_OF_UNIT, DecodeJob, UnitRecord, unit_name
from avppc.data.scan import VIDEO_SUFFIXES, Scan, Video, scan
from avppc.data.sentences import Sentences, find_sentences
from avppc.data.video.faces import make_finder
from avppc.data.video.picked import load_torchcodec
from avppc.data.video.source import UNREADABLE
from avppc.data.video.track import TRACKER_VERSION
from avppc.files import check_apart, check_vacant, read_json, remove_files, remove_leftovers, sole_use, write_json_lines
from avppc.printing import Console, ProgressBar
from avppc.settings import read_checked_json, write_checked_json

LAYOUT_VERSION = 1
_TARGET_UNITS = 64  # small data sets are cut finer, so that all processes have work
_MIN_UNIT_BYTES = 1 << 20

_GAP_PIXELS = 2
_SOUND_PIXELS = 16  # height of the strip below each row


def execute(config: PrepareConfig) -> int:
    """Prepares a data set; 0: all videos are in, 3: some were refused and are listed, 1: none was usable, 4: a share is
    done, which only the environment asked for, and others are missing.

    Raises:
        ValueError: the data folder is none, or its layout or manifest is wrong; or OUT is not apart from it, or holds
            something else.
        ImportError: the crop needs a package that is not installed.
        OSError: OUT cannot be written, because the disk is full, say; what is finished stays, and the same command goes
            on from there.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    check_apart(config.out, config.data)
    found, sentences = find_videos(config)
    if sentences is not None:
        print_sentences(found, sentences)
    if not found.videos and not found.refused:  # an empty mount point, say: nothing in OUT is touched
        Console(stderr=True, quiet=False, soft_wrap=True).print(
            f"{config.data} has no videos ({', '.join(sorted(VIDEO_SUFFIXES))})"
        )
        return 1
    units = plan(config, found.videos)
    check_installed(config)
    _begin(config, units)
    number, shares = config.share()
    mine = units[number::shares]
    records = _finished(config.out, mine, console)
    todo = [unit for unit in mine if unit.name not in records]
    if todo:
        # What it lists is about to be replaced; a reader must not find old checksums with new shards.
        remove_files(config.out, [INDEX_NAME])
        _decode(config, todo, records, console)
    if shares > 1:
        records |= _finished(config.out, [unit for unit in units if unit.name not in records], console, verify=False)
    complete = len(records) == len(units)
    if complete and any(record.shards for record in records.values()):  # else what an earlier call has made stays
        _write_index(config, found, units, records)
        _remove_superseded(config, units, records)
    refused = sorted(found.refused + [item for record in records.values() for item in record.refused])
    notes = sorted(item for record in records.values() for item in record.notes)
    write_json_lines(config.out / REFUSED_NAME, ({"path": path, "reason": reason} for path, reason in refused))
    write_json_lines(config.out / NOTES_NAME, ({"path": path, "note": note} for path, note in notes))
    clips = sum(shard.clips for record in records.values() for shard in record.shards)
    if complete and config.upload and clips:  # an index that is there without them is an earlier call's
        sent = upload_packed(config.out, config.upload)
        print(f"{config.upload}: {sent} shards sent")
    done = sum(len(unit.videos) for unit in units if unit.name in records)
    print_summary(config, found, done, records, refused, notes, time.monotonic() - started)
    if not complete:
        missing = f"{len(units) - len(records)} of {len(units)} units"
        print(f"half prepared: {missing} are for other shares (--shard); the one that ends last writes {INDEX_NAME}")
        if (code := config.end_of_share()) is not None:
            return code
    if complete and clips == 0:
        return 1
    return 3 if refused else 0


def find_videos(config: PrepareConfig) -> tuple[Scan, Sentences | None]:
    """The videos that the settings take, and what is known of words inside them; errors as scan and find_sentences."""
    layout: Layout = "tree" if config.words is not None else config.layout
    found = scan(config.data, config.paths, config.frames, layout)
    inside = find_sentences(found, config) if found.videos else None
    if inside is not None and config.backend != "pyav":
        raise ValueError(f"decoder {config.decoder!r} cuts no words out of recordings: give --decoder pyav")
    return (found, None) if inside is None else inside


def check_installed(config: PrepareConfig) -> None:
    """ImportError where a package that the settings need is not there: to be known before anything is begun."""
    if config.crop in TRACKED_CROPS:
        make_finder(config.crop)
    if config.backend == "torchcodec":
        load_torchcodec()


def plan(config: PrepareConfig, videos: Sequence[Video]) -> list[Unit]:
    """Cuts the videos into units: the same ones whatever the number of processes or shares."""
    settings = settings_of_clips(config)
    unit_bytes = max(_MIN_UNIT_BYTES, sum(video.bytes for video in videos) // _TARGET_UNITS)
    units: list[Unit] = []
    for split in SPLITS:
        groups: list[list[Video]] = []
        room = 0
        for video in videos:
            if video.split != split:
                continue
            if not groups or room <= 0 or len(groups[-1]) == config.clips_per_shard:
                groups.append([])
                room = unit_bytes
            groups[-1].append(video)
            room -= video.bytes
        for number, group in enumerate(groups):
            content = json.dumps([settings, [_facts(video) for video in group]])
            digest = hashlib.sha256(content.encode()).hexdigest()
            units.append(Unit(unit_name(split, number), digest, tuple(group)))
    return units


def _facts(video: Video) -> list[Any]:
    """What of a video goes into the digest of its unit."""
    # No checksums: they guard the content and change nothing of it.
    facts = [video.path, video.split, video.label, video.speaker, video.bytes, video.mtime_ns]
    box, sound = video.box, video.sound
    words = [] if video.words is None else [[astuple(word) for word in video.words]]
    return [*facts, *([] if box is None else [box]), *([] if sound is None else [astuple(sound)]), *words]


def settings_of_clips(config: PrepareConfig) -> dict[str, Any]:
    """The settings that change what is in the shards."""
    return {
        "layout": LAYOUT_VERSION,
        "frames": config.frames,
        "stride": config.stride,
        "crop": config.crop,
        "crop_rows": list(config.crop_rows),
        "crop_columns": list(config.crop_columns),
        "centre_fraction": config.centre_fraction,
        "size": CROP_SIZE,
        "clips_per_shard": config.clips_per_shard,
        **({"tracker": TRACKER_VERSION} if config.crop in TRACKED_CROPS else {}),
        **_changed(config, ("word_context", "sentence_clips")),
        **({"decoder": config.decoder} if config.backend != "pyav" else {}),
    }


def _changed(config: PrepareConfig, names: Iterable[str]) -> dict[str, Any]:
    """Those of these settings about words that are not at their defaults, as JSON values."""
    values = {name: getattr(config, name) for name in names}
    return {name: _as_json(value) for name, value in values.items() if value != WORD_SETTINGS[name]}


def _as_json(value: object) -> object:
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else value


def _origin(config: PrepareConfig) -> dict[str, Any]:
    """What a data set is made from: the folder and all settings that change it."""
    return {"data": str(config.data.resolve())} | settings_of_clips(config) | _changed(config, WORD_SETTINGS)


def _begin(config: PrepareConfig, units: Sequence[Unit]) -> None:
    """Makes OUT and its folders, and claims OUT for this data set; ValueError as _claim."""
    if not config.out.is_dir():
        check_vacant(config.out, "one that avppc prepare began")
        config.out.mkdir(parents=True, exist_ok=True)
    with sole_use(config.out, wait=True):  # of two that begin at once, the second finds what the first one claims
        _claim(config, units)
    for folder in (SHARD_FOLDER, UNIT_FOLDER):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
        remove_leftovers(config.out / folder)


def _claim(config: PrepareConfig, units: Sequence[Unit]) -> None:
    """Writes prepare.json: the folder and the settings that OUT is made from, and how many units each split has.

    Raises:
        ValueError: OUT is made from another folder or with other settings, or holds files that are not a packed set's.
    """
    path = config.out / CLAIM_NAME
    wanted = _origin(config)
    known: dict[str, Any] = {}
    if path.exists():
        known = _read_claim(path, damaged=config.overwrite)
        keys = wanted.keys() | (WORD_SETTINGS.keys() & known.keys())
        differing = sorted(key for key in keys if known.get(key) != wanted.get(key))
        if differing and not config.overwrite:
            changes = "; ".join(f"{key} was {known.get(key)!r}, is {wanted.get(key)!r}" for key in differing)
            raise ValueError(f"{config.out} holds a data set made otherwise ({changes}); --overwrite replaces it")
    else:
        check_vacant(config.out, "one that avppc prepare began")
    counts = _count_units(units)
    before = known.get("units", {})
    # Those of a larger set that was here before remain known until they are removed.
    _write_claim(config, {split: max(counts.get(split, 0), before.get(split, 0)) for split in SPLITS})


def _read_claim(path: Path, damaged: bool = False) -> dict[str, Any]:
    """The content of a prepare.json; ValueError where it is none, so that OUT must not be written into.

    Args:
        damaged: whether one with a wrong checksum is read, too.
    """
    known = read_json(path) if damaged else read_checked_json(path)
    units = known.get("units", {}) if isinstance(known, dict) else None
    if (
        not isinstance(units, dict)
        or not {"data", "layout"} <= known.keys()
        or not all(split in SPLITS and type(count) is int and 0 <= count < 100_000 for split, count in units.items())
    ):
        raise ValueError(f"{path} was not written by avppc prepare: choose another folder")
    return dict(known)


def _write_claim(config: PrepareConfig, units: dict[str, int]) -> None:
    write_checked_json(
        config.out / CLAIM_NAME, _origin(config) | {"units": {split: n for split, n in units.items() if n}}
    )


def _count_units(units: Sequence[Unit]) -> dict[str, int]:
    """How many units each split has, from which their names follow."""
    return dict(Counter(unit.videos[0].split for unit in units))


def _finished(out: Path, units: Sequence[Unit], console: Console, verify: bool = True) -> dict[str, UnitRecord]:
    """Records of the units that are done and, with verify, whose shards are as they were written."""
    records = {}
    with ThreadPoolExecutor(2) as pool:
        checked = pool.map(lambda unit: _read_record(out, unit, verify), units)
        for unit, (record, problem) in zip(units, checked, strict=True):
            if record is not None:
                records[unit.name] = record
            elif problem:
                console.print(f"made anew: {problem}")
    if records and verify:
        console.print(f"{len(records)} of {len(units)} units were finished before and are intact")
    return records


def _read_record(out: Path, unit: Unit, verify: bool) -> tuple[UnitRecord | None, str]:
    """The record of a finished unit, or why there is none."""
    path = out / UNIT_FOLDER / f"{unit.name}.json"
    if not path.exists():
        return None, ""
    try:
        content = read_checked_json(path)
        if content["digest"] != unit.digest:
            return None, f"{unit.name} (its videos or the settings have changed)"
        record = UnitRecord(
            unit.digest,
            [parse_record(entry) for entry in content["shards"]],
            [(str(path), str(reason)) for path, reason in content["refused"]],
            [(str(path), str(note)) for path, note in content["notes"]],
            int(content.get("frames_searched", 0)),
            int(content.get("frames_with_face", 0)),
        )
        if any(reason.startswith((UNREADABLE, CHANGED, *PASSING)) for _, reason in record.refused):
            return None, f"{unit.name} (a video of it could not be read in time, or had changed)"
        for shard in record.shards:
            if (out / SHARD_FOLDER / shard.file).stat().st_size != shard.bytes:
                return None, f"{unit.name} ({shard.file} has another size than when it was written)"
        if verify:
            verify_shards(out / SHARD_FOLDER, record.shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{unit.name} ({error})"
    return record, ""


def _decode(config: PrepareConfig, todo: list[Unit], records: dict[str, UnitRecord], console: Console) -> None:
    videos = sum(len(unit.videos) for unit in todo)
    with ProgressBar("prepare", videos, "videos", rated="clips", console=console) as progress:
        for step in handle_units(DecodeJob(config), todo, config.processes, config.timeout_seconds):
            if step.unit is not None:
                records[step.unit.name] = step.record
            progress.advance(step.videos, step.clips)


def _write_index(config: PrepareConfig, found: Scan, units: list[Unit], records: dict[str, UnitRecord]) -> None:
    """Writes the index and the contact sheet."""
    splits = {
        split: tuple(shard for unit in units if unit.videos[0].split == split for shard in records[unit.name].shards)
        for split in SPLITS
    }
    splits = {split: shards for split, shards in splits.items() if shards}
    PackedIndex(ClipShape(config.frames, CROP_SIZE, CROP_SIZE), found.words, splits).write(config.out)
    with PackedDataset(config.out, next(iter(splits)), verify=False) as dataset:
        _write_sheet(dataset, config.out / SHEET_NAME)


def _remove_superseded(config: PrepareConfig, units: Sequence[Unit], records: dict[str, UnitRecord]) -> None:
    """Removes shards and units that are no part of the set any more, by the names that prepare.json keeps for them."""
    counts = _count_units(units)
    claimed = _read_claim(config.out / CLAIM_NAME).get("units", {})
    names = {unit_name(split, number) for split, count in claimed.items() for number in range(count)}
    kept = {shard.file for record in records.values() for shard in record.shards}
    shards = config.out / SHARD_FOLDER
    found = {path.name: SHARD_OF_UNIT.fullmatch(path.name) for path in shards.iterdir()}
    remove_files(shards, [name for name, match in found.items() if match and match[1] in names and name not in kept])
    remove_files(config.out / UNIT_FOLDER, [f"{name}.json" for name in names - records.keys()])
    if claimed != counts:
        _write_claim(config, counts)


def _write_sheet(dataset: PackedDataset, path: Path, *, rows: int = 12, columns: int = 10) -> None:
    """Writes a PNG: for some clips where they come from, and a row of their frames; below each frame how loud it is."""
    frames = spread(dataset.shape.frames, columns)
    strips = []
    for row in spread(len(dataset), rows).tolist():
        clip = dataset.batch(torch.tensor([row]))
        video: NDArray[np.uint8] = clip.video[0].numpy()
        power = clip.audio[0].double().view(-1, SAMPLES_PER_FRAME).square().mean(1).sqrt().numpy()
        loudness = power / max(power.max(), 1.0)
        strips.append((dataset.sources[row], strip([_with_sound(video[n], float(loudness[n])) for n in frames])))
    write_contact_sheet(path, strips)


def _with_sound(
    image: NDArray[np.uint8],  # [H, W]
    loudness: float,  # 0 to 1
) -> NDArray[np.uint8]:
    """The picture above a bar as long as the sound is loud."""
    height, width = image.shape
    cell = np.zeros((height + _SOUND_PIXELS + _GAP_PIXELS, width + _GAP_PIXELS), np.uint8)
    cell[:height, :width] = image
    cell[height + 4 : height + 12, : round(loudness * width)] = 200
    return cell
