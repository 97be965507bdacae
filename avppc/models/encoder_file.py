"""One file that holds a visual encoder: safetensors with its configuration in the header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from avppc.checks import check_path
from avppc.files import read_bytes, write_atomically
from avppc.models.config import EncoderConfig
from avppc.models.video import VideoEncoder
from avppc.settings import config_from_dict, config_to_dict, is_version, parse_checked_json, with_checksum

FORMAT, VERSION = "avppc-encoder", 1
ENCODER_FILE = "encoder.safetensors"


def save_encoder(encoder: VideoEncoder, path: Path) -> None:
    """Writes the encoder's weights and configuration, atomically."""
    from safetensors.torch import save

    tensors = {name: value.detach().contiguous().cpu() for name, value in encoder.state_dict().items()}
    header = {"format": FORMAT, "version": VERSION, "config": config_to_dict(encoder.config)}
    # One entry: the order of several would differ from one saving to the next.
    metadata = {"avppc": json.dumps(with_checksum({**header, "weights_sha256": _weights_sha256(tensors)}))}
    write_atomically(path, save(tensors, metadata))


def find_encoder(path: str | os.PathLike[str]) -> Path:
    """The encoder file at a path, or in the directory of a finished run or an export; FileNotFoundError without one."""
    check_path("path", path)
    file = Path(path)
    if file.is_dir():
        file = file / ENCODER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no encoder at {file}: give an encoder file, or the directory of a finished run or of an export "
            "with safetensors"
        )
    return file


def load_encoder(path: str | os.PathLike[str]) -> VideoEncoder:
    """A pretrained VideoEncoder in eval mode, from an encoder file or the directory of a finished run or of an export.

    `crop_video` of avppc.data.augment makes its input from the stored [N, T, 96, 96] uint8 crops.

    Raises:
        FileNotFoundError: there is no such file, or the run has not finished.
        ValueError: the file is not an encoder file, or is damaged; the text names it.

    Examples:
        >>> encoder = load_encoder("runs/demo")                             # doctest: +SKIP
        >>> features = encoder(crop_video(clips, 64, 32))                   # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = find_encoder(path)
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
    if not isinstance(values, dict) or values.get("format") != FORMAT or not is_version(values.get("version"), VERSION):
        raise ValueError(f"{file} is not an avppc encoder of version {VERSION}: its header says {metadata}")
    config = config_from_dict(EncoderConfig, values.get("config"), str(file))
    _check_weights(file, config, weights)
    # Files of earlier versions hold none.
    if "weights_sha256" in values and values["weights_sha256"] != _weights_sha256(weights):
        raise ValueError(f"{file} is damaged: the checksum of its weights is not the one in its header")
    encoder = VideoEncoder(config)
    encoder.load_state_dict(weights)
    return encoder.eval()


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


def _check_weights(file: Path, config: EncoderConfig, weights: Mapping[str, Tensor]) -> None:
    """ValueError unless these are the weights of such an encoder; takes no memory for what the header claims."""
    try:
        with torch.device("meta"):
            expected = VideoEncoder(config).state_dict()
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
