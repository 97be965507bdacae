"""The model card of an export: what the encoder is, what it was trained on, how well it reads lips, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from avppc.clip import CROP_SIZE, VIDEO_FPS
from avppc.data.packed.dataset import PackedIndex
from avppc.data.packed.remote import remote_url
from avppc.evaluate.lipreading.results import RowResult, title_of
from avppc.evaluate.pages_commands import changed_settings, command_line
from avppc.evaluate.record import RunRecord
from avppc.models.video import LUMA_MEAN, LUMA_STD, VideoEncoder
from avppc.tasks.registry import TASKS
from avppc.train.config import PretrainConfig
from avppc.train.run_folder import data_of

CARD_FILE = "README.md"
_TEMPLATE = "card.md.jinja"


def render_card(
    record: RunRecord, encoder: VideoEncoder, encoder_sha256: str, files: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """The card in Markdown.

    Args:
        files: the ExportedFile of each format.
        versions: of the packages that wrote the export.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"title": title_of, "size": format_size}
    config = record.config
    margin = (CROP_SIZE - encoder.config.crop_pixels) // 2
    return environment.get_template(_TEMPLATE).render(
        name=record.run.resolve().name,
        config=config,
        encoder=encoder.config,
        task=TASKS[config.task].title,
        data=_describe_data(record.run, config.data),
        command=_command(config),
        rows=rows_of_encoder(record.rows, encoder_sha256),
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        encoder_sha256=encoder_sha256,
        files=files,
        versions=versions,
        trained_with=record.environment or {},
        first=margin,
        last=margin + encoder.config.crop_pixels,
        block=encoder.config.crop_pixels // encoder.config.input_pixels,
        stored=CROP_SIZE,
        fps=VIDEO_FPS,
        mean=LUMA_MEAN,
        std=LUMA_STD,
    )


def format_size(size_bytes: int) -> str:
    """For example "24 kB", "86.1 MB"."""
    return f"{size_bytes / 1e3:.0f} kB" if size_bytes < 1e6 else f"{size_bytes / 1e6:.1f} MB"


def rows_of_encoder(rows: list[RowResult], encoder_sha256: str) -> list[RowResult]:
    """The rows of the lip-reading table that were measured with this encoder, not with one of an earlier training."""
    return [row for row in rows if row.settings["encoder_sha256"] == encoder_sha256]


def _describe_data(run: Path, data: Path) -> str:
    """Its name, and how much it is where it still lies there: a card travels, the folder's path does not."""
    if remote_url(data):  # nothing is fetched for a card
        return f"`{data.name}`"
    try:
        index = PackedIndex.read(data_of(run, None))
    except (ValueError, FileNotFoundError, PermissionError):  # not there, or not for everybody
        return f"`{data.name}`"
    clips = sum(shard.clips for shard in index.splits.get("train", ()))
    hours = clips * index.shape.frames / VIDEO_FPS / 3600
    return f"`{data.name}`: {clips:,} clips of {index.shape.frames} frames, {hours:.2g} hours"


def _command(config: PretrainConfig) -> str:
    """The command that trained it, without the paths of the machine where it did."""
    preset = PretrainConfig.from_preset(config.preset, config.data, config.out)
    named = {"data": config.data.name, "out": config.out.name, "preset": config.preset}
    return command_line("pretrain", {**named, **changed_settings(config, preset)})
