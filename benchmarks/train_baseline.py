"""Pretraining as one would first write it, and its parts replaced one by one by the library's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from loader_baselines import WINDOW
from torch import Tensor
from torch.nn import functional

from avppc.clip import CLIP_SAMPLES, CROP_SIZE, SAMPLES_PER_FRAME
from avppc.config import PretrainConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.loader import ClipLoader, EpochSampler
from avppc.draws import ClipGenerator
from avppc.losses.subtasks import SUBTASKS
from avppc.ops.log_mel.reference import log_mel_reference
from avppc.tasks.base import cut_elements
from avppc.tasks.permutative import PermutativeTask
from avppc.train.hardware import autocast, keep_memory, use_bf16
from avppc.train.step import make_optimizer


@dataclass(frozen=True)
class Parts:
    """What of the library a step uses."""

    packed: bool = False
    """Packed shards and a prefetching thread; else mp4 files decoded by a DataLoader."""
    batch_features: bool = False
    """Features, crops and noise for the batch at once; else torch.stft and crops clip by clip on the CPU."""
    one_loss: bool = False
    """The 42 sub-tasks as one operator; else a loop over cross_entropy."""
    one_encoder_batch: bool = False
    """Past and future in one batch; else an encoder call each."""
    bf16: bool = False
    """Autocast to bfloat16 and convolutions channels last."""
    kept_memory: bool = False
    """The allocator keeps freed pages, AdamW is fused, and nothing is read back in a step."""


class Mp4Clips(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Luma [29, 96, 96] uint8 and 16 kHz sound of video files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        pictures, sound = [], []
        with av.open(str(self.paths[number])) as container:
            resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
            for frame in container.decode(video=0):
                pictures.append(frame.to_ndarray(format="gray")[WINDOW])
            container.seek(0)
            for frame in container.decode(audio=0):
                sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        audio = np.zeros(CLIP_SAMPLES, np.int16)
        joined = np.concatenate(sound)[:CLIP_SAMPLES]
        audio[: len(joined)] = joined
        return torch.from_numpy(np.stack(pictures)), torch.from_numpy(audio)


class Trainer:
    """Steps with the given parts."""

    def __init__(self, config: PretrainConfig, parts: Parts, videos: list[Path], device: torch.device) -> None:
        self.config, self.parts, self.device = config, parts, device
        torch.manual_seed(0)
        self.task = PermutativeTask(config).to(device).train()
        self.seed = 0
        if parts.kept_memory:
            keep_memory()
            self.optimizer = make_optimizer(self.task, config.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(self.task.parameters(), 1e-3, foreach=False)
        if not parts.bf16:
            for module in self.task.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight.data = module.weight.data.contiguous()
        self.close: Callable[[], None] = lambda: None
        self.batches = self._packed() if parts.packed else self._decoded(videos)

    def _packed(self) -> Iterator[object]:
        dataset = PackedDataset(self.config.data, "train", verify=False)
        loader = ClipLoader(dataset, EpochSampler(len(dataset), self.config.batch_size, seed=0), device=self.device)
        self.close = loader.close
        return iter(loader)

    def _decoded(self, videos: list[Path]) -> Iterator[object]:
        clips = Mp4Clips(videos)
        while True:
            yield from torch.utils.data.DataLoader(
                clips, self.config.batch_size, shuffle=True, num_workers=2, drop_last=True
            )

    def step(self) -> None:
        batch = next(self.batches)
        with autocast(self.device, self.parts.bf16 and use_bf16("auto", self.device)):
            loss = self._loss(*self._embeddings(batch))
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), 5.0)
        if not self.parts.kept_memory:
            loss.item(), norm.item()  # as progress bars do
        self.optimizer.step()

    def _embeddings(self, batch: object) -> list[Tensor]:
        """[N, D] of Vp, Vf, Ap, Af."""
        self.seed += 1
        count = self.config.batch_size
        generator = ClipGenerator(self.seed, 0, count)
        if self.parts.batch_features:
            elements = cut_elements(batch, self.config.cut, jitter_frames=2, generator=generator)
            return self._encode_batch(elements.video, elements.audio, generator)
        video, audio = batch if isinstance(batch, (tuple, list)) else (batch.video, batch.audio)
        seen, heard = zip(*[self._features(v, a) for v, a in zip(video, audio, strict=True)], strict=True)
        halves = [torch.stack([clip[half] for clip in seen]).to(self.device) for half in (0, 1)]
        sounds = [torch.stack([clip[half] for clip in heard]).to(self.device) for half in (0, 1)]
        if self.parts.one_encoder_batch:
            halves, sounds = [torch.cat(halves)], [torch.cat(sounds)]
        stride = self.config.frame_stride
        videos = [self.task.video_pool(self.task.video_encoder(half, frame_stride=stride)).float() for half in halves]
        audios = [self.task.audio_pool(self.task.audio_encoder(half)).float() for half in sounds]
        return list(torch.cat(videos).chunk(2) + torch.cat(audios).chunk(2))

    def _encode_batch(self, video: Tensor, audio: Tensor, generator: ClipGenerator) -> list[Tensor]:
        if self.parts.one_encoder_batch:
            return list(
                self.task.embed_video(video, generator).chunk(2) + self.task.embed_audio(audio, generator).chunk(2)
            )
        seen = [self.task.embed_video(half, generator) for half in video.chunk(2)]
        return seen + [self.task.embed_audio(half, generator) for half in audio.chunk(2)]

    def _features(self, video: Tensor, audio: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Crops [T, H, W] and log-mel [F, B] of past and future of one clip, each varied at random."""
        size, shift = self.config.encoder.crop_pixels, self.config.augment.shift_pixels
        middle = (CROP_SIZE - size) // 2
        pictures, sounds = [], []
        for first in (0, self.config.cut.future_start):
            start = first + int(torch.randint(0, 3, ()))
            row, column = (int(torch.randint(middle - shift, middle + shift + 1, ())) for _ in range(2))
            crop = video[start : start + 12, row : row + size, column : column + size].float() / 255
            crop = crop.flip(2) if torch.rand(()) < 0.5 else crop
            pictures.append(functional.avg_pool2d(crop, size // self.config.encoder.input_pixels))
            samples = audio[start * SAMPLES_PER_FRAME : (start + 12) * SAMPLES_PER_FRAME].float() / 32768
            mel = log_mel_reference(samples, self.config.features)[:48]
            sounds.append(torch.logaddexp(mel, mel.mean() - 4 + 0.5 * torch.randn_like(mel)))
        return pictures, sounds

    def _loss(self, *elements: Tensor) -> Tensor:
        loss = self.task.loss
        if self.parts.one_loss:
            return loss(*elements, return_stats=False)
        named = dict(zip(("Vp", "Vf", "Ap", "Af"), elements, strict=True))
        contexts = loss._embed(named, loss.context_singles, loss.context_fusion)
        targets = loss._embed(named, loss.target_singles, loss.target_fusion)
        contexts, targets = (functional.layer_norm(x, x.shape[-1:]) for x in (contexts, targets))
        total, labels = 0.0, torch.arange(len(elements[0]), device=self.device)
        for subtask, weight, (context, target) in zip(SUBTASKS, loss.score.weight, loss.score.pairs, strict=True):
            logits = loss.score.scale * (contexts[context] @ weight.T) @ targets[target].T
            share = 1.0 if subtask.between_modalities else 0.1
            total = total + share * functional.cross_entropy(logits, labels)
        return total / 20.4


def stages() -> dict[str, Parts]:
    """From the straightforward to the library's, one part more each."""
    result, parts = {"straightforward": Parts()}, Parts()
    for name in (field.name for field in dataclasses.fields(Parts)):
        parts = dataclasses.replace(parts, **{name: True})
        result[f"+ {name}"] = parts
    return result
