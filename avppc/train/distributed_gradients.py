"""Averages the gradients of all processes while the backward pass still computes others.

torch's DistributedDataParallel ties this to one forward and one backward of the wrapped module. A step with cached
representations has several, and gradients of the loss's own parameters come before those of the encoders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avppc.train.distributed import Processes

_BUCKET_ELEMENTS = 6 * 2**20  # 24 MiB of float32


@dataclass
class _Bucket:
    """Parameters whose gradients travel together."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    waiting: int = 0
    """Parameters whose gradient is still to come."""
    flat: Tensor | None = None
    """The gradients on their way."""
    work: Any = None


class GradientAverager:
    """Call `arm()` before the last backward pass of a step (optional), and `finish()` after it.

    Buckets are filled in the order in which a backward pass reaches the parameters. All processes send them in that
    order, each as soon as it and those before it are full.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        self._processes = processes
        self._buckets = [_Bucket()]
        self._armed = False
        self._sent = 0
        if processes.size == 1:
            return
        for parameter in reversed([parameter for parameter in parameters if parameter.requires_grad]):
            bucket = self._buckets[-1]
            if bucket.parameters and sum(p.numel() for p in bucket.parameters) + parameter.numel() > _BUCKET_ELEMENTS:
                bucket = _Bucket()
                self._buckets.append(bucket)
            bucket.parameters.append(parameter)
            parameter.register_post_accumulate_grad_hook(self._arrived(bucket))

    def arm(self) -> None:
        """From now on, each gradient that arrives is this process's complete one."""
        self._armed = True
        self._sent = 0
        for bucket in self._buckets:
            bucket.waiting = len(bucket.parameters)

    def finish(self) -> None:
        """Makes every .grad the average over processes."""
        if self._processes.size == 1:
            return
        if not self._armed:
            self._sent = 0
        self._armed = False
        while self._sent < len(self._buckets):
            self._send()
        for bucket in self._buckets:
            bucket.work.wait()
            assert bucket.flat is not None
            parts = bucket.flat.split([parameter.numel() for parameter in bucket.parameters])
            for parameter, part in zip(bucket.parameters, parts, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter.grad))
            bucket.flat = bucket.work = None

    def _arrived(self, bucket: _Bucket) -> Any:
        def hook(_: Tensor) -> None:
            if not self._armed:
                return
            bucket.waiting -= 1
            while self._sent < len(self._buckets) and self._buckets[self._sent].waiting == 0:
                self._send()

        return hook

    def _send(self) -> None:
        bucket = self._buckets[self._sent]
        self._sent += 1
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in bucket.parameters
        ]
        bucket.flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(self._processes.size)
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
