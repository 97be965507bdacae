"""A few clips of a packed data set as small pictures: the mouth over time, and the sound below it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avppc.clip import SAMPLES_PER_FRAME
from avppc.data.contact_sheet import png_bytes, strip
from avppc.data.packed.dataset import PackedDataset, local_folder
from avppc.data.packed.index import PackedIndex
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.op import log_mel
from avppc.tasks.config import CutConfig

TILES = 15
"""Frames shown of a clip, at most."""


@dataclass(frozen=True)
class ClipStrip:
    """One clip. The pictures are data URIs of PNG files; their width is the clip's time."""

    word: str | None
    source: str
    mouth: str
    sound: str


@dataclass(frozen=True)
class ClipSheet:
    """Clips of one split."""

    split: str
    clips_in_split: int
    frames: int
    """Frames of each clip."""
    tiles: int
    """Frames shown of each clip."""
    spans: list[tuple[str, int]]
    """"past", "gap", "future" and "unused" with their frames, from left to right."""
    strips: list[ClipStrip]


def make_clip_sheet(directory: Path, cut: CutConfig, features: LogMelConfig, clips: int = 6) -> ClipSheet:
    """Clips of as many different words as possible, from the test split if there is one; the same clips each time.

    Raises:
        FileNotFoundError, ValueError: there is no packed data set, or it is damaged.
    """
    available = PackedIndex.read(local_folder(directory, [])).splits
    split = next((name for name in ("test", "val", "train") if available.get(name)), "train")
    with PackedDataset(directory, split, verify=False) as dataset:
        rows = _spread_over_words(dataset.labels, clips)
        batch = dataset.batch(rows)
        frames = dataset.shape.frames
        tiles = min(TILES, frames)
        # each tile shows the frame in its middle, so that tiles, sound and spans share one clock
        shown = (torch.arange(tiles) + 0.5).mul(frames / tiles).long()
        strips = [
            ClipStrip(
                word=dataset.words[label] if label >= 0 else None,
                source=dataset.sources[row],
                mouth=_png(strip(list(video[shown].numpy()))),
                sound=_png(_mel_picture(audio, frames, features)),
            )
            for row, label, video, audio in zip(
                rows.tolist(), batch.labels.tolist(), batch.video, batch.audio, strict=True
            )
        ]
        return ClipSheet(split, len(dataset), frames, tiles, _spans(cut, frames), strips)


def _spread_over_words(
    labels: Tensor,  # [n]
    clips: int,
) -> Tensor:
    """Row numbers of clips of `clips` words spread over the vocabulary; if there are fewer, rows spread over all."""
    words = labels.unique()
    if len(words) < clips:
        return torch.linspace(0, len(labels) - 1, min(clips, len(labels))).long().unique()
    chosen = []
    for place, word in enumerate(words[torch.linspace(0, len(words) - 1, clips).long()].tolist()):
        of_word = torch.where(labels == word)[0]
        chosen.append(int(of_word[place * len(of_word) // clips]))
    return torch.tensor(chosen)


def _spans(cut: CutConfig, frames: int) -> list[tuple[str, int]]:
    """Which frames of the clip are past, gap, future and unused, as far as there are frames."""
    spans, start = [], 0
    wanted = (("past", cut.past_frames), ("gap", cut.gap_frames), ("future", cut.future_frames), ("unused", frames))
    for name, length in wanted:
        length = min(length, frames - start)
        if length > 0:
            spans.append((name, length))
        start += length
    return spans


def _mel_picture(audio: Tensor, frames: int, features: LogMelConfig) -> NDArray[np.uint8]:
    """[bands, mel frames]: low bands at the bottom; grey from the clip's 2nd to its 99.5th percentile."""
    mel = log_mel(audio.unsqueeze(0), features)[0].float()
    mel = mel[: frames * SAMPLES_PER_FRAME // features.hop_samples]
    low, high = (torch.quantile(mel, share).item() for share in (0.02, 0.995))
    scaled = (mel - low) / max(high - low, 1e-6)
    return scaled.clamp(0, 1).mul(255).to(torch.uint8).T.flip(0).numpy()


def _png(picture: NDArray[np.uint8]) -> str:
    """[rows, columns] gray as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()
