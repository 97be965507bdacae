"""Batch norm in training and the ReLU behind it as one operator: half the passes over memory that torch takes.

The definition is in plain torch; the compiled operator serves maps on the CPU that lie in memory channels last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from avppc.ops import _library
from avppc.ops.modes import is_plain, plain_torch_alone, refuse_second_derivative

MOST_CHANNELS = 1024  # of the compiled operator


def batch_norm_relu(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [C], variance [C]): y = relu(weight (x - mean) / sqrt(variance + eps) + bias), a channel's over N, H, W.

    Mean and variance, of N H W and not of one less, come without a gradient, in the dtype of weight. The same bits
    whatever the number of threads.

    Args:
        x: [N, C, H, W] floating point, with at least two numbers a channel.
        weight: [C] factor of each channel.
        bias: [C] what is added to each.
        eps: what keeps the deviation from 0.

    Reference: Ioffe, Szegedy, "Batch Normalization", ICML 2015, algorithm 1.
    """
    if has_fused_form(x, weight, bias):
        y, mean, variance = _BatchNormReLU.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return y, mean, variance
    return batch_norm_relu_reference(x, weight, bias, eps)


def batch_norm_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of batch_norm_relu."""
    with torch.no_grad():
        variance, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
    return functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps).relu(), mean, variance


def has_fused_form(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the compiled operator serves these: float32 or bfloat16 on the CPU, channels last, nothing traced."""
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == bias.dtype == torch.float32
        and is_plain(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] <= MOST_CHANNELS
        and x.numel() > x.shape[1]
        and plain_torch_alone(x, weight, bias) is None
        and _library.has_cpp_ops()
    )


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance = torch.ops.avppc.batch_norm_relu(_rows(x), weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return y.permute(0, 3, 1, 2), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("batch_norm_relu", "take batch_norm_relu_reference")
        x, *channels = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.avppc.batch_norm_relu_backward(_rows(dy), _rows(x), *channels, ctx.eps)
        return dx.permute(0, 3, 1, 2), dweight, dbias, None


def _rows(maps: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C], contiguous."""
    return maps.permute(0, 2, 3, 1).contiguous()


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


if _library.has_cpp_ops():
    torch.library.register_fake("avppc::batch_norm_relu", _forward_fake)
    torch.library.register_fake("avppc::batch_norm_relu_backward", _backward_fake)
