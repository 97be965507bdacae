"""Temporal back-ends: what turns frame features [N, T, D] into one vector or into words."""

from __future__ import annotations

from torch import Tensor, nn

from avppc.config.evaluate import HEADS, HeadName


class ElementPool(nn.Module):
    """Embedding of one element: the last state of a GRU over its frames, mapped to the embedding width.

    [N, T, features] -> [N, dim].
    """

    def __init__(self, features: int, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.project(states[:, -1])


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
    """A word classifier over frame features: "gru", "tconv" (temporal convolution) or "bins" (seven-bin linear)."""
    if name == "gru":
        return GRUHead(features, words, hidden, gru_layers)
    if name == "tconv":
        return TemporalConvHead(features, words, hidden)
    if name == "bins":
        return BinsHead(features, words)
    raise ValueError(f"head must be one of {', '.join(HEADS)}; got {name!r}")
