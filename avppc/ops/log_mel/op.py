"""Log-mel features of a batch of waveforms: the public op with its checks and dispatch, and its nn.Module."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from avppc.checks import check_choice, check_tensor, without_autocast
from avppc.ops import _library
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.reference import log_mel_reference, mel_filter_bank_reference
from avppc.ops.modes import derivative_of, is_plain

BACKENDS = ("auto", "cpp", "cuda", "reference")
_LENGTH_DTYPES = (torch.int32, torch.int64)


def log_mel(
    waveform: Tensor,  # [..., S]
    config: LogMelConfig = LogMelConfig(),  # noqa: B008 - a frozen dataclass
    *,
    lengths: Tensor | None = None,  # [...]
    backend: str = "auto",
) -> Tensor:  # [..., F, features]
    """Log-mel features [..., F, features] of each waveform, as `log_mel_reference` defines them.

    There is no gradient, and a waveform that requires one is refused (the reference is differentiable). Under
    derivatives by torch.func and in forward mode "auto" is the reference, with its derivatives. Warns of mel bands that
    hold no point of the transform.

    Args:
        waveform: [..., S] float32 of full scale +-1, or int16, which means x / 32768; the reference also takes float64.
        config: what the features are; the default gives ln(mel power + 1e-6), 80 bands, 100 frames a second at 16 kHz.
        lengths: [...] int32 or int64, samples of each clip that count, 0 to S. A clip's features are those of the clip
            alone; frames past its end hold the features of a silent frame.
        backend: "cpp" (CPU tensors), "cuda" (CUDA tensors), "reference" (plain torch), or "auto": the compiled one for
            the waveform's device where it is there, else the reference.

    Returns:
        [..., F, features] float32 (float64 for float64), F = config.num_frames(S), features = config.features.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value, or S is too short for one frame.
        RuntimeError: the backend asked for is not there, or torch.jit.trace is at work; the text says what to run.
    """
    _check_waveform(waveform, config)
    if lengths is not None:
        _check_lengths(lengths, waveform)
    derivative = derivative_of(waveform)
    _check_gradient(waveform, derivative)
    backend = _pick_backend(waveform, backend, config, derivative)
    if backend == "reference":
        with without_autocast(waveform):  # bfloat16 products would cost two digits
            return log_mel_reference(waveform if derivative else waveform.detach(), config, lengths)
    samples = waveform.shape[-1]
    flat_lengths = None if lengths is None else lengths.reshape(-1).to(torch.int64).contiguous()
    features: Tensor = torch.ops.avppc.log_mel(
        waveform.reshape(-1, samples).contiguous(), flat_lengths, config.to_text()
    )
    return features.reshape(*waveform.shape[:-1], *features.shape[-2:])


class LogMel(nn.Module):
    """`log_mel` as a module without parameters: [..., S] -> [..., F, features]."""

    def __init__(self, config: LogMelConfig = LogMelConfig(), *, backend: str = "auto") -> None:  # noqa: B008 - frozen
        super().__init__()
        _check_config(config)
        check_choice("backend", backend, BACKENDS)
        self.config = config
        self.backend = backend

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The features of each waveform; the arguments are those of `log_mel`."""
        return log_mel(waveform, self.config, lengths=lengths, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}"


def _check_waveform(waveform: Tensor, config: LogMelConfig) -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch does not annotate it
        raise RuntimeError(
            "torch.jit.trace and torch.onnx.export(dynamo=False) cannot record log_mel: use torch.export.export, "
            'or torch.onnx.export(dynamo=True) with backend="reference"'
        )
    check_tensor("waveform", waveform)
    _check_config(config)
    if waveform.dtype not in (torch.float32, torch.int16, torch.float64):
        raise TypeError(f"waveform must be float32 or int16 (float64 on the reference), got {waveform.dtype}")
    if waveform.ndim < 1 or waveform.numel() == 0:
        raise ValueError(f"waveform must have shape [..., S] with at least one sample, got {tuple(waveform.shape)}")
    if config.num_frames(waveform.shape[-1]) < 1:
        raise ValueError(
            f"waveform has {waveform.shape[-1]} samples a clip, too few for one frame with framing={config.framing!r}, "
            f"window_samples={config.window_samples}, hop_samples={config.hop_samples}, "
            f"drop_last_frame={config.drop_last_frame}"
        )


def _check_gradient(waveform: Tensor, derivative: str | None) -> None:
    """Raises where a backward pass would ask for the gradient that is not there."""
    if derivative is None and waveform.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "waveform must not require a gradient: log_mel has none; "
            "detach it or use avppc.ops.log_mel.reference.log_mel_reference"
        )


def _check_config(config: LogMelConfig) -> None:
    if not isinstance(config, LogMelConfig):
        raise TypeError(f"config must be a LogMelConfig, got {type(config).__name__}")
    _warn_of_empty_bands(config.to_text())


@_library.constant_when_compiled
def _warn_of_empty_bands(config: str) -> None:
    """Warns, once for a configuration, of mel bands that no point of the transform falls into."""
    _warn_of_empty_bands_once(config)


@functools.cache
def _warn_of_empty_bands_once(config: str) -> None:
    settings = LogMelConfig.from_text(config)
    empty = (mel_filter_bank_reference(settings).amax(0) == 0).nonzero().flatten().tolist()
    if empty:
        warnings.warn(
            f"{len(empty)} of {settings.bands} mel bands (the first: band {empty[0]}) lie between two points of the "
            f"transform and are always silent: take fewer bands or a larger fft_size than {settings.fft_size}",
            stacklevel=6,  # the caller of log_mel
        )


def _check_lengths(lengths: Tensor, waveform: Tensor) -> None:
    check_tensor("lengths", lengths)
    if lengths.dtype not in _LENGTH_DTYPES:
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != waveform.shape[:-1]:
        raise ValueError(
            f"lengths must have the waveform's leading shape {tuple(waveform.shape[:-1])}, got {tuple(lengths.shape)}"
        )
    if lengths.device != waveform.device:
        raise ValueError(f"lengths must be on the waveform's device {waveform.device}, got {lengths.device}")
    # On a GPU reading the values would wait for it; the kernel limits them to 0..S instead.
    if lengths.device.type == "cpu" and is_plain(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > waveform.shape[-1]:
            raise ValueError(f"lengths must be from 0 to {waveform.shape[-1]}, got values from {low} to {high}")


def _pick_backend(waveform: Tensor, backend: str, config: LogMelConfig, derivative: str | None = None) -> str:
    """ "cpp", "cuda" or "reference" for this waveform, and for the derivative that is asked of the call."""
    check_choice("backend", backend, BACKENDS)
    device = waveform.device.type
    if backend == "auto":
        compiled = {"cpu": "cpp", "cuda": "cuda"}.get(device)
        if compiled is None or waveform.dtype == torch.float64 or derivative is not None:
            return "reference"
        reason = _cuda_problem(config) if compiled == "cuda" else None
        reason = reason or _library.missing_reason(compiled)
        if reason is not None:
            _library.log_plain_torch("log_mel", device, compiled, reason)
            return "reference"
        return compiled
    if backend == "reference":
        return backend
    if waveform.dtype == torch.float64:
        raise TypeError(f"waveform must be float32 or int16 with backend={backend!r}, got torch.float64")
    if derivative is not None:
        raise RuntimeError(f"log_mel(backend={backend!r}) has no {derivative}; use 'reference'")
    needed = {"cpp": "cpu", "cuda": "cuda"}[backend]
    if device != needed:
        raise ValueError(f"waveform must be on a {needed} device with backend={backend!r}, got {waveform.device}")
    if backend == "cuda" and _cuda_problem(config) is not None:
        raise ValueError(f"log_mel(backend='cuda'): {_cuda_problem(config)}")
    _library.require(backend, "log_mel")
    return backend


def _cuda_problem(config: LogMelConfig) -> str | None:
    if config.has_cuda_transform:
        return None
    return f"fft_size must be at least 12 without a prime factor above 5 for them, got {config.fft_size}"


def _log_mel_fake(waveform: Tensor, lengths: Tensor | None, config: str) -> Tensor:
    settings = LogMelConfig.from_text(config)
    frames = settings.num_frames(waveform.shape[-1])
    return waveform.new_empty((waveform.shape[0], frames, settings.features), dtype=torch.float32)


if _library.has_cpp_ops():
    torch.library.register_fake("avppc::log_mel", _log_mel_fake)
