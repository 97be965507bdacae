"""Batch norm and its ReLU as one operator, batch norm over all processes, and one that leaves its statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avppc.ops.batch_norm import batch_norm_relu, has_fused_form
from avppc.ops.modes import refuse_second_derivative


class FusedSequential(nn.Sequential):
    """nn.Sequential that takes each batch norm and the ReLU behind it by norm_relu."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            fused = layers and isinstance(layer, nn.BatchNorm2d) and isinstance(layers[0], nn.ReLU)
            x = norm_relu(layer, layers.pop(0), x) if fused else layer(x)
        return x


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x)), running statistics updated; where the compiled operator serves the norm's training, by that."""
    if not (_is_plain_norm(norm) and _is_plain_relu(relu) and has_fused_form(x, norm.weight, norm.bias)):
        result: Tensor = relu(norm(x))
        return result
    y, mean, variance = batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
    count = x.numel() / x.shape[1]
    _update_statistics(norm, mean, variance * (count / (count - 1)))
    return y


def _is_plain_norm(layer: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether the layer is a batch norm in training with weights and running statistics, and no more than that."""
    plain = (
        layer.training
        and type(layer) is nn.BatchNorm2d
        and layer.affine
        and layer.track_running_stats
        and layer.momentum is not None
    )
    return plain and not _has_hooks(layer)


def _is_plain_relu(layer: nn.Module) -> bool:
    return type(layer) is nn.ReLU and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


@torch.no_grad()
def _update_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Moves the running statistics towards a batch's, its variance unbiased."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """The model with batch norms that, while they train, normalise by the statistics of all processes.

    The state_dict stays what it was. On a GPU they are torch's own SyncBatchNorm, which does not run on a CPU.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SynchronisedBatchNorm(child))
    return model


class SynchronisedBatchNorm(_BatchNorm):
    """A batch norm's parameters and statistics, taken over from it; each channel is normalised over all processes."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        if norm.momentum is None or not norm.affine:
            raise ValueError(f"only a batch norm with weights and a momentum can be synchronised, got {norm}")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:  # [N, C, ...]
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if self.track_running_stats:
            _update_statistics(self, mean, variance * (count / (count - 1)))
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _Normalise(torch.autograd.Function):
    """(y, mean [C], biased variance [C], count []) over all processes; gradients of a sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        others = [dim for dim in range(x.ndim) if dim != 1]
        wide = x.float()
        variance, mean = torch.var_mean(wide, others, correction=0)
        count = mean.new_full((1,), x.numel() / x.shape[1])
        own = torch.cat([mean, variance, count])
        every = own.new_empty(dist.get_world_size(), len(own))
        dist.all_gather(list(every.unbind(0)), own)
        means, variances, counts = every.split([len(mean), len(mean), 1], 1)
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        # Deviations from each process's own mean, and of that mean: no difference of large squares.
        variance = (shares * (variances + (means - mean).square())).sum(0)
        scale = torch.rsqrt(variance + eps)
        y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count = counts.sum()
        ctx.mark_non_differentiable(mean, variance, ctx.count)
        return y, mean, variance, ctx.count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a batch norm over several processes", "train with sync_batch_norm off")
        x, weight, mean, scale = ctx.saved_tensors
        others = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = dy.float()
        normal = (x.float() - mean.view(shape)) * scale.view(shape)
        own = torch.stack([wide.sum(others), (wide * normal).sum(others)])
        dbias, dweight = own.clone()  # of this process alone; averaging the parameters' gradients adds them up
        dist.all_reduce(own)
        mean_dy, mean_dy_normal = (own / ctx.count).unbind(0)
        dx = wide - mean_dy.view(shape) - normal * mean_dy_normal.view(shape)
        return (dx * (weight * scale).view(shape)).to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode leave their running statistics alone: for a pass that repeats another."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, _copy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        # They are updated, by nothing: without them, torch would save other tensors for the backward pass than in the
        # pass that this one repeats, and activation checkpointing checks that they are the same.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and batches is not None:
                norm.num_batches_tracked.copy_(batches)


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()
