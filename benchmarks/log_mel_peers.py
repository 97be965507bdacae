"""Who else computes log_mel's features, and the conventions in which they do."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from torch import Tensor

from avppc import LogMelConfig
from avppc.ops.log_mel.reference import mel_filter_bank_reference

Features = Callable[[Tensor], Tensor]  # [N, S] -> [N, F, B]


def stft_power(waveform: Tensor, fft_size: int, window: Tensor) -> Tensor:
    """[N, S] -> [N, F, bins]"""
    spectrum = torch.stft(waveform, fft_size, 160, 400, window, center=True, return_complex=True)
    return spectrum.abs().square().transpose(1, 2)


def torch_stft(device: str = "cpu") -> Features:
    bank, window = mel_filter_bank_reference(LogMelConfig()).float().to(device), torch.hann_window(400, device=device)
    return lambda waveform: (stft_power(waveform, 512, window)[:, :-1] @ bank + 1e-6).log()


def torch_stft_whisper(device: str = "cpu") -> Features:
    bank = mel_filter_bank_reference(LogMelConfig.preset("whisper")).float().to(device)
    window = torch.hann_window(400, device=device)

    def features(waveform: Tensor) -> Tensor:
        spectrum = (stft_power(waveform, 400, window)[:, :-1] @ bank).clamp(min=1e-10).log10()
        spectrum = torch.maximum(spectrum, spectrum.amax((1, 2), keepdim=True) - 8.0)
        return (spectrum + 4.0) / 4.0

    return features


def torchaudio(device: str = "cpu") -> Features:
    try:
        from torchaudio.transforms import MelSpectrogram
    except (ImportError, OSError) as error:  # OSError: its library was built for another torch
        pytest.skip(f"torchaudio does not import: {error}")
    layer = MelSpectrogram(16_000, n_fft=512, win_length=400, hop_length=160, n_mels=80).to(device)
    return lambda waveform: (layer(waveform).transpose(1, 2)[:, :-1] + 1e-6).log()


def nnaudio(device: str = "cpu") -> Features:
    features = pytest.importorskip("nnAudio.features", reason="nnAudio is not installed: pip install nnaudio")
    with redirect_stdout(io.StringIO()):  # it prints how long it took to be made
        layer = features.MelSpectrogram(
            sr=16_000, n_fft=512, win_length=400, hop_length=160, n_mels=80, fmin=0, htk=True, norm=None, verbose=False
        ).to(device)
    return lambda waveform: (layer(waveform).transpose(1, 2)[:, :-1] + 1e-6).log()


def librosa() -> Features:
    module = pytest.importorskip("librosa", reason="librosa is not installed: pip install librosa")
    if hasattr(module, "set_fftlib"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # librosa 1.0 will have no choice
            module.set_fftlib(np.fft)

    def features(waveform: Tensor) -> Tensor:
        power = module.feature.melspectrogram(
            y=waveform.numpy(), sr=16_000, n_fft=512, win_length=400, hop_length=160, n_mels=80
        )
        decibel = module.power_to_db(power, amin=1e-10, top_db=None)  # its top_db would be of the whole batch
        decibel = np.maximum(decibel, decibel.max((1, 2), keepdims=True) - 80.0)
        return torch.from_numpy(decibel).transpose(1, 2)

    return features


def kaldi_native_fbank() -> Features:
    module = pytest.importorskip("kaldi_native_fbank", reason="not installed: pip install kaldi-native-fbank")
    options = module.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80

    def one(clip: Tensor) -> np.ndarray:
        fbank = module.OnlineFbank(options)
        fbank.accept_waveform(16_000, clip.numpy())
        fbank.input_finished()
        return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])

    return lambda waveform: torch.from_numpy(np.stack([one(clip) for clip in waveform]))


def dali(batch: int) -> Features:
    """Its window is sampled between the points: ours is told to do the same."""
    pipelines = pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    fn = pipelines.fn
    held: list[np.ndarray] = []

    # Its usual way, to compute the next batch behind the caller's back, would run during our turn.
    @pipelines.pipeline_def(
        batch_size=batch, num_threads=torch.get_num_threads(), device_id=None, exec_async=False, exec_pipelined=False,
        prefetch_queue_depth=1,
    )  # fmt: skip
    def pipeline():
        audio = fn.external_source(source=lambda: held, dtype=pipelines.types.FLOAT, ndim=1)
        power = fn.spectrogram(audio, nfft=512, window_length=400, window_step=160, center_windows=True)
        mel = fn.mel_filter_bank(power, sample_rate=16_000, nfilter=80, freq_high=8000.0, normalize=True)
        return fn.to_decibels(mel, reference=1.0, cutoff_db=-100.0)

    built = pipeline()
    built.build()

    def features(waveform: Tensor) -> Tensor:
        held[:] = list(waveform.numpy())
        (output,) = built.run()
        return torch.from_numpy(output.as_array()).transpose(1, 2)

    return features


DALI_CONFIG = LogMelConfig(
    mel_scale="slaney", mel_norm="slaney", window="hann_half_sample", drop_last_frame=False, log="db", log_offset=0.0,
    log_floor=1e-10,
)  # fmt: skip

PEERS: dict[str, tuple[LogMelConfig, Callable[[int], Features]]] = {
    "torch_stft": (LogMelConfig.preset("torchaudio"), lambda clips: torch_stft()),
    "torchaudio": (LogMelConfig.preset("torchaudio"), lambda clips: torchaudio()),
    "nnaudio": (LogMelConfig.preset("torchaudio"), lambda clips: nnaudio()),
    "torch_stft_whisper": (LogMelConfig.preset("whisper"), lambda clips: torch_stft_whisper()),
    "librosa": (LogMelConfig.preset("librosa"), lambda clips: librosa()),
    "kaldi_native_fbank": (LogMelConfig.preset("kaldi"), lambda clips: kaldi_native_fbank()),
    "dali": (DALI_CONFIG, dali),
}
"""On a CPU; made for a number of clips."""

GPU_PEERS: dict[str, tuple[LogMelConfig, Callable[[str], Features]]] = {
    "torch_stft": (LogMelConfig.preset("torchaudio"), torch_stft),
    "torchaudio": (LogMelConfig.preset("torchaudio"), torchaudio),
    "nnaudio": (LogMelConfig.preset("torchaudio"), nnaudio),
    "torch_stft_whisper": (LogMelConfig.preset("whisper"), torch_stft_whisper),
}
"""Those that a GPU can compute, made for a device."""
