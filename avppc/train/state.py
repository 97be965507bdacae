"""Checkpoints: safetensors for the tensors, JSON for the progress, each whole or absent."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avppc.files import read_json, sha256_of, sync_directory, write_json

FORMAT, VERSION = "avppc-checkpoint", 1
_PROGRESS = "progress.json"
_NAME = re.compile(r"step_\d{8,}")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One saved moment of a run."""

    directory: Path
    step: int
    """Steps done."""
    progress: dict[str, Any]
    """What else was saved as JSON."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under a name; ValueError if their file is damaged."""
        path = self.directory / f"{name}.safetensors"
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


class CheckpointStore:
    """The checkpoints of a run: `step_00000250/` has NAME.safetensors files, and progress.json with their checksums."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        directory.mkdir(parents=True, exist_ok=True)

    def clear_leftovers(self) -> None:
        """Removes what a run left that was killed while it saved; for the process that saves."""
        for leftover in self.directory.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> Path:
        """Saves under a temporary name, renames, and only then removes the oldest; OSError leaves the older ones."""
        final = self.directory / f"step_{step:08d}"
        temporary = self.directory / f".{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            checksums = {}
            for name, values in tensors.items():
                path = temporary / f"{name}.safetensors"
                _write_tensors(path, {key: value.detach().contiguous().cpu() for key, value in values.items()})
                checksums[path.name] = sha256_of(path)
            header = {"format": FORMAT, "version": VERSION, "step": step, "files": checksums}
            write_json(temporary / _PROGRESS, {**header, "progress": dict(progress)})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync_directory(self.directory)
        for old in self._directories()[self.keep :]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are logged and passed over."""
        for directory in self._directories():
            try:
                return read_checkpoint(directory)
            except (OSError, ValueError) as error:
                logger.warning("passing over a damaged checkpoint: %s", error)
        return None

    def newest_name(self) -> str | None:
        """The name of the newest checkpoint, whole or not."""
        return next((directory.name for directory in self._directories()), None)

    def _directories(self) -> list[Path]:
        """The checkpoints, newest first; whatever else is there is not ours and is left alone."""
        found = {
            int(path.name[5:]): path
            for path in self.directory.iterdir()
            if _NAME.fullmatch(path.name) and path.is_dir()
        }
        return [found[step] for step in sorted(found, reverse=True)]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Checks a checkpoint's progress.json and the checksums of its files; ValueError or OSError says what is wrong."""
    path = directory / _PROGRESS
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not the progress of an avppc checkpoint")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')!r}, this package reads version {VERSION}")
    step, files, progress = header.get("step"), header.get("files"), header.get("progress")
    if not isinstance(step, int) or not isinstance(files, dict) or not isinstance(progress, dict):
        raise ValueError(f"{path} lacks step, files or progress")
    if not files or not progress:
        raise ValueError(f"{path} names no files, or says nothing of the progress")
    for name, checksum in files.items():
        if Path(name).name != name:
            raise ValueError(f"{path} names a file outside its directory: {name!r}")
        if not (directory / name).is_file():
            raise ValueError(f"{path} names a file that is none: {name!r}")
        if sha256_of(directory / name) != checksum:
            raise ValueError(f"{directory / name} is damaged: its checksum is not the one in {_PROGRESS}")
    return Checkpoint(directory, step, progress)


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
            if value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)
        if state:
            optimizer.state[parameter] = state


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk, say: to the caller it is the same, whoever notices it
        raise OSError(f"{path}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
