"""One file that holds a visual encoder, or a model around one: safetensors with its configuration in the header.

On the Hugging Face Hub an encoder is two files, as huggingface_hub's PyTorchModelHubMixin has them: config.json, the
configuration, and model.safetensors, which is such a file as well, or holds the weights alone if others wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from avppc.checks import check_path
from avppc.files import read_bytes, read_json, sha256_of, write_atomically, write_json
from avppc.models.config import EncoderConfig
from avppc.models.encoders import VideoEncoder
from avppc.settings import (
    config_from_dict,
    config_to_dict,
    is_version,
    parse_checked_json,
    read_checked_json,
    with_checksum,
)

Model = TypeVar("Model", bound=nn.Module)

FORMAT, VERSION = "avppc-encoder", 1
OWN_FORMAT = "avppc-own-encoder"
ENCODER_FILE = "encoder.safetensors"
ENCODER_PREFIX = "video_encoder."  # begins the names of its weights in a task, as checkpoints hold them
PROGRESS_FILE = "progress.json"  # of a checkpoint
HUB_CONFIG, HUB_WEIGHTS = "config.json", "model.safetensors"
_ON_HUB = re.compile(r"hf:/{1,2}(?P<repository>[^@]*)(@(?P<revision>.+))?")  # a Path makes one stroke of two
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
PRETRAINED = Path(__file__).parent / "pretrained"  # encoders that the package brings, by the names of their files


def save_encoder(encoder: VideoEncoder, path: Path) -> None:
    """Writes the encoder's weights and configuration, atomically."""
    header = {"format": FORMAT, "version": VERSION, "config": config_to_dict(encoder.config)}
    write_model(path, encoder.state_dict(), header)


def save_own_encoder(module: nn.Module, path: Path) -> None:
    """Writes the weights of a module of one's own, atomically; safetensors.torch.load_model(module, path) reads it."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    write_model(path, module.state_dict(), {"format": OWN_FORMAT, "version": VERSION, "class": name})


def write_model(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes weights with a header, whose members are JSON values, "format" and "version" among them, atomically."""
    from safetensors.torch import save

    tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    # One entry: the order of several would differ from one saving to the next.
    metadata = {"avppc": json.dumps(with_checksum({**header, "weights_sha256": weights_sha256(tensors)}))}
    write_atomically(path, save(tensors, metadata))


def pretrained_names() -> list[str]:
    """Names of the encoders that the package brings."""
    return sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))


def find_encoder(path: str | os.PathLike[str]) -> Path:
    """The encoder file at a path, in the directory of a finished run or an export, or of a pretrained encoder's name.

    One on the Hub, hf://USER/NAME or hf://USER/NAME@REVISION, is fetched into huggingface_hub's cache. A file or
    directory comes before a pretrained encoder of the same name.

    Raises:
        FileNotFoundError: there is none.
        ImportError: it is on the Hub, and huggingface_hub is missing.
        OSError: the Hub cannot be reached, or refuses.
    """
    check_path("path", path)
    if found := _ON_HUB.fullmatch(os.fspath(path)):
        return _fetch(found["repository"], found["revision"])
    file = Path(path)
    if not file.exists() and os.fspath(path) in pretrained_names():
        return PRETRAINED / f"{os.fspath(path)}.safetensors"
    if file.is_dir():
        file = next(
            (file / name for name in (ENCODER_FILE, HUB_WEIGHTS) if (file / name).exists()), file / ENCODER_FILE
        )
    if not file.is_file():
        stopped = sorted(file.parent.glob("checkpoints/step_*"), key=lambda folder: (len(folder.name), folder.name))
        if stopped:
            raise FileNotFoundError(f"the run in {file.parent} is not finished; its newest encoder is in {stopped[-1]}")
        raise FileNotFoundError(
            f"there is no encoder at {file}: give an encoder file, the directory of a finished run or of an export "
            f"with safetensors, the name of a pretrained encoder ({', '.join(pretrained_names())}), or hf://USER/NAME"
        )
    return file


def load_encoder(path: str | os.PathLike[str]) -> VideoEncoder:
    """A pretrained VideoEncoder in eval mode.

    `crop_video` of avppc.data.augment makes its input from the stored [N, T, 96, 96] uint8 crops.

    Args:
        path: an encoder file; the directory of a finished run, of one of a run's checkpoints or of an export;
            "talking-mouths", the encoder that comes with the package, trained on synthetic mouths as `make demo` trains
            its own; or "hf://USER/NAME", an encoder on the Hugging Face Hub, "hf://USER/NAME@REVISION" for a branch,
            tag or commit (needs the extra [hub]).

    Raises:
        FileNotFoundError: there is no such file, name, repository or revision, or the run has not finished.
        ValueError: the file is not an encoder file, or is damaged; the text names it.
        ImportError: it is on the Hub, and huggingface_hub is missing.
        OSError: the Hub cannot be reached, or refuses.

    Examples:
        >>> encoder = load_encoder("talking-mouths")
        >>> encoder(torch.zeros(2, 29, 32, 32)).shape
        torch.Size([2, 29, 64])
        >>> encoder = load_encoder("runs/demo")                             # doctest: +SKIP
    """
    file = find_encoder(path)
    if file.name == HUB_WEIGHTS:
        load = _load_of_checkpoint if file.with_name(PROGRESS_FILE).exists() else _load_hub_files
        return load(file).eval()
    values, weights = read_model(file, FORMAT, VERSION)
    config = config_from_dict(EncoderConfig, values.get("config"), str(file))
    encoder = make_model(file, lambda: VideoEncoder(config), values, weights)
    return encoder.eval()


def _load_hub_files(file: Path) -> VideoEncoder:
    """The encoder in model.safetensors with the configuration beside it."""
    beside = file.with_name(HUB_CONFIG)
    if not beside.is_file():
        raise FileNotFoundError(f"{file} needs its configuration beside it, {beside}, as encoders on the Hub have it")
    config = config_from_dict(EncoderConfig, read_json(beside), str(beside))
    header, weights = _read(file)
    if "avppc" not in header:  # written by others: there is no checksum
        return make_model(file, lambda: VideoEncoder(config), {}, weights)
    values = _values_of(file, header, FORMAT, VERSION)
    if config_from_dict(EncoderConfig, values.get("config"), str(file)) != config:
        raise ValueError(f"{beside} is not the configuration that the header of {file.name} has: {values['config']}")
    return make_model(file, lambda: VideoEncoder(config), values, weights)


def _load_of_checkpoint(file: Path) -> VideoEncoder:
    """The encoder in a checkpoint of a run, RUN/checkpoints/step_N/model.safetensors."""
    said = read_checked_json(file.with_name(PROGRESS_FILE))
    settings = read_checked_json(file.parents[2] / "config.json")
    if not isinstance(said, dict) or said.get("files", {}).get(file.name) != sha256_of(file):
        raise ValueError(f"{file} is damaged: its checksum is not the one in {PROGRESS_FILE}")
    config = config_from_dict(EncoderConfig, settings.get("encoder"), f"{file.parents[2] / 'config.json'}: encoder")
    _, weights = _read(file)
    own = {name.removeprefix(ENCODER_PREFIX): value for name, value in of_encoder(weights).items()}
    return make_model(file, lambda: VideoEncoder(config), {}, own)


def of_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a task's weights that are its visual encoder's, by their names in the task."""
    return {name: value for name, value in weights.items() if name.startswith(ENCODER_PREFIX)}


def write_hub_files(encoder: VideoEncoder, file: Path) -> None:
    """Writes model.safetensors, and config.json beside it."""
    save_encoder(encoder, file)
    write_json(file.with_name(HUB_CONFIG), config_to_dict(encoder.config))


def read_model(file: Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the weights in a file of `write_model`; `make_model` checks the weights.

    Args:
        kind: the header's "format".
        version: the header's "version".

    Raises:
        ValueError: the file is not whole, or of another kind or version; the text names it.
        OSError: it cannot be read.
    """
    header, weights = _read(file)
    return _values_of(file, header, kind, version), weights


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What the header of a safetensors file says of it as a whole, and the tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_bytes(file)  # not mapped: a disk that fails under a map ends the process
    try:
        weights = load(content)  # first: what it takes has a header that is JSON
        return _metadata(content), weights
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _values_of(file: Path, header: Mapping[str, str], kind: str, version: int) -> dict[str, Any]:
    try:
        values = parse_checked_json(header.get("avppc", "null").encode())
    except ValueError as error:
        raise ValueError(f"{file}: its header{error}") from error
    if isinstance(values, dict) and values.get("format") == OWN_FORMAT:
        raise ValueError(
            f"{file} has the weights of {values.get('class')}, an encoder of your own: make one, and load them with "
            f"safetensors.torch.load_model(encoder, {str(file)!r})"
        )
    if not isinstance(values, dict) or values.get("format") != kind or not is_version(values.get("version"), version):
        raise ValueError(
            f"{file} is not an {kind.replace('-', ' ')} of version {version}: its header says {str(header)[:200]}"
        )
    return values


def make_model(
    file: Path, make: Callable[[], Model], header: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Model:
    """The model with these weights, which must be all its own and those that the header's checksum is of.

    Args:
        file: for the text of an error.
        make: makes the model with any weights; ValueError where the header's configuration has none.
    """
    _check_weights(file, make, weights)
    # Files of earlier versions hold none.
    if "weights_sha256" in header and header["weights_sha256"] != weights_sha256(weights):
        raise ValueError(f"{file} is damaged: the checksum of its weights is not the one in its header")
    model = make()
    model.load_state_dict(weights)
    return model


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata(content: bytes) -> dict[str, str]:
    """What the header of a valid safetensors file says of it as a whole."""
    header: dict[str, dict[str, str]] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {})


def _check_weights(file: Path, make: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> None:
    """ValueError unless these are the weights of such a model; takes no memory for what the header claims."""
    try:
        with torch.device("meta"):
            expected = make().state_dict()
    except ValueError as error:
        raise ValueError(f"{file}: there is no such encoder: {error}") from error
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file}: the weights do not fit its configuration: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    for name, value in expected.items():
        found = weights[name]
        if found.shape != value.shape or found.dtype != value.dtype:
            raise ValueError(
                f"{file}: the weights do not fit its configuration: {name} must be {value.dtype} {list(value.shape)}, "
                f"got {found.dtype} {list(found.shape)}"
            )


def require_hub() -> Any:
    """The package huggingface_hub; ImportError, naming the extra to install, where it is missing."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"the Hugging Face Hub needs the package huggingface_hub ({error}): pip install 'avppc[hub]'"
        ) from error


def check_repository(name: str, repository: str) -> None:
    """ValueError unless an argument is the name of a repository on the Hub."""
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"{name} must be USER/NAME, a repository on the Hugging Face Hub, got {repository!r}")


def push_to_hub(folder: Path, names: Iterable[str], repository: str, *, private: bool) -> str:
    """Uploads files of a folder to a repository on the Hub, made where there is none; returns its address.

    Raises:
        ImportError: huggingface_hub is missing.
        OSError: the Hub cannot be reached, or refuses.
    """
    hub = require_hub()
    with _hub_errors(repository, "", "") as endpoint:
        api = hub.HfApi(endpoint=endpoint)
        api.create_repo(repository, private=private, exist_ok=True)
        message = "An encoder of avppc"
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(names), commit_message=message)
    return f"{endpoint}/{repository}"


def _fetch(repository: str, revision: str | None) -> Path:
    """model.safetensors of a repository on the Hub, in the cache, with config.json beside it."""
    check_repository("path", repository)
    hub, files = require_hub(), []
    for name in (HUB_CONFIG, HUB_WEIGHTS):
        with _hub_errors(repository, f" at revision {revision!r}" if revision else "", name) as endpoint:
            files.append(Path(hub.hf_hub_download(repository, name, revision=revision, endpoint=endpoint)))
    return files[-1]


@contextlib.contextmanager
def _hub_errors(repository: str, revision: str, name: str) -> Iterator[str]:
    """The Hub's address; inside the block, huggingface_hub's errors, which are of many kinds, are told in a line."""
    errors = importlib.import_module("huggingface_hub.errors")
    endpoint = os.environ.get("HF_ENDPOINT") or importlib.import_module("huggingface_hub.constants").ENDPOINT
    where = f"hf://{repository}"
    try:
        yield endpoint
    except errors.LocalEntryNotFoundError as error:
        raise OSError(f"{where}: {endpoint} cannot be reached, and {name} is not in the cache") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no {name}{revision}: no encoder is there as `avppc export --format hub` makes one "
            "(pickled weights are never read)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where} has nothing{revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no repository {repository} at {endpoint}, or it is not open to you (`hf auth login`)"
        ) from error
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise OSError(f"{where}: {endpoint} refuses, or cannot be reached: {why}") from error
