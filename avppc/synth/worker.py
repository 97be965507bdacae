"""A worker process: makes clips one after the other and ends with the process that started it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2

from avppc.processes import follow_parent
from avppc.synth.clip import Job, make_clip
from avppc.synth.config import SynthConfig
from avppc.synth.config_difficulty import DIFFICULTIES
from avppc.synth.config_words import WORDS
from avppc.synth.speaker import Cast
from avppc.synth.voice_espeak import Espeak
from avppc.synth.worker_files import write_clip


@dataclass(frozen=True)
class _Workshop:
    """What a process needs to make clips."""

    config: SynthConfig
    cast: Cast
    espeak: Espeak


_config: SynthConfig | None = None
_workshop: _Workshop | None = None


def start_worker(config: SynthConfig) -> None:
    """Prepares this process; call once before make_and_write."""
    global _config
    follow_parent()
    cv2.setNumThreads(1)
    _config = config


def make_and_write(job: Job) -> dict[str, Any]:
    """Makes a clip and its files; returns its line of the manifest."""
    global _workshop
    assert _config is not None, "start_worker comes first"
    if _workshop is None:  # made here: an error of a process's start would reach nobody
        _workshop = _Workshop(_config, Cast(_config, DIFFICULTIES[_config.difficulty].identity), Espeak())
    config, cast = _workshop.config, _workshop.cast
    speaker = cast.speaker(job.split, job.draw_speaker(config.seed, cast.sizes[job.split]))
    clip = make_clip(
        job,
        speaker,
        DIFFICULTIES[config.difficulty],
        _workshop.espeak,
        seed=config.seed,
        free_words=WORDS[config.words :],
    )
    checksum = write_clip(config.out, job.stem, clip)
    return {
        "path": f"{job.stem}.mp4",
        "word": job.word,
        "split": job.split,
        "speaker": speaker.number,
        "face": speaker.face_number,
        "voice": speaker.voice.name,
        "sha256": checksum,
        "seed": job.entropy(config.seed),
        **clip.facts,
    }
