"""The directory of a run: its configuration, and the refusal to mix two runs in one place.

Before the first step all processes are asked whether they train alike: else they would wait for each other, or mix two
runs.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avppc._version import __version__
from avppc.data.config import LoaderName
from avppc.data.packed.remote import remote_url
from avppc.data.source import DataSource
from avppc.files import parse_json, read_bytes, write_json_lines
from avppc.models.encoder_file import (
    ENCODER_FILE,
    ENCODER_PREFIX,
    find_encoder,
    load_encoder,
    of_encoder,
    pretrained_names,
    weights_sha256,
)
from avppc.settings import config_from_dict, config_to_dict, read_checked_json, write_checked_json
from avppc.tasks.base import ProxyTask
from avppc.train.checkpoint import newest_checkpoint, newest_whole
from avppc.train.config import InitParts, PretrainConfig
from avppc.train.distributed import Processes
from avppc.train.hardware import use_bf16

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
TASK_FILE = "task.json"
ENVIRONMENT_FILE = "environment.json"
REFUSED_FILE = "refused.jsonl"
VIDEOS_FILE = "videos.jsonl"
"""The training videos of a run on a folder of videos, whose clips it sees when it goes on, too."""
INIT_FILE = "init.json"
_ROUNDING_ALONE = ("device", "threads")  # settings that change what is learned by no more than rounding
_HOW_NOT_WHAT = ("log_every", "logger", "checkpoint_every", "keep_checkpoints", "verify_data")
_OF_THE_MACHINE = ("scale.activation_checkpointing", "scale.compile", "scale.max_skipped_steps")
_OF_THE_CALL = ("out", "start_anew", "workers")  # settings of one call of the command; a run's directory may move
_SHAPING = ("task", "encoder", "objective", "audio_width", "features", "baselines")  # settings that weights depend on
_FIRST_FILES = {DATA_FILE, VIDEOS_FILE, REFUSED_FILE, INIT_FILE, TASK_FILE, ENVIRONMENT_FILE}  # before config.json
logger = logging.getLogger(__name__)

# what lies in `data` is compared by its checksum
_OF_EACH_PROCESS = ("data", "out", "device", "threads", "workers")


def open_run(
    config: PretrainConfig,
    clips: str,
    task: Mapping[str, Any],
    videos: Mapping[str, str] | None = None,
    refused: Iterable[tuple[str, str]] = (),
    initial: Mapping[str, Any] | None = None,
) -> None:
    """Makes a run of the directory config.out, which is there, or checks that the run in it is this one.

    config.json is written last: with it the run is there, whole. What an interrupted call has left before that is
    completed.

    Args:
        clips: split_sha256 of the training clips.
        task: the task's own description of its metrics.
        videos: SHA-256 by path of the training videos, where the clips are not packed.
        refused: videos that could not be used, or clips of them, and why.
        initial: of `begin_from`, where the run has done no step.

    Raises:
        ValueError: the directory holds a run with other settings, which the text names, or on other clips, or one that
            began from other weights.
    """
    path = config.out / CONFIG_FILE
    # Where the clips lie must mean the same from every folder in which a later command is started.
    lasting = {"data": _lasting_place(config.data), "init_from": _lasting_source(config.init_from)}
    wanted = config_to_dict(replace(config, start_anew=False)) | lasting
    exists = path.exists()
    known = clips_of(config.out)
    if exists:
        there = config_to_dict(read_run_config(config.out))
        _check_same_run(config, wanted, there, clips, known)
        if known is None and _has_checkpoints(config.out):
            logger.warning(
                "%s did not hold the checksum of its clips; from now on it holds that of %s", config.out, config.data
            )
    elif not _may_begin(config.out, known):
        raise ValueError(f"{config.out} is not empty and holds no run: give another --out")
    if known != clips:
        if videos is not None:
            lines = ({"path": path, "sha256": digest} for path, digest in videos.items())
            write_json_lines(config.out / VIDEOS_FILE, lines)
            write_json_lines(config.out / REFUSED_FILE, ({"path": path, "reason": reason} for path, reason in refused))
        write_checked_json(config.out / DATA_FILE, {"train_sha256": clips})
    if initial is not None:
        _record_initial(config, initial)
    write_checked_json(config.out / TASK_FILE, task)
    if not exists or not (config.out / ENVIRONMENT_FILE).exists():
        versions = {"avppc": __version__, "torch": torch.__version__, "python": platform.python_version()}
        write_checked_json(config.out / ENVIRONMENT_FILE, {**versions, "machine": platform.machine()})
    if not exists:
        write_checked_json(path, wanted)
    elif there != wanted | {"out": there["out"]}:  # the clips have moved, or it goes on in another way
        _tell_of_rounding(config, there)
        write_checked_json(path, {**wanted, "out": there["out"]})


def _record_initial(config: PretrainConfig, initial: Mapping[str, Any]) -> None:
    """Writes init.json, or checks that it is there and of the same weights."""
    path = config.out / INIT_FILE
    before = read_checked_json(path) if path.exists() else initial
    if not isinstance(before, dict) or before.get("weights_sha256") != initial["weights_sha256"]:
        raise ValueError(
            f"{config.out} holds a run that began from other weights than those that are at {initial['from']} now "
            f"({path} has their checksum); give another --out"
        )
    if not path.exists():
        write_checked_json(path, initial)


def _tell_of_rounding(config: PretrainConfig, there: Mapping[str, Any]) -> None:
    now = config_to_dict(config)
    for name in _ROUNDING_ALONE:
        if now[name] != there[name]:
            what = f"goes on with {name} {now[name]!r} instead of {there[name]!r}"
            logger.warning("%s %s: the same but for rounding", config.out, what)


def _check_same_run(
    config: PretrainConfig, wanted: dict[str, Any], there: dict[str, Any], clips: str, known: str | None
) -> None:
    """ValueError unless the run in config.out has these settings and, where it says which, these clips."""
    if known not in (None, clips):
        raise ValueError(
            f"{config.out} holds a run on other clips: those of {config.data} have the checksum {clips}, "
            f"the run's {known}; give the same clips to go on with it, or another --out"
        )
    wanted, there = _places(wanted), _places(there)
    if known is not None:
        there = there | {"data": wanted["data"]}  # the same clips, wherever they lie
    free = {*_ROUNDING_ALONE, *_HOW_NOT_WHAT, *_OF_THE_MACHINE}
    differing = sorted(line for line in differences(wanted, there) if line.partition(" is ")[0] not in free)
    if differing:
        longer = f"; to train longer, give another --out and --init-from {config.out} --init-parts all"
        raise ValueError(
            f"{config.out} holds a run with other settings ({'; '.join(differing[:5])}): give the same settings to go "
            f"on with it, or another --out{longer if wanted['steps'] != there['steps'] else ''}"
        )


def _may_begin(run: Path, known_clips: str | None) -> bool:
    """Whether a directory is empty but for what a call that was interrupted before it wrote config.json has left."""
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}  # hidden: it may be half written
    return not names or (known_clips is not None and names <= _FIRST_FILES)


def _has_checkpoints(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(folder.iterdir())


def begin_from(source: str, parts: InitParts, task: ProxyTask, config: PretrainConfig) -> dict[str, Any]:
    """Gives a task the weights that a run begins from.

    Args:
        source: the directory of a run, finished or not, an encoder file, or the name of a pretrained encoder.
        parts: "encoder", or "all" that the task has.

    Returns:
        What is to be known of them later: where they come from, which they are, their checksum.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: it is damaged, or its weights are not those of such a task; the text names one.
    """
    place, weights, there = _weights_at(source, parts)
    own, shaping = task.state_dict(), ("encoder",) if parts == "encoder" else _SHAPING
    if parts == "encoder":
        own, weights = of_encoder(own), of_encoder(weights)
    here = config_to_dict(config)
    differing = differences({name: here[name] for name in shaping}, {name: there[name] for name in shaping})
    _check_weights_fit(place, weights, own, differing)
    if parts == "encoder" and differing:
        logger.warning("the encoder in %s was trained for other pictures: %s", place, "; ".join(differing))
    task.load_state_dict({**task.state_dict(), **weights})
    checksum = weights_sha256(weights)
    return {"from": os.path.abspath(place), "parts": parts, "tensors": len(weights), "weights_sha256": checksum}


def _weights_at(source: str, parts: InitParts) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file or directory at a source, its weights by their names in a task, and the settings known of them."""
    run, checkpoints = Path(source), Path(source) / "checkpoints"
    has_checkpoint = newest_checkpoint(checkpoints) is not None
    if parts == "all" and not has_checkpoint:
        raise ValueError(f"init_parts='all' needs the directory of a run with a checkpoint, got init_from={source}")
    if parts == "all" or (has_checkpoint and not (run / ENCODER_FILE).exists()):
        checkpoint = newest_whole(checkpoints, set())
        assert checkpoint is not None
        return checkpoint.directory, checkpoint.tensors("model"), config_to_dict(read_run_config(run))
    file = find_encoder(source)
    encoder = load_encoder(file)
    weights = {f"{ENCODER_PREFIX}{name}": value for name, value in encoder.state_dict().items()}
    return file, weights, {"encoder": config_to_dict(encoder.config)}


def _check_weights_fit(
    file: Path, found: Mapping[str, Tensor], allowed: Mapping[str, Tensor], differing: list[str]
) -> None:
    """ValueError unless a run's weights have the names, types and shapes of those to be replaced."""
    settings = f" (settings: {'; '.join(differing[:5])})" if differing else ""
    for name in [*allowed, *found]:
        here, there = (_kind(tensors[name]) if name in tensors else "none" for tensors in (allowed, found))
        if here != there:
            raise ValueError(f"init_from: {name} is {there} in {file}, this task needs {here}{settings}")


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def read_run_config(run: Path) -> PretrainConfig:
    """The configuration of the run in a directory."""
    path = run / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{run} holds no run: there is no {CONFIG_FILE}")
    return config_from_dict(PretrainConfig, read_checked_json(path), str(path))


def clips_of(run: Path) -> str | None:
    """The split_sha256 of a run's training clips; None where it was not kept."""
    path = run / DATA_FILE
    content = read_checked_json(path) if path.exists() else {}
    if not isinstance(content, dict) or not isinstance(content.get("train_sha256"), str | None):
        raise ValueError(f"{path} must hold the train_sha256 of a run's clips, got {content!r}")
    return content.get("train_sha256")


def videos_of(run: Path) -> dict[str, str] | None:
    """SHA-256 by path of the training videos of a run; None where its clips were packed.

    Raises:
        ValueError: a line of the file is damaged.
    """
    path = run / VIDEOS_FILE
    if not path.exists() or clips_of(run) is None:  # a call that was interrupted may have left a part of it
        return None
    try:
        lines = [parse_json(line) for line in read_bytes(path).splitlines()]
        return {str(line["path"]): str(line["sha256"]) for line in lines}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def find_source(run: Path, given: Path | None, loader: LoaderName = "auto") -> DataSource:
    """The data set given by hand, else the run's own, whatever is there; videos are cut as the run's were.

    Args:
        loader: "auto": of videos the run's own decoder, but for DALI, which decodes for training alone.

    Raises:
        ValueError: videos are given for a run on packed clips, which does not say how these were cut.
    """
    config, by_videos = read_run_config(run), (run / VIDEOS_FILE).exists()
    source = DataSource(given or config.data, loader, config.videos)
    if loader == "auto" and by_videos and config.loader != "dali" and not source.is_packed:
        source = replace(source, loader=config.loader)
    if given is not None and not by_videos and not source.is_packed:
        raise ValueError(
            f"{given} is not a packed data set, and {run} was trained on one, which does not say how its clips were "
            "cut: pack its videos, too (`avppc prepare`)"
        )
    return source


def source_of(run: Path, given: Path | None, loader: LoaderName = "auto") -> DataSource:
    """The data set that goes with a run: as find_source, but the run's own is there and what it was.

    That another set was given than the run was trained on is logged.

    Raises:
        ValueError: as find_source; or none was given, and what lies at the place of the run's clips are other clips, or
            none.
    """
    known, source = clips_of(run), find_source(run, given, loader)
    if given is not None:
        if known is not None and _train_sha256(source) not in (None, known):
            logger.warning("%s was trained on other clips than those of %s", run, given)
        return source
    if known is None:
        return source
    data, found = source.data, _train_sha256(source)
    if found != known:
        where = "" if data.is_absolute() or remote_url(data) else f" (seen from {Path.cwd()})"
        kind = "training clips" if (run / VIDEOS_FILE).exists() else "packed training clips"
        what = f"no {kind} are there" if found is None else f"the clips there have the checksum {found}"
        raise ValueError(
            f"{run} was trained on clips of {data}{where} with the checksum {known}, but {what}: "
            "give the place of its clips by --data"
        )
    return source


def data_of(run: Path, given: Path | None) -> Path:
    """Where the data set of source_of lies; errors as source_of."""
    return source_of(run, given).data


def _train_sha256(source: DataSource) -> str | None:
    try:
        return source.split_sha256("train")
    except ValueError:  # no such set, or one without training clips
        return None


def is_same_run(config: PretrainConfig, clips: str) -> bool:
    """Whether the run in config.out has these settings and clips; what does not change what is learned may differ."""
    wanted, there = config_to_dict(config), config_to_dict(read_run_config(config.out))
    try:
        _check_same_run(config, wanted, there, clips, clips_of(config.out))
    except ValueError:
        return False
    return True


def _lasting_place(data: Path) -> str:
    """The address or absolute path of a data set, to be kept in a file."""
    return remote_url(data) or os.path.abspath(data)


def _lasting_source(source: str) -> str:
    """The name or absolute path of what a run begins from, to be kept in a file."""
    is_name = not source or source.startswith("hf:") or (source in pretrained_names() and not Path(source).exists())
    return source if is_name else os.path.abspath(source)


def _places(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to compare: without those of one call, and with paths in one spelling."""
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_CALL}
    data = remote_url(kept["data"]) or os.path.realpath(kept["data"])
    return kept | {"data": data, "init_from": _lasting_source(kept["init_from"])}


def differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    """A line for each setting, named from the outermost group in, that has another value in `found`."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        lines = []
        for key in sorted(wanted.keys() | found.keys()):
            lines += differences(wanted.get(key), found.get(key), f"{name}.{key}" if name else str(key))
        return lines
    return [] if wanted == found else [f"{name} is {found!r} there, {wanted!r} here"]


def check_same_training(config: PretrainConfig, clips: str, processes: Processes) -> None:
    """Raises ValueError on every process unless all have the settings, clips and precision of process 0.

    Args:
        config: this process's settings.
        clips: the checksum of its training clips.
        processes: those of the run.
    """
    if processes.size == 1:
        return
    settings = {name: value for name, value in config_to_dict(config).items() if name not in _OF_EACH_PROCESS}
    precision = "bf16" if use_bf16(config.precision, processes.device) else "fp32"
    versions = {"avppc": __version__, "torch": torch.__version__.split("+")[0]}
    # through text and back: tuples become lists on this side, too
    own = json.loads(json.dumps({**settings, "precision": precision, "checksum of the clips": clips, **versions}))
    first = _of_main(own)

    def compare() -> None:
        if differing := differences(own, first):
            raise ValueError(
                f"process {processes.rank} cannot train together with process 0: {'; '.join(differing[:5])}"
            )

    processes.all_or_none(compare)


def _of_main(value: Any) -> Any:
    """On every process, the JSON value that process 0 has."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(text))
    dist.broadcast(length, 0)
    received = text if dist.get_rank() == 0 else text.new_empty(int(length))
    dist.broadcast(received, 0)
    return json.loads(received.numpy().tobytes())
