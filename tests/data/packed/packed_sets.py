"""Packed data sets written directly, without videos: each clip's pixels and samples tell which clip it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ClipShape, ShardWriter

SHAPE = ClipShape(frames=3, height=8, width=12)


def clip_video(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SHAPE.frames, SHAPE.height, SHAPE.width), dtype=np.uint8)


def clip_audio(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(-32768, 32768, SHAPE.samples, dtype=np.int16)


def write_packed(directory: Path, clips: int = 23, per_shard: int = 5, split: str = "train", words: int = 3) -> Path:
    """Clip n has id 1000 + n, label n % (words + 1) - 1 and speaker n % 4."""
    folder = directory / SHARD_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    writer = ShardWriter(SHAPE, per_shard)
    for number in range(clips):
        writer.add(
            f"W{number}.mp4",
            video=clip_video(number),
            audio=clip_audio(number),
            label=number % (words + 1) - 1,
            clip_id=1000 + number,
            speaker=number % 4,
        )
        if writer.full or number == clips - 1:
            records.append(writer.write(folder / f"{split}-{len(records):05}.safetensors"))
    PackedIndex(SHAPE, tuple(f"WORD{word}" for word in range(words)), {split: tuple(records)}).write(directory)
    return directory
