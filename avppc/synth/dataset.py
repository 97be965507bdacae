"""The whole data set: what to make, who makes it, what is already there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avppc.checks import check_path
from avppc.clip import UNLABELED_FOLDER
from avppc.files import (
    check_vacant,
    name_in_errors,
    read_json_objects,
    remove_files,
    sha256_of,
    sole_use,
    write_json_lines,
)
from avppc.printing import ProgressBar, counted
from avppc.processes import ctrl_c_waits, process_context, process_pool
from avppc.settings import config_from_dict, config_to_dict, read_checked_json, write_checked_json
from avppc.synth.config import WORDS, SynthConfig

if TYPE_CHECKING:
    from avppc.synth.clip import Job

_FORMAT, _VERSION = "avppc talking mouths", 1
_SETTINGS, _MANIFEST, _JOURNAL, _SHEET = "synth.json", "manifest.jsonl", "manifest.partial.jsonl", "contact_sheet.png"
SUFFIXES = (".npy", ".txt", ".mp4")  # of the files of a clip
_HOW_NOT_WHAT = ("out", "workers", "overwrite")  # settings that leave the clips as they are
_SETTINGS_OF_OLD = {"look": "mouth"}  # of a data set from before there was a choice
_JOBS_IN_FLIGHT = 4  # a worker

Record = dict[str, Any]


def execute(config: SynthConfig) -> int:
    """Makes the data set, or what is missing of it; returns 0 when all of it is there, 1 when a worker died.

    Raises:
        ImportError: a package of avppc[synth] is missing.
        ValueError: config.out holds something else, or a data set of other settings.
    """
    _require_extras(config)
    if not config.out.is_dir():
        check_vacant(config.out, "one that avppc synth began")
    config.out.mkdir(parents=True, exist_ok=True)
    # Another process may be making another set here, or the same one: and espeak-ng says nothing twice alike.
    with sole_use(config.out):
        _claim_folder(config)
        return _make(config)


def _make(config: SynthConfig) -> int:
    jobs = list(plan(config))
    records = _finished(config.out)
    to_do = [job for job in jobs if f"{job.stem}.mp4" not in records]
    begin = time.perf_counter()
    try:
        _make_all(config, to_do, records, len(jobs))
    except BrokenProcessPool:
        done = len(_finished(config.out))
        print(
            f"A worker process died (killed, or out of memory). {done} of {len(jobs)} clips are finished and kept: "
            "the same command goes on from there.",
            file=sys.stderr,
        )
        return 1
    _write_manifest(config.out, [records[f"{job.stem}.mp4"] for job in jobs])
    _write_sheet(config.out, [f"{job.stem}.mp4" for job in jobs])
    seconds = time.perf_counter() - begin
    speed = f" in {seconds:.0f} s, {len(to_do) / seconds:.1f} clips/s" if to_do else ""
    clips = f"{counted(len(jobs), 'clip')} of {counted(config.words, 'word')}"
    print(f"{config.out}: {clips}, {len(to_do)} of them made now{speed}")
    return 0


def plan(config: SynthConfig) -> Iterator[Job]:
    """Every clip in the order of the manifest: one clip of every word, then the next of every word."""
    from avppc.synth.clip import Job

    counts = {"train": config.clips_per_word, "val": config.val_clips_per_word, "test": config.test_clips_per_word}
    for split, count in counts.items():
        for number in range(1, count + 1):
            for word in WORDS[: config.words]:
                yield Job(word, split, number, word)
    for number in range(1, config.extra_clips + 1):
        yield Job(UNLABELED_FOLDER, "train", number, None)


def _require_extras(config: SynthConfig) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("cv2", "espeakng_loader")):
        raise ImportError("avppc synth needs the extra packages: pip install 'avppc[synth]'")
    if config.look == "head":
        from avppc.synth.head import find_data

        find_data()


def _identity(config: SynthConfig) -> Record:
    """The settings that must be equal for a data set to be continued."""
    settings = {name: value for name, value in config_to_dict(config).items() if name not in _HOW_NOT_WHAT}
    settings["split_by"] = ",".join(config.split_kinds)
    return {"format": _FORMAT, "version": _VERSION, "config": settings}


def _claim_folder(config: SynthConfig) -> None:
    """Makes the folder ours: new, continued, or emptied of another data set where that is allowed."""
    root, wanted = config.out, _identity(config)
    path = root / _SETTINGS
    if path.exists():
        found = read_checked_json(path)
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"out: {path} is not of this program; choose another folder")
        differences = _differences(found, wanted)
        if not differences:
            return
        if not config.overwrite:
            raise ValueError(
                f"out: {root} holds a data set of other settings ({'; '.join(differences)}). "
                "Choose another folder, or overwrite=True (--overwrite) to delete it"
            )
        _delete(root, found)
    else:
        check_vacant(root, "one that avppc synth began")
    root.mkdir(parents=True, exist_ok=True)
    from avppc.synth.visemes import PARAMETERS

    words = list(WORDS[: config.words])
    folders = words + [UNLABELED_FOLDER] * bool(config.extra_clips)
    write_checked_json(path, wanted | {"words": words, "folders": folders, "mouth_columns": list(PARAMETERS)})


def _differences(found: Record, wanted: Record) -> list[str]:
    """What differs between two data sets, in words."""
    known = found.get("config")
    before = {"version": found.get("version"), **_SETTINGS_OF_OLD, **(known if isinstance(known, dict) else {})}
    now = {"version": wanted["version"], **wanted["config"]}
    return [
        f"{name} {before.get(name)!r} there, {value!r} here" for name, value in now.items() if before.get(name) != value
    ]


def _delete(root: Path, settings: Record) -> None:
    """Deletes the clips of a data set, by its manifest and by its settings, from which the names of all clips follow.

    The settings go last, so that a deletion cut short can be repeated; whatever else lies in the folder stays, even
    where `avppc index` has listed it in the manifest.
    """
    records = (record for name in (_MANIFEST, _JOURNAL) for record in read_records(root / name).values())
    stems = {record["path"].removesuffix(".mp4") for record in records if record.keys() >= {"voice", "seed"}}
    with contextlib.suppress(TypeError, ValueError):  # settings of another version
        before = config_from_dict(SynthConfig, {"out": str(root), **settings["config"]}, _SETTINGS)
        stems |= {job.stem for job in plan(before)}
    remove_files(root, [file for stem in stems for file in files_of(stem)])
    remove_files(root, [_MANIFEST, _JOURNAL, _SHEET, _SETTINGS])


def files_of(stem: str) -> list[str]:
    """Names of the files of a clip below the data set's folder, with those that a killed call leaves half written."""
    folder, _, name = stem.rpartition("/")
    return [f"{folder}/{file}" for suffix in SUFFIXES for file in (f"{name}{suffix}", f".{name}{suffix}.tmp")]


def _finished(root: Path) -> dict[str, Record]:
    """Records, by path, of the clips whose files are all there and whole."""
    records: dict[str, Record] = {}
    for name in (_MANIFEST, _JOURNAL):
        records |= read_records(root / name)
    return {path: record for path, record in records.items() if _is_whole(root / path, record["sha256"])}


def read_records(path: Path) -> dict[str, Record]:
    """The records in a manifest or journal, by path; what is none, such as a line cut short by a kill, is left out."""
    records: dict[str, Record] = {}
    for record in read_json_objects(path):
        if all(isinstance(record.get(key), str) for key in ("path", "sha256")):
            with contextlib.suppress(ValueError):
                check_path("path", record["path"])
                if record["path"].endswith(".mp4"):
                    records[record["path"]] = record
    return records


def _is_whole(video: Path, sha256: str) -> bool:
    return all(video.with_suffix(suffix).is_file() for suffix in SUFFIXES) and sha256_of(video) == sha256


def _make_all(config: SynthConfig, jobs: list[Job], records: dict[str, Record], total: int) -> None:
    """Makes the clips in worker processes, adding each to records and to the journal as it is finished."""
    if not jobs:
        return
    path = config.out / _JOURNAL
    with (
        name_in_errors(path),
        path.open("a", encoding="utf-8", buffering=1) as journal,
        ProgressBar("talking mouths", total, "clips", done=total - len(jobs)) as progress,
    ):
        journal.write("\n")  # a line cut short by a kill stays alone
        for record in _in_workers(config, jobs):
            journal.write(json.dumps(record) + "\n")
            records[record["path"]] = record
            progress.advance()


def _in_workers(config: SynthConfig, jobs: list[Job]) -> Iterator[Record]:
    """The records of the clips as they are finished, in any order."""
    from avppc.synth.worker import make_and_write, start_worker

    workers = min(config.worker_processes, len(jobs))
    pool = process_pool(workers, process_context("avppc.synth.worker"), start_worker, config)
    pending: set[Future[Record]] = set()
    try:
        for job in jobs:
            with ctrl_c_waits():  # the first one starts the processes
                pending.add(pool.submit(make_and_write, job))
            if len(pending) >= _JOBS_IN_FLIGHT * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in pending:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_manifest(root: Path, records: list[Record]) -> None:
    write_json_lines(root / _MANIFEST, records)
    remove_files(root, [_JOURNAL])


def _write_sheet(root: Path, names: list[str]) -> None:
    from avppc.synth.worker import write_contact_sheet

    if not (root / _SHEET).exists():
        write_contact_sheet(root, root / _SHEET, names)
