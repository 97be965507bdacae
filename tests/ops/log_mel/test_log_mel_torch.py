"""log_mel as a torch operator: opcheck, torch.compile, the module; what it refuses, and life without the extension."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from log_mel_configs import PRESETS
from make_audio import speech_like
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from avppc import LogMel, LogMelConfig, log_mel
from avppc.ops import _library
from avppc.ops.log_mel.op import _pick_backend
from avppc.ops.log_mel.reference import log_mel_reference


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_opcheck(preset: str, dtype: torch.dtype) -> None:
    waveform = (speech_like(3200) * (1 if dtype == torch.float32 else 32767)).to(dtype).reshape(2, 1600)
    config = LogMelConfig.preset(preset).to_text()
    for lengths in (None, torch.tensor([1600, 800])):
        torch.library.opcheck(torch.ops.avppc.log_mel, (waveform, lengths, config))


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
def test_compiles_into_one_graph_for_any_length(backend: str) -> None:
    torch.compiler.reset()
    config = LogMelConfig.preset("whisper")

    def features(waveform: Tensor) -> Tensor:
        return log_mel(waveform * 0.5, config, backend=backend) + 1

    compiled = torch.compile(features, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (1600, 1920, 2500):
        waveform = speech_like(samples).expand(2, -1)
        torch.testing.assert_close(compiled(waveform), features(waveform), atol=1e-5, rtol=0)


def test_compiles_with_lengths() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x, n: log_mel(x, lengths=n), fullgraph=True, backend="aot_eager")
    waveform, lengths = torch.stack([speech_like(1600), speech_like(1600, 1)]), torch.tensor([1600, 700])
    assert torch.equal(compiled(waveform, lengths), log_mel(waveform, lengths=lengths))


def test_tensors_without_values_give_the_shape_of_the_features() -> None:
    assert log_mel(torch.zeros(2, 1600, device="meta")).shape == (2, 10, 80)
    with FakeTensorMode():
        assert log_mel(torch.zeros(2, 1600), lengths=torch.tensor([3, 1600])).shape == (2, 10, 80)


def test_vmap_with_lengths() -> None:
    waveforms, lengths = torch.stack([speech_like(1600), speech_like(1600, 1)]), torch.tensor([1600, 700])
    mapped = torch.vmap(lambda x, n: log_mel(x, lengths=n))(waveforms, lengths)
    torch.testing.assert_close(mapped, log_mel(waveforms, lengths=lengths))


def test_module_gives_what_the_function_gives() -> None:
    waveform, lengths = torch.stack([speech_like(1600), speech_like(1600, 1)]), torch.tensor([1600, 700])
    config = LogMelConfig.preset("librosa")
    module = LogMel(config)
    assert torch.equal(module(waveform, lengths), log_mel(waveform, config, lengths=lengths))
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "mel_scale='slaney'" in repr(module)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    waveform = speech_like(1600)
    expected = log_mel(waveform, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        features = log_mel(waveform, backend=backend)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)


def test_there_is_no_gradient_but_the_definition_has_one() -> None:
    waveform = speech_like(800).double().requires_grad_()
    for backend in ("auto", "reference"):
        with pytest.raises(
            ValueError,
            match=r"waveform must not require a gradient: .*avppc\.ops\.log_mel\.reference\.log_mel_reference",
        ):
            log_mel(waveform, backend=backend)
    with torch.no_grad():
        assert not log_mel(waveform).requires_grad
    assert log_mel_reference(waveform, LogMelConfig()).requires_grad  # test_log_mel_gradients.py says what it is


def test_float64_goes_to_the_definition() -> None:
    waveform = speech_like(1600).double()
    assert torch.equal(log_mel(waveform), log_mel_reference(waveform, LogMelConfig()))
    assert log_mel(waveform).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: log_mel([0.0]), TypeError, "waveform must be a torch.Tensor, got list"),
        (lambda x: log_mel(x.half()), TypeError, r"waveform must be float32 or int16 .*got torch.float16"),
        (lambda x: log_mel(x.to(torch.int32)), TypeError, "got torch.int32"),
        (lambda x: log_mel(x.double(), backend="cpp"), TypeError, "backend='cpp', got torch.float64"),
        (lambda x: log_mel(x, "whisper"), TypeError, "config must be a LogMelConfig, got str"),
        (lambda x: log_mel(torch.tensor(1.0)), ValueError, r"shape \[..., S\] with at least one sample, got \(\)"),
        (lambda x: log_mel(x[:, :0]), ValueError, r"at least one sample, got \(2, 0\)"),
        (lambda x: log_mel(x[:0]), ValueError, r"at least one sample, got \(0, 1600\)"),
        (lambda x: log_mel(x[:, :100]), ValueError, "waveform has 100 samples a clip, too few for one frame"),
        (lambda x: log_mel(x, backend="triton"), ValueError, "backend must be one of 'auto', 'cpp', 'cuda'"),
        (lambda x: LogMel(None), TypeError, "config must be a LogMelConfig, got NoneType"),
        (lambda x: LogMel(backend="gpu"), ValueError, "backend must be one of"),
        (lambda x: log_mel(x, backend="cuda"), ValueError, "waveform must be on a cuda device .*got cpu"),
        (lambda x: log_mel(x.to("meta"), backend="cpp"), ValueError, "waveform must be on a cpu device .*got meta"),
        (lambda x: log_mel(x, lengths=[1600, 1600]), TypeError, "lengths must be a torch.Tensor, got list"),
        (lambda x: log_mel(x, lengths=torch.ones(2)), TypeError, "lengths must be int32 or int64, got torch.float32"),
        (lambda x: log_mel(x, lengths=torch.tensor([1600])), ValueError, r"leading shape \(2,\), got \(1,\)"),
        (lambda x: log_mel(x, lengths=torch.tensor([1, 1601])), ValueError, "0 to 1600, got values from 1 to 1601"),
        (lambda x: log_mel(x, lengths=torch.tensor([-1, 5])), ValueError, "0 to 1600, got values from -1 to 5"),
        (lambda x: log_mel(x, lengths=torch.tensor([1, 5], device="meta")), ValueError, "device cpu, got meta"),
    ],
)  # fmt: skip
def test_refuses(call: Callable[[Tensor], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(speech_like(3200).reshape(2, 1600))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(1600), None), "waveform must have 2 dimensions, got 1"),
        ((torch.zeros(2, 3200)[:, ::2], None), "waveform must be contiguous"),
        ((torch.zeros(2, 1600).double(), None), "waveform must be Float, got Double"),
        ((torch.zeros(2, 100), None), "samples for one frame, got 2 clips of 100 samples"),
        ((torch.zeros(2, 1600), torch.tensor([1, 2], dtype=torch.int32)), "lengths must be Long, got Int"),
        ((torch.zeros(2, 1600), torch.tensor([1])), "lengths must have 2 elements, got 1"),
        ((torch.zeros(2, 1600), torch.tensor([1, 1601])), "lengths must be from 0 to 1600, got 1601"),
    ],
)
def test_the_compiled_operator_checks_for_itself(arguments: tuple[Tensor, Tensor | None], text: str) -> None:
    """And says what is wrong, not where the machine that built it had its sources."""
    with pytest.raises(RuntimeError, match=f"^avppc: .*{text}"):
        torch.ops.avppc.log_mel(*arguments, LogMelConfig().to_text())


@pytest.mark.parametrize(
    ("device", "backend", "level"), [("cpu", "cpp", logging.INFO), ("cuda", "cuda", logging.WARNING)]
)
def test_a_missing_backend_is_told_once_and_on_a_gpu_as_a_warning(
    device: str, backend: str, level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_library, "missing_reason", lambda part: f"there is no {part}")
    _library._log_once.cache_clear()
    waveform: Any = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    with caplog.at_level(logging.DEBUG, logger="avppc"):
        assert [_pick_backend(waveform, "auto", LogMelConfig()) for _ in range(2)] == ["reference"] * 2
    text = f"log_mel runs in plain torch on {device}, without the '{backend}' kernels: there is no {backend}"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(level, text)]
    _library._log_once.cache_clear()


def test_a_gpu_takes_the_reference_for_transforms_that_its_kernel_does_not_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_library, "missing_reason", lambda part: None)
    _library._log_once.cache_clear()
    waveform: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    config = LogMelConfig(fft_size=882, window_samples=882)
    with caplog.at_level(logging.WARNING, logger="avppc"):
        assert _pick_backend(waveform, "auto", LogMelConfig()) == "cuda"
        assert not caplog.records
        assert _pick_backend(waveform, "auto", config) == "reference"
    assert caplog.messages == [
        "log_mel runs in plain torch on cuda, without the 'cuda' kernels: "
        "fft_size must be at least 12 without a prime factor above 5 for them, got 882"
    ]
    with pytest.raises(ValueError, match=r"fft_size must be at least 12 without a prime factor above 5 .*got 882"):
        _pick_backend(waveform, "cuda", config)
    _library._log_once.cache_clear()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_recording_by_torch_jit_is_refused_with_a_way_out(backend: str) -> None:
    module, waveform = LogMel(backend=backend), speech_like(1600)
    with pytest.raises(RuntimeError, match=r"cannot record log_mel: use torch\.export\.export"):
        torch.jit.trace(module, waveform)
    exported = torch.export.export(module, (waveform,)).module()
    torch.testing.assert_close(exported(waveform), module(waveform))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_without_the_extension(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ "auto" falls back and says so once, compiled too; "cpp" raises and says what to run."""
    reason = "libavppc_cpu.so was not built: run `pip install -e . --no-build-isolation` in the source tree"
    monkeypatch.setattr(_library, "_find", lambda part: reason)
    _library._log_once.cache_clear()
    torch.compiler.reset()
    features = torch.compile(log_mel, fullgraph=True, backend="aot_eager") if compiled else log_mel
    waveform = speech_like(1600)
    with caplog.at_level(logging.INFO, logger="avppc"):
        torch.testing.assert_close(features(waveform), log_mel_reference(waveform, LogMelConfig()), atol=0, rtol=0)
        features(waveform)
    assert [record.getMessage() for record in caplog.records] == [
        f"log_mel runs in plain torch on cpu, without the 'cpp' kernels: {reason}"
    ]
    _library._log_once.cache_clear()
    torch.compiler.reset()
    with pytest.raises(
        RuntimeError, match=r"log_mel\(backend='cpp'\) needs the compiled extension: .*run `pip install"
    ):
        log_mel(waveform, backend="cpp")
