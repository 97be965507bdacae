"""The directory of a run: its configuration, and the refusal to mix two runs in one place."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from avppc._version import __version__
from avppc.config.plain import config_from_dict, config_to_dict
from avppc.config.pretrain import PretrainConfig
from avppc.data.packed import split_sha256
from avppc.data.remote import remote_url
from avppc.files import read_json, write_json

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
TASK_FILE = "task.json"
ENVIRONMENT_FILE = "environment.json"
_HOW_NOT_WHAT = ("device", "threads")  # settings that change what is learned by rounding alone


def open_run(config: PretrainConfig) -> None:
    """Makes the run's directory, or checks that the run in it is this one.

    Raises:
        ValueError: the directory holds a run with other settings, which the text names, or on other clips.
    """
    clips = split_sha256(config.data, "train")
    path = config.out / CONFIG_FILE
    wanted = config_to_dict(config)
    if path.exists():
        differing = sorted(_differences(_places(wanted), _places(read_json(path))))
        if differing:
            raise ValueError(
                f"{config.out} holds a run with other settings ({'; '.join(differing[:5])}): "
                "give the same settings to go on with it, or another --out"
            )
        if (known := clips_of(config.out)) not in (None, clips):
            raise ValueError(
                f"{config.out} holds a run on other clips: those of {config.data} have the checksum {clips}, "
                f"the run's {known}; give the same clips to go on with it, or another --out"
            )
        return
    # A killed run may have been writing hidden files.
    if config.out.exists() and any(not path.name.startswith(".") for path in config.out.iterdir()):
        raise ValueError(f"{config.out} is not empty and holds no run: give another --out")
    write_json(path, wanted)
    write_json(config.out / DATA_FILE, {"train_sha256": clips})
    versions = {"avppc": __version__, "torch": torch.__version__, "python": platform.python_version()}
    write_json(config.out / ENVIRONMENT_FILE, {**versions, "machine": platform.machine()})


def read_run_config(run: Path) -> PretrainConfig:
    """The configuration of the run in a directory."""
    path = run / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{run} holds no run: there is no {CONFIG_FILE}")
    return config_from_dict(PretrainConfig, read_json(path), str(path))


def clips_of(run: Path) -> str | None:
    """The split_sha256 of a run's training clips; None where it was not kept."""
    path = run / DATA_FILE
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict) or not isinstance(content.get("train_sha256"), str | None):
        raise ValueError(f"{path} must hold the train_sha256 of a run's clips, got {content!r}")
    return content.get("train_sha256")


def same_run(first: PretrainConfig, second: PretrainConfig) -> bool:
    """Whether these are settings of one run: directory, device and threads may differ; the data's real path may not."""
    return _what_is_learned(first) == _what_is_learned(second)


def _what_is_learned(config: PretrainConfig) -> dict[str, Any]:
    return {name: value for name, value in _places(config_to_dict(config)).items() if name not in _HOW_NOT_WHAT}


def _places(config: Any) -> Any:
    """The settings without the run's own directory, which may move, and with the data's path in one spelling."""
    if not isinstance(config, dict):
        return config
    kept = {name: value for name, value in config.items() if name != "out"}
    if isinstance(data := kept.get("data"), str):
        kept["data"] = remote_url(data) or os.path.realpath(data)
    return kept


def _differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        lines = []
        for key in sorted(wanted.keys() | found.keys()):
            lines += _differences(wanted.get(key), found.get(key), f"{name}.{key}" if name else str(key))
        return lines
    return [] if wanted == found else [f"{name} is {found!r} there, {wanted!r} here"]
