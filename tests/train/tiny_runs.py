"""A small packed data set and settings that train in seconds: for the tests of runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avppc.clip import CLIP_FRAMES
from avppc.config import EncoderConfig, ObjectiveConfig, PretrainConfig
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ClipShape, ShardWriter

SHAPE = ClipShape(CLIP_FRAMES, 96, 96)
WORDS = ("OPEN", "SHUT", "TWICE")
SPLITS = {"train": 24, "val": 6, "test": 9}


def make_clip(word: int, number: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A dark square that opens once, shuts, or opens twice, with a tone whose loudness follows it."""
    generator = np.random.default_rng([word, number, seed] if seed else [word, number])
    time = np.linspace(0, 1, CLIP_FRAMES)
    opening = (np.sin(np.pi * time), 1 - np.sin(np.pi * time), np.sin(2 * np.pi * time) ** 2)[word]
    video = generator.integers(150, 200, (CLIP_FRAMES, 96, 96), dtype=np.uint8)
    for frame, share in enumerate(opening):
        half = int(2 + 14 * share)
        video[frame, 48 - half : 48 + half, 30:66] = 30
    tone = np.sin(np.arange(SHAPE.samples) * generator.uniform(0.2, 0.4)) * np.repeat(opening, 640)
    audio = (8000 * tone + generator.normal(0, 50, SHAPE.samples)).astype(np.int16)
    return {"video": video, "audio": audio}


def write_tiny_set(directory: Path, seed: int = 0) -> Path:
    (directory / SHARD_FOLDER).mkdir(parents=True)
    splits = {}
    for split, clips in SPLITS.items():
        writer = ShardWriter(SHAPE, clips)
        for number in range(clips):
            word = number % len(WORDS)
            clip_id = 1000 * len(splits) + number
            writer.add(
                f"{WORDS[word]}/{split}/{number}.mp4",
                **make_clip(word, clip_id, seed),
                label=word,
                clip_id=clip_id,
                speaker=len(splits),
            )
        splits[split] = (writer.write(directory / SHARD_FOLDER / f"{split}-00000.safetensors"),)
    PackedIndex(SHAPE, WORDS, splits).write(directory)
    return directory


def tiny_config(data: Path, out: Path, **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "steps": 12,
        "batch_size": 8,
        "log_every": 3,
        "checkpoint_every": 2,
        "threads": 1,
        "device": "cpu",
        "encoder": EncoderConfig(width=4, features=16),
        "audio_width": 4,
        "objective": ObjectiveConfig(dim=16),
        **changes,
    }
    return PretrainConfig(data, out, **settings)
