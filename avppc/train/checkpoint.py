"""Checkpoints: safetensors for the tensors, JSON for the progress, each whole or absent.

A thread writes them while training goes on. A full or failing disk is told as the system says it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from avppc.files import read_bytes, remove_files, remove_leftovers, sha256_of, sync_file, temporary_place
from avppc.models.encoder_file import PROGRESS_FILE
from avppc.settings import is_version, read_checked_json, write_checked_json

_NUMBER = re.compile(r"\(os error (\d+)\)|in read-only mode: .*\((\d+)\)")  # safetensors' words, and torch's
_NAME = re.compile(r"step_\d{8,}")
_TENSORS = re.compile(r"\w+\.safetensors", re.ASCII)
logger = logging.getLogger(__name__)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, contiguous and on the CPU; OSError where the disk is full or fails."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise _system_error(error, path) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file.

    Raises:
        ValueError: it is not a whole safetensors file.
        OSError: it cannot be read.
    """
    try:
        return load(read_bytes(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """As read_tensors, through a memory map: several processes that read one large file share its memory.

    A file that is cut short while the tensors are in use ends the process.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:  # so says the library of whatever keeps it from opening the file
        if path.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    except RuntimeError as error:
        raise _system_error(error, path) from error


def _system_error(error: Exception, path: Path) -> OSError:
    """The OSError behind an error of safetensors or torch, with the file's name."""
    found = _NUMBER.search(str(error))
    if found is None:
        return OSError(f"{path}: {error}")
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), str(path))


FORMAT, VERSION = "avppc-checkpoint", 1


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was saved after a step."""

    directory: Path
    step: int
    """Steps done."""
    progress: dict[str, Any]
    """What was saved beside the tensors, as JSON: the place in the data, say."""
    files: frozenset[str]
    """Names of the files in the directory."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under a name; ValueError if their file is damaged."""
        return read_tensors(self.directory / f"{name}.safetensors")

    def load_into(self, model: nn.Module) -> None:
        """Gives the model the weights saved as "model"; ValueError if they are those of another one."""
        try:
            model.load_state_dict(self.tensors("model"))
        except RuntimeError as error:
            why = " ".join(str(error).split())  # torch's own text has a line for each weight
            raise ValueError(f"{self.directory} is not a checkpoint of these settings: {why}") from error


class NoWholeCheckpoint(ValueError):
    """There are checkpoints, and all of them are damaged."""


class CheckpointStore:
    """The checkpoints of a run: `step_00000250/` has NAME.safetensors files, and progress.json with their checksums."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        self._damaged: set[str] = set()
        """Names of the checkpoints that were found damaged: they do not count as kept."""
        self._restored: Checkpoint | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def clear_leftovers(self) -> None:
        """Removes what a run left that was killed while it saved, and old checkpoints that could not be removed then.

        For the process that saves, after `latest`.
        """
        remove_leftovers(self.directory)
        if self._restored is not None:
            self._remove_old(self._restored.files)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> Path:
        """Saves under a temporary name, renames, and only then removes the oldest; OSError leaves the older ones.

        An old one that cannot be removed is logged, and stays.
        """
        final = self.directory / f"step_{step:08d}"
        checksums = {}
        with temporary_place(final) as temporary:
            temporary.mkdir()
            for name, values in tensors.items():
                path = temporary / f"{name}.safetensors"
                write_tensors(path, {key: value.detach().contiguous().cpu() for key, value in values.items()})
                sync_file(path)
                checksums[path.name] = sha256_of(path)
            header = {"format": FORMAT, "version": VERSION, "step": step, "files": checksums}
            write_checked_json(temporary / PROGRESS_FILE, {**header, "progress": dict(progress)})
            _give_usual_modes(temporary)
            names = {*checksums, PROGRESS_FILE}
            remove_files(self.directory, [f"{final.name}/{name}" for name in names])
            os.rename(temporary, final)
        self._damaged.discard(final.name)
        sync_file(self.directory)
        self._remove_old(names)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, None where there is none; damaged ones are logged and passed over.

        Raises:
            NoWholeCheckpoint: there are checkpoints, but all are damaged.
            OSError: one cannot be read for now, which does not say that it is damaged.
        """
        self._restored = newest_whole(self.directory, self._damaged)
        return self._restored

    def _remove_old(self, names: Collection[str]) -> None:
        """Removes all that is older than the newest `keep` whole ones; `names`: of the files of a checkpoint."""
        directories = self._directories()
        whole = [directory for directory in directories if directory.name not in self._damaged]
        if len(whole) <= self.keep:
            return
        for old in directories[directories.index(whole[self.keep - 1]) + 1 :]:
            try:
                if foreign := sorted(set(os.listdir(old)) - set(names)):
                    logger.warning("the old checkpoint %s stays: it also holds %s", old, foreign[0])
                    continue
                with temporary_place(old) as hidden:  # one of which only a part is removed is no checkpoint any more
                    os.rename(old, hidden)
                    remove_files(hidden, names)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be removed: %s", old, error)

    def newest_name(self) -> str | None:
        """The name of the newest checkpoint, whole or not."""
        return newest_checkpoint(self.directory)

    def _directories(self) -> list[Path]:
        return _checkpoints_in(self.directory)


def newest_checkpoint(directory: Path) -> str | None:
    """The name of the newest checkpoint in a directory, which may be missing, whether or not it is whole."""
    return next((path.name for path in _checkpoints_in(directory)), None) if directory.is_dir() else None


def newest_whole(directory: Path, damaged: set[str]) -> Checkpoint | None:
    """The newest whole checkpoint in a directory; raises as CheckpointStore.latest.

    Args:
        damaged: gets the names of the damaged ones.
    """
    problems = []
    for place in _checkpoints_in(directory):
        try:
            return read_checkpoint(place)
        except ValueError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
            damaged.add(place.name)
            problems.append(str(error))
        except OSError as error:
            raise OSError(
                f"the checkpoint {place} cannot be read for now ({error}): nothing is changed; to go on from an older "
                "one, move this one away"
            ) from error
    if problems:
        raise NoWholeCheckpoint(
            f"{directory} holds {len(problems)} checkpoints, and none is whole: {'; '.join(problems[:3])}"
        )
    return None


def _checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints, newest first; whatever else is there is not ours and is left alone."""
    found = {
        int(path.name[5:]): path
        for path in directory.iterdir()
        if _NAME.fullmatch(path.name) and not path.is_file()  # one that cannot be looked at is one, too
    }
    return [found[step] for step in sorted(found, reverse=True)]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Checks a checkpoint's progress.json and the checksums of its files.

    Raises:
        ValueError: it is damaged, or of another version; the text says in what.
        OSError: it cannot be read, whether or not it is damaged.
    """
    path = directory / PROGRESS_FILE
    if not _is_file(path):
        raise ValueError(f"{path} is missing")
    header = read_checked_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not the progress of an avppc checkpoint")
    if not is_version(header.get("version"), VERSION):
        raise ValueError(f"{path} has version {header.get('version')!r}, this package reads version {VERSION}")
    step, files, progress = header.get("step"), header.get("files"), header.get("progress")
    if type(step) is not int or not isinstance(files, dict) or not isinstance(progress, dict):
        raise ValueError(f"{path} lacks step, files or progress")
    if _NAME.fullmatch(directory.name) and int(directory.name[5:]) != step:
        raise ValueError(f"{path} is of step {step}, which is not that of its directory")
    if not files or not progress:
        raise ValueError(f"{path} names no files, or says nothing of the progress")
    for name, checksum in files.items():
        if not _TENSORS.fullmatch(name) or not _is_file(directory / name):
            raise ValueError(f"{path} names a file that is none: {name!r}")
        if sha256_of(directory / name) != checksum:
            raise ValueError(f"{directory / name} is damaged: its checksum is not the one in {PROGRESS_FILE}")
    return Checkpoint(directory, step, progress, frozenset({*files, PROGRESS_FILE}))


def _is_file(path: Path) -> bool:
    """Whether there is such a file; OSError where that cannot be told."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _give_usual_modes(directory: Path) -> None:
    """Gives the tensors' files, which safetensors makes for their owner alone, the mode of files made as usual."""
    mode = stat.S_IMODE((directory / PROGRESS_FILE).stat().st_mode)
    with contextlib.suppress(OSError):  # some file systems know no modes
        for path in directory.iterdir():
            path.chmod(mode)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state, each tensor under "PARAMETER.KEY"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` gave, in each parameter's memory layout, so that the arithmetic repeats."""
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        state = {key: value for key, value in state.items() if "." not in key}
        for key, value in state.items():
            # "step" is a count; else a 0-d value is of a parameter that had 0 dimensions once and now has one
            if value.shape == parameter.shape or (key != "step" and value.ndim == 0 and parameter.shape == (1,)):
                state[key] = torch.empty_like(parameter).copy_(value)
        if state:
            optimizer.state[parameter] = state


class CheckpointSaver:
    """Copies the tensors, then lets a thread write them; a checkpoint waits for the one before it.

    If one cannot be written (a full disk), the log says so and the older ones stay; only `finish` raises.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> None:
        """Returns as soon as the tensors are copied."""
        self._join()
        copies = {name: {key: _copy(value) for key, value in group.items()} for name, group in tensors.items()}
        # Not a daemon: a process that ends by an exception still finishes its file.
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(progress)), name="avppc-saver")
        self._thread.start()

    def finish(self) -> None:
        """Waits for the last checkpoint; OSError if it could not be written."""
        self._join()
        if self._error is not None:
            raise OSError(f"the last checkpoint is missing: {self._error}") from self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> None:
        self._error = None
        try:
            self._store.save(step, tensors, progress)
        except Exception as error:  # whatever it is, training goes on: the next checkpoint may be written
            self._error = error
            try:
                newest = self._store.newest_name()
                kept = f"{newest} is kept" if newest else "there is none yet"
            except OSError:  # a broken disk that does not even tell
                kept = "whether an older one is there cannot be read"
            logger.warning("the checkpoint of step %d could not be written (%s); %s", step, error, kept)


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
