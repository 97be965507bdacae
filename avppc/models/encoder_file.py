"""One file that holds a visual encoder, or a model around one: safetensors with its configuration in the header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from avppc.checks import check_path
from avppc.files import read_bytes, write_atomically
from avppc.models.config import EncoderConfig
from avppc.models.encoders import VideoEncoder
from avppc.settings import config_from_dict, config_to_dict, is_version, parse_checked_json, with_checksum

Model = TypeVar("Model", bound=nn.Module)

FORMAT, VERSION = "avppc-encoder", 1
ENCODER_FILE = "encoder.safetensors"
PRETRAINED = Path(__file__).parent / "pretrained"  # encoders that the package brings, by the names of their files


def save_encoder(encoder: VideoEncoder, path: Path) -> None:
    """Writes the encoder's weights and configuration, atomically."""
    header = {"format": FORMAT, "version": VERSION, "config": config_to_dict(encoder.config)}
    write_model(path, encoder.state_dict(), header)


def write_model(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes weights with a header, whose members are JSON values, "format" and "version" among them, atomically."""
    from safetensors.torch import save

    tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    # One entry: the order of several would differ from one saving to the next.
    metadata = {"avppc": json.dumps(with_checksum({**header, "weights_sha256": _weights_sha256(tensors)}))}
    write_atomically(path, save(tensors, metadata))


def pretrained_names() -> list[str]:
    """Names of the encoders that the package brings."""
    return sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))


def find_encoder(path: str | os.PathLike[str]) -> Path:
    """The encoder file at a path, in the directory of a finished run or an export, or of a pretrained encoder's name.

    A file or directory comes before a pretrained encoder of the same name.

    Raises:
        FileNotFoundError: there is none.
    """
    check_path("path", path)
    file = Path(path)
    if not file.exists() and os.fspath(path) in pretrained_names():
        return PRETRAINED / f"{os.fspath(path)}.safetensors"
    if file.is_dir():
        file = file / ENCODER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no encoder at {file}: give an encoder file, the directory of a finished run or of an export "
            f"with safetensors, or the name of a pretrained encoder ({', '.join(pretrained_names())})"
        )
    return file


def load_encoder(path: str | os.PathLike[str]) -> VideoEncoder:
    """A pretrained VideoEncoder in eval mode.

    `crop_video` of avppc.data.augment makes its input from the stored [N, T, 96, 96] uint8 crops.

    Args:
        path: an encoder file; the directory of a finished run or of an export; or "talking-mouths", the encoder that
            comes with the package, trained on synthetic mouths as `make demo` trains its own.

    Raises:
        FileNotFoundError: there is no such file or name, or the run has not finished.
        ValueError: the file is not an encoder file, or is damaged; the text names it.

    Examples:
        >>> encoder = load_encoder("talking-mouths")
        >>> encoder(torch.zeros(2, 29, 32, 32)).shape
        torch.Size([2, 29, 64])
        >>> encoder = load_encoder("runs/demo")                             # doctest: +SKIP
    """
    file = find_encoder(path)
    values, weights = read_model(file, FORMAT, VERSION)
    config = config_from_dict(EncoderConfig, values.get("config"), str(file))
    encoder = make_model(file, lambda: VideoEncoder(config), values, weights)
    return encoder.eval()


def read_model(file: Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the weights in a file of `write_model`; `make_model` checks the weights.

    Args:
        kind: the header's "format".
        version: the header's "version".

    Raises:
        ValueError: the file is not whole, or of another kind or version; the text names it.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_bytes(file)  # not mapped: a disk that fails under a map ends the process
    try:
        weights = load(content)
        metadata = _metadata(content)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    try:
        values = parse_checked_json(metadata.get("avppc", "null").encode())
    except ValueError as error:
        raise ValueError(f"{file}: its header{error}") from error
    if not isinstance(values, dict) or values.get("format") != kind or not is_version(values.get("version"), version):
        raise ValueError(
            f"{file} is not an {kind.replace('-', ' ')} of version {version}: its header says {str(metadata)[:200]}"
        )
    return values, weights


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
    if "weights_sha256" in header and header["weights_sha256"] != _weights_sha256(weights):
        raise ValueError(f"{file} is damaged: the checksum of its weights is not the one in its header")
    model = make()
    model.load_state_dict(weights)
    return model


def _weights_sha256(weights: Mapping[str, Tensor]) -> str:
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
