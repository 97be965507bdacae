"""The encoder as files that need no avppc: torch.export and ONNX, for any number of clips and frames.

Both compute what `VideoEncoder.forward` does in eval mode: "video" [clips, frames, side, side], luma from 0 to 1, to
"features" [clips, frames, features].
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avppc.files import read_bytes, write_atomically
from avppc.models.video import VideoEncoder
from avppc.settings import config_to_dict

INPUT_NAME, OUTPUT_NAME = "video", "features"
ALLOWED_DIFFERENCE = 1e-4
"""The most that a feature of an exported file may differ from the encoder's. Features are of order 1: they come from a
layer norm and a ReLU."""
_CHECKED_SHAPES = ((1, 1), (2, 29), (3, 7))  # clips and frames; none is the traced one
_TRACED_SHAPE = (2, 5)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """ImportError, naming the extra to install, if a package is missing that writes or runs ONNX files."""
    for package in _ONNX_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"the format 'onnx' needs {', '.join(_ONNX_PACKAGES)} ({error}): pip install 'avppc[export]', "
                "or leave it out: --formats safetensors torch-export"
            ) from error


def write_torch_export(encoder: VideoEncoder, path: Path) -> float:
    """Writes a .pt2 file, loads it again and returns its largest difference from the encoder.

    Raises:
        ValueError: the difference is above ALLOWED_DIFFERENCE.
    """
    encoder = _copy_contiguous(encoder)
    program = torch.export.export(encoder, (_example(encoder),), dynamic_shapes=_dynamic_shapes())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    content = io.BytesIO()  # torch's own file ends the process where the disk is full
    torch.export.save(program, content)
    write_atomically(path, content.getvalue())
    written = torch.export.load(io.BytesIO(read_bytes(path)))
    return largest_difference(encoder, written.module(), path.name)


def write_onnx(encoder: VideoEncoder, path: Path) -> float:
    """Writes an ONNX file, runs it with onnxruntime and returns its largest difference from the encoder.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: the difference is above ALLOWED_DIFFERENCE.
    """
    require_onnx()
    import onnxruntime

    encoder = _copy_contiguous(encoder)
    with _quiet_exporter():
        program = torch.onnx.export(
            encoder,
            (_example(encoder),),
            dynamo=True,
            opset_version=20,  # docs/export.md says so
            verbose=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=_dynamic_shapes(),
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props["avppc"] = json.dumps(config_to_dict(encoder.config))
    write_atomically(path, program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(read_bytes(path), providers=["CPUExecutionProvider"])

    def infer(video: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT_NAME], {INPUT_NAME: video.numpy()})[0])

    return largest_difference(encoder, infer, path.name)


@torch.inference_mode()
def largest_difference(encoder: VideoEncoder, other: Callable[[Tensor], Tensor], name: str) -> float:
    """The largest difference between the features of `other` and the encoder's, over random clips of several shapes.

    Raises:
        ValueError: it is above ALLOWED_DIFFERENCE; the text has `name`.
    """
    side, generator, largest = encoder.config.input_pixels, torch.Generator().manual_seed(0), 0.0
    for clips, frames in _CHECKED_SHAPES:
        video = torch.rand(clips, frames, side, side, generator=generator)
        expected, found = encoder(video), other(video)
        if found.shape != expected.shape:
            raise ValueError(f"{name} gives {list(found.shape)} where the encoder gives {list(expected.shape)}")
        difference = float((found - expected).abs().max())
        if not difference <= ALLOWED_DIFFERENCE:  # also a NaN
            raise ValueError(
                f"{name} differs by {difference:.2g} from the encoder with {clips} clips of {frames} frames; "
                f"{ALLOWED_DIFFERENCE:g} is allowed"
            )
        largest = max(largest, difference)
    return largest


def _copy_contiguous(encoder: VideoEncoder) -> VideoEncoder:
    """A copy on the CPU in eval mode; torch.export.save takes filters laid out channels last for parts of others."""
    twin = copy.deepcopy(encoder).cpu().eval()
    for parameter in twin.parameters():
        parameter.data = parameter.data.contiguous()
    return twin


def _example(encoder: VideoEncoder) -> Tensor:
    side = encoder.config.input_pixels
    return torch.rand(*_TRACED_SHAPE, side, side, generator=torch.Generator().manual_seed(0))


def _dynamic_shapes() -> dict[str, Any]:
    return {INPUT_NAME: {0: torch.export.Dim("clips", min=1), 1: torch.export.Dim("frames", min=1)}}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on torchvision, which is not used, and on its own use of torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
