"""`avppc export`: a run's encoder in the formats asked for, each checked, with a model card.

torch.export and ONNX files need no avppc, and take any number of clips and frames: both compute what
`VideoEncoder.forward` does in eval mode, "video" [clips, frames, side, side], luma from 0 to 1, to "features" [clips,
frames, features]. The card says what the encoder is, what it was trained on, how well it reads lips and how to load it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from avppc._version import __version__
from avppc.clip import CROP_SIZE, LUMA_BLACK, LUMA_WHITE, VIDEO_FPS
from avppc.data.packed.index import PackedIndex
from avppc.data.packed.remote import remote_url
from avppc.evaluate.lipreading.results import RowResult, title_of
from avppc.evaluate.record import RunRecord, changed_settings, command_line, page_environment, read_record
from avppc.export.config import ExportConfig, FormatName
from avppc.files import new_directory, read_bytes, read_json, sha256_of, write_atomically, write_json
from avppc.models.encoder_file import (
    ENCODER_FILE,
    HUB_CONFIG,
    HUB_WEIGHTS,
    find_encoder,
    load_encoder,
    push_to_hub,
    require_hub,
    save_encoder,
    write_hub_files,
)
from avppc.models.encoders import LUMA_MEAN, LUMA_STD, VideoEncoder
from avppc.printing import Console
from avppc.settings import config_to_dict
from avppc.tasks.registry import TASKS
from avppc.train.config import PretrainConfig
from avppc.train.hardware import package_versions
from avppc.train.run_folder import VIDEOS_FILE, data_of

INPUT_NAME, OUTPUT_NAME = "video", "features"
ALLOWED_DIFFERENCE = 1e-4
"""The most that a feature of an exported file may differ from the encoder's. Features are of order 1: they come from a
layer norm and a ReLU."""
_CHECKED_SHAPES = ((1, 1), (2, 29), (3, 7))  # clips and frames; none is the traced one
_TRACED_SHAPE = (2, 5)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DESCRIPTION_FILE = "encoder.json"
CARD_FILE = "README.md"
_TEMPLATE = "card.md.jinja"


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


FORMAT, VERSION = "avppc-export", 1


def _write_safetensors(encoder: VideoEncoder, path: Path) -> float:
    save_encoder(encoder, path)
    return largest_difference(encoder, load_encoder(path), path.name)


def _write_hub(encoder: VideoEncoder, path: Path) -> float:
    write_hub_files(encoder, path)
    return largest_difference(encoder, load_encoder(path), path.name)


WRITERS: dict[FormatName, tuple[str, Callable[[VideoEncoder, Path], float]]] = {
    "safetensors": (ENCODER_FILE, _write_safetensors),
    "torch-export": ("encoder.pt2", write_torch_export),
    "onnx": ("encoder.onnx", write_onnx),
    "hub": (HUB_WEIGHTS, _write_hub),
}
"""Name of each format's file, and what writes it and returns its largest difference from the encoder."""


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export."""

    format: FormatName
    file: str
    bytes: int
    sha256: str
    largest_difference: float
    """Largest difference between its features of random clips and the encoder's own."""


def execute(config: ExportConfig) -> int:
    """`avppc export`: writes the directory, prints what is in it; returns 0."""
    files = export(config)
    table = Table(title=f"The encoder of {config.run}, in {config.out}", title_justify="left")
    for column in ("file", "size", "largest difference"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for file in files:
        table.add_row(file.file, format_size(file.bytes), f"{file.largest_difference:.1e}")
    table.caption = f"Difference of a feature from torch's, {ALLOWED_DIFFERENCE:g} is allowed. Model card: {CARD_FILE}."
    Console(width=100).print(table)
    if config.push:
        names = [CARD_FILE, DESCRIPTION_FILE, HUB_CONFIG, *(file.file for file in files)]
        address = push_to_hub(config.out, names, config.push, private=config.private)
        Console(soft_wrap=True).print(f'pushed to {address}: avppc.load_encoder("hf://{config.push}")')
    return 0


def export(config: ExportConfig) -> list[ExportedFile]:
    """Makes the directory config.out, whole or not at all; a whole export of the same encoder and formats stays.

    Returns:
        The encoder's files in it: all but the model card and the description.

    Raises:
        FileExistsError: there is something else at config.out.
        FileNotFoundError: config.run is not the directory of a finished run.
        ImportError: a package that a format needs is missing.
        ValueError: a file of the run is damaged, or a written one does not do what the encoder does.
    """
    if "onnx" in config.formats:
        require_onnx()
    if config.push:
        require_hub()
    record = read_record(config.run)
    encoder, encoder_sha256 = load_encoder(config.run), sha256_of(find_encoder(config.run))
    files = _finished_export(config, encoder_sha256)
    if files and _card(record, encoder, encoder_sha256, files) == read_bytes(config.out / CARD_FILE):
        return files
    files = []
    with new_directory(config.out) as directory:
        for format_name in dict.fromkeys(config.formats):
            name, write = WRITERS[format_name]
            difference = write(encoder, directory / name)
            size, digest = (directory / name).stat().st_size, sha256_of(directory / name)
            files.append(ExportedFile(format_name, name, size, digest, difference))
        write_json(directory / DESCRIPTION_FILE, _description(encoder, encoder_sha256, files))
        write_atomically(directory / CARD_FILE, _card(record, encoder, encoder_sha256, files))
    return files


def _finished_export(config: ExportConfig, encoder_sha256: str) -> list[ExportedFile]:
    """The encoder's files in config.out if it holds this same export, whole; else none.

    A command that was killed just before its end leaves such a one.
    """
    try:
        said = read_json(config.out / DESCRIPTION_FILE)
        files = [ExportedFile(name, **said["files"][name]) for name in dict.fromkeys(config.formats)]
        same = (said["format"], said["version"], said["encoder_sha256"]) == (FORMAT, VERSION, encoder_sha256)
        whole = all(
            file.file == WRITERS[file.format][0] and sha256_of(config.out / file.file) == file.sha256 for file in files
        )
        expected = {CARD_FILE, DESCRIPTION_FILE, *(file.file for file in files)}
        if "hub" in config.formats:
            expected.add(HUB_CONFIG)
            load_encoder(config.out / HUB_WEIGHTS)  # whole, with the configuration beside it
        found = {name for name in os.listdir(config.out) if not name.startswith(".")}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return files if same and whole and found == expected and said["versions"] == _versions() else []


def _description(encoder: VideoEncoder, encoder_sha256: str, files: list[ExportedFile]) -> dict[str, Any]:
    """encoder.json: what a program must know to use the files."""
    config = encoder.config
    side = config.input_pixels
    return {
        "format": FORMAT,
        "version": VERSION,
        "encoder": config_to_dict(config),
        "encoder_sha256": encoder_sha256,
        "input": {
            "name": INPUT_NAME,
            "shape": ["clips", "frames", side, side],
            "dtype": "float32",
            "values": "luma from 0 to 1 in video's range, not normalised: the encoder does that",
            "luma_black": LUMA_BLACK / 255,
            "luma_white": LUMA_WHITE / 255,
            "luma_of_grey": "(16 + 219 * grey) / 255, where grey pixels are 0 for black and 1 for white",
            "fps": VIDEO_FPS,
            "stored_crop_pixels": CROP_SIZE,
            "crop_pixels": config.crop_pixels,
            "block_pixels": config.crop_pixels // side,
            "luma_mean": LUMA_MEAN if config.channels == "luma" else None,
            "luma_std": LUMA_STD if config.channels == "luma" else None,
        },
        "output": {"name": OUTPUT_NAME, "shape": ["clips", "frames", config.features], "dtype": "float32"},
        "files": {
            file.format: {name: value for name, value in asdict(file).items() if name != "format"} for file in files
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that write an export; one that is not installed is left out."""
    packages = package_versions(("onnx", "onnxscript", "onnxruntime"))
    found = {"avppc": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | {name: version for name, version in packages.items() if version is not None}


def _card(record: RunRecord, encoder: VideoEncoder, encoder_sha256: str, files: list[ExportedFile]) -> bytes:
    """The model card, in Markdown."""
    environment = page_environment(Path(__file__).parent, html=False)
    environment.filters |= {"title": title_of, "size": format_size}
    config = record.config
    margin = (CROP_SIZE - encoder.config.crop_pixels) // 2
    card = environment.get_template(_TEMPLATE).render(
        name=record.run.resolve().name,
        config=config,
        encoder=encoder.config,
        reach=encoder.reach,
        task=TASKS[config.task].title,
        data=_describe_data(record.run, config.data),
        command=_command(config),
        rows=rows_of_encoder(record.rows, encoder_sha256),
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        encoder_sha256=encoder_sha256,
        files={file.format: file for file in files},
        versions=_versions(),
        trained_with=record.environment or {},
        first=margin,
        last=margin + encoder.config.crop_pixels,
        block=encoder.config.crop_pixels // encoder.config.input_pixels,
        stored=CROP_SIZE,
        fps=VIDEO_FPS,
        mean=LUMA_MEAN,
        std=LUMA_STD,
    )
    return card.encode()


def format_size(size_bytes: int) -> str:
    """For example "24 kB", "86.1 MB"."""
    return f"{size_bytes / 1e3:.0f} kB" if size_bytes < 1e6 else f"{size_bytes / 1e6:.1f} MB"


def rows_of_encoder(rows: list[RowResult], encoder_sha256: str) -> list[RowResult]:
    """The rows of the lip-reading table that were measured with this encoder, not with one of another training."""
    return [row for row in rows if row.settings["encoder_sha256"] == encoder_sha256]


def _describe_data(run: Path, data: Path) -> str:
    """The data set's name and, if it can be read, its size. Not its folder: the card goes to other machines."""
    if remote_url(data) or (run / VIDEOS_FILE).exists():  # nothing is fetched, nor decoded, for a card
        return f"`{data.name}`"
    try:
        index = PackedIndex.read(data_of(run, None))
    except (ValueError, FileNotFoundError, PermissionError):  # not there, or not for everybody
        return f"`{data.name}`"
    clips = sum(shard.clips for shard in index.splits.get("train", ()))
    hours = clips * index.shape.frames / VIDEO_FPS / 3600
    return f"`{data.name}`: {clips:,} clips of {index.shape.frames} frames, {hours:.2g} hours"


def _command(config: PretrainConfig) -> str:
    """The command that trained the encoder, with the names of its folders but not where they lie."""
    preset = PretrainConfig.from_preset(config.preset, config.data, config.out)
    named = {"data": config.data.name, "out": config.out.name, "preset": config.preset}
    changed = changed_settings(config, preset)
    if config.init_from:
        changed["init_from"] = Path(config.init_from).name
    return command_line("pretrain", {**named, **changed})
