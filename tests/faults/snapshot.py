"""What a command has left in a folder, times and the like left out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

_TIMES = {"seconds", "clips_per_second", "data_wait", "checksum"}  # of a file with such a time
_SYNTHETIC = {"path", "word", "split", "speaker", "face", "voice", "seed"}
"""What is the same of a synthetic clip however often it is made: espeak-ng says nothing twice alike."""
_DRAWN = re.compile(r"(?<=\.)[0-9a-f]{8}-\d+-[0-9a-f]{8}(?=/|$)|(?<=/events\.out\.tfevents\.).*")
_DURATION = re.compile(r"\b[\d.]+[ \u00a0](s|min|h)\b")  # as pages write it


def snapshot(folder: Path) -> dict[str, Any]:
    """What is at each path below a folder: None for a directory, else what its content says."""
    found: dict[str, Any] = {}
    synthetic = {path.parent for path in folder.rglob("synth.json")}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.parent.name == "tensorboard":  # a run that was resumed has more event files
            found[str(path.parent.relative_to(folder) / "events")] = path.name.startswith("events.out.tfevents")
        elif path.name == "train.log":  # times of day, and the beginning and end of each of its calls
            found[name] = bool(path.stat().st_size)
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = _content(path, any(root in path.parents for root in synthetic))
    return found


def state(folders: Iterable[Path], root: Path) -> str:
    """All that a command which starts now can see in the folders: equal texts mean that it will do the same.

    More than snapshot has: also what is half written. Left out are times of day and what is drawn by lot: the numbers
    in temporary names; and a checksum of such times.

    Args:
        root: what the paths in the files may begin with, left out, too.
    """
    lines = []
    for folder in folders:
        for path in folder.rglob("*"):
            found = path.lstat()
            name = _DRAWN.sub("drawn", str(path))
            if "/pymp-" in name:  # Python's own folder, which multiprocessing makes and removes
                continue
            if not path.is_file():
                lines.append(f"{name} {found.st_mode}")
                continue
            try:  # no command reads TensorBoard's files or train.log, which hold times
                unread = path.parent.name == "tensorboard" or path.name == "train.log"
                content = None if unread else _content(path, synthetic=False)
            except (ValueError, zipfile.BadZipFile):  # half of it
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{name} {found.st_mode} {content!r}")
    return "\n".join(sorted(lines)).replace(str(root), "")


def _content(path: Path, synthetic: bool) -> Any:
    content = path.read_bytes()
    if path.suffix == ".json":
        return _without(json.loads(content), _TIMES)
    if path.suffix == ".jsonl":
        lines = [_without(_parsed(line), _TIMES) for line in content.splitlines()]
        return [{key: line[key] for key in line.keys() & _SYNTHETIC} for line in lines] if synthetic else lines
    if synthetic:
        return bool(content)
    if path.suffix == ".npz":  # holds the time of day
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in arrays.files}
    if path.suffix == ".csv":
        return [_without(row, _TIMES) for row in csv.DictReader(io.StringIO(content.decode()))]
    if path.suffix in (".html", ".md"):
        return _DURATION.sub("some time", content.decode())
    return hashlib.sha256(content).hexdigest()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # cut short
        return {"cut": line.decode(errors="replace")}


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(entry, names) for key, entry in value.items() if key not in names}
    return [_without(entry, names) for entry in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """In what a folder differs, a line each; files that match one of the patterns may differ or be missing."""

    def kept(folder: dict[str, Any]) -> dict[str, Any]:
        return {path: what for path, what in folder.items() if not any(fnmatch(path, pattern) for pattern in ignored)}

    expected, found = kept(expected), kept(found)
    lines = [f"{name} is left" for name in sorted(found.keys() - expected.keys())]
    lines += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            lines.append(f"{name} differs{_first_difference(expected[name], found[name])}")
    return lines


def _first_difference(expected: Any, found: Any) -> str:
    if isinstance(expected, bool | str | None) and isinstance(found, bool | str | None):
        if not (isinstance(expected, str) and isinstance(found, str) and re.search(r"\s", expected)):
            return ""
        expected, found = expected.splitlines(), found.splitlines()
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(one, two) for one, two in zip(expected, found, strict=True) if one != two]
        return f": {str(pairs[0][0])[:150]} was {str(pairs[0][1])[:150]}" if pairs else ""
    return f": {str(expected)[:150]} was {str(found)[:150]}"
