"""The frame networks: ResNets and four strided convolutions.

The ResNets have torchvision's parameter names, so that its ImageNet weights load. Activation checkpointing
takes memory from the backward pass at the cost of a second forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avppc.models.batch_norm import FusedSequential, frozen_statistics, norm_relu

RESNET_LAYERS: dict[str, tuple[int, int, int, int]] = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, self.relu, self.conv1(x))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """Feature vectors of frames: [B, C, H, W] -> [B, 8 width].

    Args:
        layers: residual blocks in each of the four stages; (3, 4, 6, 3) is ResNet-34.
        width: channels of the first stage, doubled by each later one; 64 is the standard.
        in_channels: channels of the input frames; 1 for luma.
        stem: "2d", the standard 7 x 7 convolution and max-pooling; "small", a 5 x 5 convolution without pooling,
            for inputs of 32 to 48 pixels; "none", no stem, for features from a stem of the caller's.
    """

    def __init__(
        self, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, in_channels: int = 1, stem: str = "2d"
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers must be four positive numbers, got {tuple(layers)}")
        if stem == "2d":
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        elif stem == "small":
            self.conv1 = nn.Conv2d(in_channels, width, 5, 2, 2, bias=False)
            self.maxpool = nn.Identity()
        elif stem != "none":
            raise ValueError(f"stem must be '2d', 'small' or 'none'; got {stem!r}")
        self.has_stem = stem != "none"
        if self.has_stem:
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
        channels = width
        for stage, blocks in enumerate(layers):
            stage_channels = width << stage
            stage_blocks = [BasicBlock(channels, stage_channels, 1 if stage == 0 else 2)]
            stage_blocks += [BasicBlock(stage_channels, stage_channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stage_blocks))
            channels = stage_channels
        self.out_features = channels
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.has_stem:
            x = self.maxpool(norm_relu(self.bn1, self.relu, self.conv1(x)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


_TORCHVISION_STEM = ("conv1.", "bn1.")


@torch.no_grad()
def load_torchvision_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Copies torchvision's ResNet weights, of ImageNet say, into an encoder.

    The classifier is left out and the three colours are summed for luma. A "3d" stem has no counterpart: it keeps its
    own weights, and torchvision's stem is left out, too.

    Args:
        model: a VideoEncoder with a ResNet of the same depth and width, its stem "2d" or "3d" and its channels "luma";
            or such a ResNet by itself.
        weights: the state_dict of torchvision's model, read with safetensors or `torch.load(..., weights_only=True)`.

    Returns:
        The names of the weights that were left out.

    Raises:
        ValueError: the model has another stem, other channels or no ResNet; a weight is missing, unexpected or of
            another shape. Nothing is copied then.
        TypeError: the weights are no tensors by name.
    """
    frames = _resnet_of(model)
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise TypeError("weights must be a state_dict, tensors by name")
    unused = ("fc.",) if frames.has_stem else ("fc.", *_TORCHVISION_STEM)
    left_out = tuple(name for name in weights if name.startswith(unused))
    state = {name: value for name, value in weights.items() if name not in left_out}
    stem = state.get("conv1.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 3 and frames.conv1.in_channels == 1:
        state["conv1.weight"] = stem.sum(1, keepdim=True)
    own = frames.state_dict()
    # Files written by old versions of torch do not count batches.
    missing = sorted(name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"weights do not fit this ResNet: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(f"weights[{name!r}] must have shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
    for name, value in state.items():
        own[name].copy_(value)
    return left_out


def _resnet_of(model: nn.Module) -> ResNet:
    """The ResNet of an encoder; ValueError where torchvision has no weights for its first layer."""
    frames = getattr(model, "frames", model)
    if not isinstance(frames, ResNet):
        raise ValueError(f"model must have a ResNet, such as backbone='resnet34'; got {type(frames).__name__}")
    if not frames.has_stem:
        return frames
    if frames.conv1.kernel_size != (7, 7):
        raise ValueError("model has stem 'small', torchvision's first convolution is 7 x 7: use stem '2d' or '3d'")
    if frames.conv1.in_channels not in (1, 3):
        raise ValueError(
            f"model has {frames.conv1.in_channels} input channels (channels='motion'), of which none is one of "
            "torchvision's colours: use channels='luma'"
        )
    return frames


class Conv4(nn.Module):
    """Feature vectors of small frames: [B, C, H, W] -> [B, 4 width (H / 16) (W / 16)].

    The last map is flattened, not averaged: at 32 pixels it is 2 x 2, and where the lips are matters. On the talking
    mouths it read more words than a ResNet-10 of the same width, and it costs less.
    """

    def __init__(self, width: int, in_channels: int, input_pixels: int) -> None:
        super().__init__()
        if input_pixels % 16:
            raise ValueError(f"input_pixels must be a multiple of 16 for conv4, got {input_pixels}")
        sizes = (in_channels, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in zip(sizes, sizes[1:], (5, 3, 3, 3), strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.layers = FusedSequential(*layers)
        self.out_features = 4 * width * (input_pixels // 16) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


def use_channels_last(module: nn.Module) -> None:
    """Lays the filters of 2D convolutions out channels last, which both oneDNN and cuDNN prefer in bfloat16."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def use_activation_checkpointing(model: nn.Module) -> None:
    """Lets each block keep its input alone in the forward pass, and compute the rest again in the backward pass.

    The model is changed in place, its state_dict is not; running statistics are updated once a step as before.
    Blocks are a ResNet's, and convolution, norm and activation wherever these three follow one another.
    """
    for module in model.modules():
        if isinstance(module, BasicBlock):
            _replace_forward(module, _recomputed(module, module.forward))
        elif isinstance(module, nn.Sequential):
            parts = _blocks(module)
            if len(parts) > 1:
                _replace_forward(module, nn.Sequential(*parts).forward)


def _blocks(layers: nn.Sequential) -> list[nn.Module]:
    """The layers in groups of convolution, norm and activation, each recomputed; empty if they are not such groups."""
    kinds = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.ReLU)
    if len(layers) % 3 or not all(isinstance(layer, kinds[place % 3]) for place, layer in enumerate(layers)):
        return []
    flat = list(layers)
    groups = [FusedSequential(*flat[first : first + 3]) for first in range(0, len(flat), 3)]
    for group in groups:
        _replace_forward(group, _recomputed(group, group.forward))
    return list(groups)


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.__dict__["forward"] = forward  # found before the class's own


def _recomputed(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The module's forward; while it trains, its activations are not kept but computed again when they are needed."""

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), frozen_statistics(module)

    def recomputed(x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and module.training):
            return forward(x)
        result: Tensor = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return result

    return recomputed
