"""The processes of a run, each with a device of its own: one, or as many as torchrun started; their mean gradient; and
the step after which they all end.

Gradients are averaged while the backward pass still computes others. torch's DistributedDataParallel ties this to one
forward and one backward of the wrapped module. A step with cached representations has several, and gradients of the
loss's own parameters come before those of the encoders.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Imported before there is a group: the functions of this module take the default group at its import as their default
# (torch 2.13) and keep that group's threads for ever; such a thread aborts a process if it frees a tensor at shutdown.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from avppc.processes import end_at_once, tell
from avppc.train.hardware import resolve_device

T = TypeVar("T")
_LOST = re.compile("gloo/transport|NCCL|Connection (closed|reset) by peer|Broken pipe")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a cluster sends SIGTERM before it takes a machine away

_BUCKET_ELEMENTS = 6 * 2**20  # 24 MiB of float32


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    """Device of this process."""

    @property
    def main(self) -> bool:
        """Whether this process, number 0, is the one that logs and saves."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Clips of a batch for each process; ValueError if it cannot be dealt out evenly."""
        if batch_size % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes, got {batch_size}")
        return batch_size // self.size

    def barrier(self) -> None:
        """Waits until every process has come here."""
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes; `value` itself if there is only one."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """[G, ...]: the values of all processes, in order."""
        if self.size == 1:
            return value[None]
        every = value.new_empty(self.size, *value.shape)
        dist.all_gather(list(every.unbind(0)), value.contiguous())
        return every

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Calls `work` on every process and returns its result; if one raises, all do, so that none waits for it."""
        refusal: Exception | None = None
        try:
            result = work()
        except Exception as error:
            refusal = error
        refusals = int(self.sum(torch.tensor(refusal is not None, dtype=torch.int32)))
        if refusal is not None:
            raise refusal
        if refusals:
            raise ValueError("another process has refused to begin, and says why")
        return result

    def check_same(self, value: Tensor, what: str) -> None:
        """Raises ValueError on every process unless all have the same float64 numbers."""
        every = self.gather(value)
        for rank, other in enumerate(every):
            if not torch.equal(other, every[0]):
                raise ValueError(f"{what} of process {rank} is {other.tolist()}, that of process 0 {every[0].tolist()}")


def _connect(device: torch.device) -> None:
    """Makes the default group of torch.distributed, as the environment describes it.

    torchrun's store outlives a restart and holds the addresses of processes that are gone. Gloo would wait for ever for
    one of them (torch 2.13). So each start of the run has names of its own in the store: its processes count themselves
    there, and `size` of them are one start.
    """
    store, rank, size = next(rendezvous("env://"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    start = (store.add(f"avppc/{restarts}", 1) - 1) // size
    own_names = dist.PrefixStore(f"avppc/{restarts}/{start}", store)  # type: ignore[attr-defined]  # public all the same
    # Gloo beside NCCL: the processes agree on numbers that the host needs without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=own_names, rank=rank, world_size=size)


def _number(name: str, default: int, least: int = 0, most: int = 1 << 20) -> int:
    """A number that torchrun put into the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"the environment's {name} must be from {least} to {most}, got {text!r}")
    return int(text)


@contextlib.contextmanager
def join_processes(device_name: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined (NCCL for GPUs, Gloo for CPUs); without it this process alone.

    Args:
        device_name: as in resolve_device; "auto" and "cuda" are GPU number LOCAL_RANK.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield Processes(0, 1, resolve_device(device_name))
        return
    rank = _number("RANK", 0, most=size - 1)
    device = resolve_device(device_name)
    if device.type == "cuda":
        if device_name in ("auto", "cuda"):
            device = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    with end_at_once("it waited for the other processes of the run"), _lost_processes_named():
        _connect(device)
        try:
            yield Processes(rank, size, device)
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _lost_processes_named() -> Iterator[None]:
    """Inside, a ConnectionError says it where torch.distributed cannot reach a process, most often since it ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"another process of this run has ended, or cannot be reached; its own last lines say why ({cause})"
        ) from error


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


class StopRequest:
    """Notices SIGTERM and SIGINT while it is open. Asked once a step, it gives the same answer on all processes:
    whether to stop. A second Ctrl-C ends the process at once, by KeyboardInterrupt.

    With several processes the answer is that of the step before, since it travels while the step computes.
    """

    def __init__(self, processes: Processes) -> None:
        self.signal: int = signal.SIGTERM
        """The signal that came first; SIGTERM where it came to another process."""
        self._processes = processes
        self._asked = False
        self._flag: torch.Tensor | None = None
        self._work: Any = None
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_wakeup = signal.set_wakeup_fd(-1)  # whoever else ends this process by signals waits
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
        if error is None and self._work is not None:
            self._work.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._asked:
                raise KeyboardInterrupt
            tell("stopping after this step, which is going to be saved; Ctrl-C once more ends it at once")
        if not self._asked:
            self._asked, self.signal = True, number

    def agreed(self) -> bool:
        """Whether any process was asked to stop."""
        if self._processes.size == 1:
            return self._asked
        stop = False
        if self._work is not None:
            self._work.wait()
            assert self._flag is not None
            stop = bool(self._flag)
        self._flag = torch.tensor(self._asked, dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return stop
