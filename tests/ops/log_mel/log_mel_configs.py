"""Configurations of log_mel for the tests, and how closely each can be met in float32."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st
from torch import Tensor

from avppc import LogMelConfig
from avppc.ops.log_mel.config import FRAMINGS, LOGS, MEL_NORMS, MEL_SCALES, PADDINGS, PREEMPHASIS_SCOPES, WINDOWS
from avppc.ops.log_mel.reference import log_mel_reference

PRESETS = ("torchaudio", "librosa", "whisper", "kaldi")

NEMO = LogMelConfig(
    window_samples=320, bands=64, mel_scale="slaney", mel_norm="slaney", window="hann_symmetric", preemphasis=0.97,
    log_offset=2.0**-24, normalize="per_feature", padding="constant",
)  # fmt: skip
NEMO_2_4 = dataclasses.replace(NEMO, padding="reflect", drop_last_frame=False)
DALI = dataclasses.replace(
    LogMelConfig.preset("librosa"), window="hann_half_sample", padding="reflect", dynamic_range=None
)
SNIPPED_DB = LogMelConfig(
    mel_scale="slaney", mel_norm="slaney", window="hann_half_sample", framing="snip_edges", log="db", log_offset=0.0,
    log_floor=1e-20, relative_to_max=True, dynamic_range=80.0, drop_last_frame=False,
)  # fmt: skip
MFCC = LogMelConfig(mfcc=13, log="db", dynamic_range=80.0, log_offset=0.0, log_floor=1e-10, output_scale=0.5)

TOLERANCE = 2e-6  # of the natural logarithm: the transform is in double, so float's last bits remain


def tolerance_of(config: LogMelConfig, waveform: Tensor | None = None) -> float:
    """Largest error to allow in the units of the output; without a logarithm, of the waveform's loudest band."""
    unit = {"none": 1.0, "ln": 1.0, "log10": 0.4343, "db": 4.343}[config.log] * max(abs(config.output_scale), 1e-3)
    if config.mfcc or config.normalize != "none":  # sums of many values
        unit *= 10
    if config.log == "none" and waveform is not None:
        absolute = dataclasses.replace(config, relative_to_max=False)
        unit *= 1 + float(log_mel_reference(waveform, absolute).abs().max())
    return TOLERANCE * unit


FFT_SIZES = (12, 16, 18, 30, 50, 64, 96, 120, 128, 200, 256, 320, 400, 512, 600, 1000, 1024, 2048)
OTHER_FFT_SIZES = (2, 4, 6, 8, 10, 14, 22, 98, 254, 882, 1102, 2014)  # what only the CPU kernel computes


@st.composite
def configurations(draw: st.DrawFn, *, any_fft_size: bool = True) -> LogMelConfig:
    """Any configuration, sizes kept small."""
    hop_samples = draw(st.sampled_from([1, 3, 16, 100, 160, 321, 1100]))
    fft_size = draw(st.sampled_from(FFT_SIZES + (OTHER_FFT_SIZES if any_fft_size else ())))
    bands = draw(st.integers(1, 90))
    window_samples = draw(st.integers(max(2, fft_size // 8), fft_size))
    own_window = tuple(0.1 + (i * 37 % 11) / 10 for i in range(window_samples))
    return LogMelConfig(
        fft_size=fft_size,
        window_samples=window_samples,
        hop_samples=hop_samples,
        bands=bands,
        mel_scale=draw(st.sampled_from(MEL_SCALES)),
        mel_norm=draw(st.sampled_from(MEL_NORMS)),
        min_hz=draw(st.sampled_from([0.0, 20.0, 300.0])),
        power=draw(st.sampled_from([1, 2])),
        framing=draw(st.sampled_from([name for name in FRAMINGS if name != "exact" or hop_samples <= fft_size])),
        padding=draw(st.sampled_from(PADDINGS)),
        drop_last_frame=draw(st.booleans()),
        window=draw(st.sampled_from([*WINDOWS, own_window])),
        preemphasis=draw(st.sampled_from([0.0, 0.5, 0.97])),
        preemphasis_scope=draw(st.sampled_from(PREEMPHASIS_SCOPES)),
        remove_dc=draw(st.booleans()),
        log=draw(st.sampled_from(LOGS)),
        log_offset=draw(st.sampled_from([0.0, 1e-6])),
        log_floor=1e-10,
        relative_to_max=draw(st.booleans()),
        dynamic_range=draw(st.sampled_from([None, 3.0])),
        output_shift=draw(st.sampled_from([0.0, 1.5])),
        mfcc=draw(st.sampled_from([0, 1, bands])),
        normalize=draw(st.sampled_from(["none", "none", "per_feature"])),
    )
