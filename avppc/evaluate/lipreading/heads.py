"""Heads: what turns frame features [N, T, D] into words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avppc.evaluate.config import HEADS, HeadName


class GRUHead(nn.Module):
    """Words from a bidirectional GRU whose logits are averaged over the frames: [N, T, features] -> [N, words]."""

    def __init__(self, features: int, words: int, hidden: int = 64, layers: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout_in = nn.Dropout(0.2)
        self.gru = nn.GRU(features, hidden, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, words)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout_in(x))
        # The classifier is linear, so the mean of the frames' logits is the logits of the mean state.
        return self.classify(self.dropout(states.mean(1)))


class TemporalConvHead(nn.Module):
    """Words from two strided convolutions over time: [N, T, features] -> [N, words].

    Conv1d(5, stride 2) - BatchNorm - ReLU - MaxPool(2) - Conv1d(5, stride 2) - BatchNorm - ReLU - mean - two linear
    maps, as usual for lip reading on LRW.
    """

    def __init__(self, features: int, words: int, hidden: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout_in = nn.Dropout(0.2)
        self.conv = nn.Sequential(
            nn.Conv1d(features, 2 * hidden, 5, 2, 2, bias=False),
            nn.BatchNorm1d(2 * hidden),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(2, 2, ceil_mode=True),
            nn.Conv1d(2 * hidden, 4 * hidden, 5, 2, 2, bias=False),
            nn.BatchNorm1d(4 * hidden),
            nn.ReLU(inplace=True),
        )
        self.linear = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(4 * hidden, 2 * hidden), nn.BatchNorm1d(2 * hidden), nn.ReLU(inplace=True)
        )
        self.classify = nn.Linear(2 * hidden, words)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(self.dropout_in(x).transpose(1, 2)).mean(2)
        return self.classify(self.linear(pooled))


class MultiScaleHead(nn.Module):
    """Words from a multi-scale temporal convolutional network: [N, T, features] -> [N, words].

    Residual blocks of two layers; each layer has convolutions of 3, 5 and 7 frames side by side, dilated by 1, 2, 4, 8
    from block to block; the mean over time goes to one linear map.

    Reference: Martinez, Ma, Petridis, Pantic, "Lipreading using Temporal Convolutional Networks", ICASSP 2020.
    """

    KERNELS = (3, 5, 7)

    def __init__(self, features: int, words: int, hidden: int = 64, blocks: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        width = len(self.KERNELS) * max(1, hidden // 2)
        self.dropout_in = nn.Dropout(0.2)
        sizes = [features] + [width] * blocks
        self.blocks = nn.Sequential(
            *(
                _MultiScaleBlock(inputs, width, self.KERNELS, 1 << number, dropout)
                for number, inputs in enumerate(sizes[:-1])
            )
        )
        self.classify = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.dropout_in(x).transpose(1, 2)).mean(2))


class _MultiScaleBlock(nn.Module):
    """Two layers of parallel convolutions and a shortcut: [N, inputs, T] -> [N, width, T]."""

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], dilation: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(_MultiScaleLayer(channels, width, kernels, dilation, dropout) for channels in (inputs, width))
        )
        self.shortcut = nn.Identity() if inputs == width else nn.Conv1d(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) + self.shortcut(x)).relu()


class _MultiScaleLayer(nn.Module):
    """Convolutions of several lengths side by side: [N, inputs, T] -> [N, width, T]."""

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], dilation: int, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv1d(inputs, width // len(kernels), kernel, padding="same", dilation=dilation, bias=False)
            for kernel in kernels
        )
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(torch.cat([branch(x) for branch in self.branches], 1)).relu())


class BinsHead(nn.Module):
    """Words from features averaged in seven bins of time and one linear map: [N, T, features] -> [N, words]."""

    BINS = 7

    def __init__(self, features: int, words: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout_in = nn.Dropout(0.2)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(features * self.BINS, words)

    def forward(self, x: Tensor) -> Tensor:
        bins = nn.functional.adaptive_avg_pool1d(self.dropout_in(x).transpose(1, 2), self.BINS)
        return self.classify(self.dropout(bins.flatten(1)))


def make_head(name: HeadName, features: int, words: int, hidden: int = 64, gru_layers: int = 1) -> nn.Module:
    """A word classifier over frame features: "gru", "tconv" (temporal convolution), "bins" (linear over seven bins of
    time) or "mstcn" (multi-scale temporal convolutions)."""
    if name == "gru":
        return GRUHead(features, words, hidden, gru_layers)
    if name == "tconv":
        return TemporalConvHead(features, words, hidden)
    if name == "bins":
        return BinsHead(features, words)
    if name == "mstcn":
        return MultiScaleHead(features, words, hidden)
    raise ValueError(f"head must be one of {', '.join(HEADS)}; got {name!r}")
