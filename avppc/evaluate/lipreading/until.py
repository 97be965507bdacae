"""`avppc bench-train --until`: how many seconds of pretraining it takes until so many words are read."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.config import EvaluateConfig
from avppc.evaluate.lipreading.classifier import HELD_OUT_SPLITS, encode_features, fit_classifier, predict
from avppc.evaluate.lipreading.fits import check_words, draw_labelled_clips
from avppc.evaluate.lipreading.heads import make_head
from avppc.models.video import VideoEncoder
from avppc.printing import ProgressBar
from avppc.train import bench
from avppc.train.config import BenchTrainConfig
from avppc.train.distributed import join_processes
from avppc.train.hardware import one_thread, set_up_cpu, use_bf16

LABELS_PER_WORD = 10
DRAWS = 3


@dataclass(frozen=True)
class Record:
    """A pretraining that was stopped when its frozen encoder read enough words, or at its end."""

    reached: bool
    """Whether `rate` is at least what was asked for."""
    seconds: float
    """Of pretraining alone, by a clock on the wall: fetching clips and taking steps, not the looks at the words."""
    steps: int
    clips_per_second: float
    rate: float
    """Words read right of the test clips at the last look: 10 labelled clips a word, temporal convolution, mean of 3
    draws, epoch chosen on validation clips."""
    looks: list[tuple[int, float, float]]
    """Steps, seconds and rate of each look."""
    pretrain_steps: int
    """Steps after which the learning rate would have reached its end."""
    batch_size: int
    precision: str
    threads: int


def execute(config: BenchTrainConfig) -> int:
    """`avppc bench-train`: prints the step's measurements or, with `until`, the record, as JSON; returns 0, or 1 where
    the pretraining ended before so many words were read."""
    if not config.until:
        return bench.execute(config)
    record = measure_until(config)
    print(json.dumps(asdict(record), indent=1))
    return 0 if record.reached else 1


def measure_until(config: BenchTrainConfig) -> Record:
    """Pretrains until the words are read or the steps are over; nothing is saved.

    Raises:
        ValueError: the data have no words, or a word has fewer than 10 labelled training clips.
    """
    with join_processes(config.device) as processes:
        if processes.size > 1:
            raise ValueError("bench-train times one process: start it without torchrun")
        set_up_cpu(config.threads)
        settings = bench.pretrain_config(config)
        reader = _Reader(config.data, use_bf16(settings.precision, processes.device))
        stepper = bench.Stepper(settings, processes)
        try:
            return _pretrain_until(config, stepper, reader)
        finally:
            stepper.loader.close()


def _pretrain_until(config: BenchTrainConfig, stepper: bench.Stepper, reader: _Reader) -> Record:
    settings = stepper.config
    looks: list[tuple[int, float, float]] = []
    seconds, taken = 0.0, 0
    with ProgressBar("pretraining", settings.steps, "steps") as progress:
        while taken < settings.steps and not (looks and looks[-1][2] >= config.until):
            start = time.perf_counter()
            for _ in range(min(config.steps, settings.steps - taken)):
                stepper.step()
                taken += 1
                progress.advance()
            bench.synchronise(stepper.device)
            seconds += time.perf_counter() - start
            looks.append((taken, seconds, reader.rate(stepper.task.video_encoder)))
            progress.show(f"{100 * looks[-1][2]:.1f} % of the words read")
    return Record(
        reached=looks[-1][2] >= config.until,
        seconds=seconds,
        steps=taken,
        clips_per_second=taken * settings.batch_size / seconds,
        rate=looks[-1][2],
        looks=looks,
        pretrain_steps=settings.steps,
        batch_size=settings.batch_size,
        precision="bf16" if reader.bf16 else "fp32",
        threads=torch.get_num_threads(),
    )


class _Reader:
    """Measures how many words of the test clips an encoder lets one read, by the recipe of `avppc evaluate`."""

    def __init__(self, data: Path, bf16: bool) -> None:
        self.bf16 = bf16
        self.config = EvaluateConfig(data, labels_per_word=LABELS_PER_WORD, draws=DRAWS)
        self.splits = {split: PackedDataset(data, split, verify=False) for split in ("train", *HELD_OUT_SPLITS)}
        words = self.splits["train"].words
        check_words(data, words)
        labels = self.splits["train"].labels
        self.draws = [draw_labelled_clips(labels, LABELS_PER_WORD, seed, words) for seed in range(DRAWS)]

    def rate(self, encoder: VideoEncoder) -> float:
        """The share of right words, mean of the draws; torch's random numbers go on as if nothing had been asked."""
        device = next(encoder.parameters()).device
        state = torch.get_rng_state()
        try:
            encoder = copy.deepcopy(encoder)
            features = encode_features(encoder, self.splits, torch.cat(self.draws).unique(), device, self.bf16)
            labels = {split: dataset.labels for split, dataset in self.splits.items()}
            right = 0.0
            with one_thread():
                for seed, clips in enumerate(self.draws):
                    torch.manual_seed(seed)
                    head = make_head("tconv", features.width, len(self.splits["train"].words))
                    groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": 1e-2}]
                    train = clips, labels["train"][clips]
                    fit_classifier(head, groups, features, train, labels["val"], self.config, self.config.epochs, seed)
                    right += (predict(head, features, "test") == labels["test"]).float().mean().item()
            return right / DRAWS
        finally:
            torch.set_rng_state(state)
