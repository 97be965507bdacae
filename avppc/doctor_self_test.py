"""Each op on this machine against its definition in float64: the self-test of `avppc doctor`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from avppc.ops import _library
from avppc.ops.info_nce.op import bilinear_info_nce, pick_backend
from avppc.ops.info_nce.problem import make_problem
from avppc.ops.log_mel.config import PRESETS, LogMelConfig
from avppc.ops.log_mel.op import log_mel
from avppc.ops.log_mel.reference import log_mel_reference

# In units of the features; the transform of plain torch is in float32.
LOG_MEL_ALLOWED = {"cpp": 1e-4, "cuda": 1e-4, "reference": 5e-3}
INFO_NCE_ALLOWED = 1e-4  # of the norm of what is compared


@dataclass(frozen=True)
class SelfTest:
    """What one op did on one device."""

    op: str
    device: str
    backend: str
    case: str
    error: float
    """Largest deviation from the definition in float64; NaN where the op failed."""
    allowed: float
    seconds: float
    problem: str | None = None
    """What the op raised; None if it gave a result."""

    @property
    def ok(self) -> bool:
        """Whether the op gave the right result."""
        return self.problem is None and self.error <= self.allowed


def self_tests() -> Iterator[SelfTest]:
    """Runs every op on every device of this machine, by the backend that "auto" picks there."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for preset in PRESETS:
            config = LogMelConfig.preset(preset)
            backend = log_mel_backend(device)
            yield _timed(
                "log_mel", device, backend, preset, LOG_MEL_ALLOWED[backend], partial(_log_mel_error, config, device)
            )
        backend = info_nce_backend(device)
        for symmetric in (False, True):
            case = "loss and gradients" + (", symmetric" if symmetric else "")
            yield _timed(
                "bilinear_info_nce", device, backend, case, INFO_NCE_ALLOWED,
                partial(_info_nce_error, symmetric, device),
            )  # fmt: skip


def log_mel_backend(device: str) -> str:
    """The backend that "auto" means for float32 on this device."""
    compiled = {"cpu": "cpp", "cuda": "cuda"}[device]
    return "reference" if _library.missing_reason(compiled) else compiled


def info_nce_backend(device: str) -> str:
    """The backend that "auto" means for float32 on this device."""
    contexts = torch.zeros(2, 16, 32, device=device)
    problem = make_problem(contexts, contexts, torch.zeros(2, 32, 32, device=device), None)
    return pick_backend(problem, "auto")


def _timed(op: str, device: str, backend: str, case: str, allowed: float, error_of: Callable[[], float]) -> SelfTest:
    start, problem, error = time.perf_counter(), None, math.nan
    try:
        error = error_of()
    except Exception as raised:  # a broken installation raises anything: the others are still to be tested
        problem = f"{type(raised).__name__}: {raised}"
    return SelfTest(op, device, backend, case, error, allowed, time.perf_counter() - start, problem)


def _log_mel_error(config: LogMelConfig, device: str) -> float:
    """Of two clips, a rising tone with noise and a shorter one."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(16_000, dtype=torch.float64) / 16_000
    tone = torch.sin(2 * math.pi * (200 + 1500 * seconds) * seconds)
    waveform = torch.stack([0.5 * tone, 0.1 * tone.flip(0)])
    waveform = (waveform + 0.01 * torch.randn(waveform.shape, generator=generator, dtype=torch.float64)).float()
    lengths = torch.tensor([16_000, 9_000])
    expected = log_mel_reference(waveform.double(), config, lengths)
    features = log_mel(waveform.to(device), config, lengths=lengths.to(device))
    return float((features.cpu().double() - expected).abs().max())


def _info_nce_error(symmetric: bool, device: str) -> float:
    """Of the loss of four sub-tasks and its gradients, the largest, each relative to its norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 48, 40), (3, 48, 32), (4, 32, 40))  # contexts, targets, weights
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes]
    pairs = [(0, 1), (1, 2), (2, 0), (0, 2)]

    def solve(tensors: list[Tensor], backend: str) -> list[Tensor]:
        contexts, targets, weights = leaves = [tensor.requires_grad_() for tensor in tensors]
        loss = bilinear_info_nce(contexts, targets, weights, pairs, scale=1.5, symmetric=symmetric, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    found = solve([tensor.float().to(device) for tensor in exact], "auto")
    expected = solve(exact, "reference")
    return max(
        float((a.detach().cpu().double() - b).norm() / b.norm())
        for a, b in zip(found, (value.detach() for value in expected), strict=True)
    )
