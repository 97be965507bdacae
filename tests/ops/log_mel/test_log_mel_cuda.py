"""The CUDA kernels of log_mel on a GPU. AVPPC_REQUIRE_GPU=1 makes their absence a failure instead of a skip."""

from __future__ import annotations

import os

import pytest
import torch
from log_mel_configs import DALI, MFCC, NEMO, PRESETS, SNIPPED_DB, tolerance_of
from make_audio import hard_cases, speech_like

from avppc import LogMelConfig, log_mel
from avppc.ops import _library
from avppc.ops.log_mel.reference import log_mel_reference

MISSING = _library.missing_reason("cuda")
pytestmark = pytest.mark.skipif(
    MISSING is not None and os.environ.get("AVPPC_REQUIRE_GPU") != "1", reason=f"log_mel's CUDA kernels: {MISSING}"
)

CONFIGS = {**{name: LogMelConfig.preset(name) for name in PRESETS}, "nemo": NEMO, "dali": DALI,
           "snipped": SNIPPED_DB, "mfcc": MFCC}  # fmt: skip


def tolerance_here(config: LogMelConfig) -> float:
    """GPUs with slow doubles transform in float, as torch does."""
    fast_doubles = torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0))
    return tolerance_of(config) * (1 if fast_doubles else 500)


@pytest.mark.parametrize("samples", [1600, 18_560, 40_000, 960_000], ids=lambda n: f"S{n}")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_speech_equals_the_definition(config: LogMelConfig, samples: int, dtype: torch.dtype) -> None:
    waveform = torch.stack([speech_like(samples, seed) for seed in range(2)])
    if dtype == torch.int16:
        waveform = (waveform * 32767).round().to(torch.int16)
    lengths = torch.tensor([samples, samples * 2 // 3])
    expected = log_mel_reference(waveform.double() / (32768 if dtype == torch.int16 else 1), config, lengths)
    features = log_mel(waveform.cuda(), config, lengths=lengths.cuda(), backend="cuda").cpu()
    torch.testing.assert_close(features.double(), expected, atol=tolerance_here(config), rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", sorted(hard_cases(8)))
def test_hard_signals_equal_the_definition(preset: str, case: str) -> None:
    config = LogMelConfig.preset(preset)
    waveform = hard_cases(4000)[case]
    features = log_mel(waveform.cuda(), config).cpu()
    expected = log_mel_reference(waveform.double(), config)
    torch.testing.assert_close(features.double(), expected, atol=tolerance_here(config), rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("samples", [7000, 40_000])
def test_a_clip_does_not_depend_on_its_batch_and_runs_repeat(config: LogMelConfig, samples: int) -> None:
    waveform = torch.stack([speech_like(samples, seed) for seed in range(5)]).cuda()
    batch = log_mel(waveform, config)
    assert torch.equal(batch, log_mel(waveform, config))
    assert torch.equal(batch, torch.stack([log_mel(clip, config) for clip in waveform]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch itself
def test_opcheck_and_compile() -> None:
    waveform, lengths = speech_like(3200).reshape(2, 1600).cuda(), torch.tensor([1600, 700]).cuda()
    torch.library.opcheck(torch.ops.avppc.log_mel, (waveform, lengths, LogMelConfig.preset("whisper").to_text()))
    compiled = torch.compile(lambda x: log_mel(x), fullgraph=True)
    assert torch.equal(compiled(waveform), log_mel(waveform))


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    waveform = speech_like(16_000).cuda()
    expected = log_mel(waveform)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        later = waveform * 1.0
        features = log_mel(later)
    stream.synchronize()
    assert torch.equal(features, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = log_mel(waveform)
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_pinned_audio_is_copied_in_the_order_of_the_stream() -> None:
    pinned = speech_like(64_000).reshape(4, 16_000).pin_memory()
    expected = log_mel(pinned.clone().cuda())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the copy is still to come when log_mel is called
        features = log_mel(pinned.to("cuda", non_blocking=True))
    stream.synchronize()
    assert torch.equal(features, expected)
    assert torch.allclose(log_mel(pinned), expected.cpu(), atol=1e-4)  # pinned memory is the CPU's


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input() -> None:
    waveform = speech_like(16_000)
    features = log_mel(waveform.to("cuda:1"))
    assert (features.device, torch.cuda.current_device()) == (torch.device("cuda:1"), 0)
    assert torch.equal(features.cpu(), log_mel(waveform.to("cuda:0")).cpu())


def test_lengths_are_limited_to_the_clip() -> None:
    waveform = speech_like(3200).reshape(2, 1600).cuda()
    wrong = log_mel(waveform, lengths=torch.tensor([99_999, -5]).cuda())
    assert torch.equal(wrong, log_mel(waveform, lengths=torch.tensor([1600, 0]).cuda()))
