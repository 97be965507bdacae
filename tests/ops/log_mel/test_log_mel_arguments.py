"""Any arguments for log_mel and its configuration: right features or a refusal that names one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hostile import REFUSED, anything, call, examples, laid_out, near, scalars
from hypothesis import given
from hypothesis import strategies as st
from log_mel_configs import configurations, tolerance_of
from torch import Tensor

from avppc import LogMel, LogMelConfig, log_mel
from avppc.ops.log_mel.reference import log_mel_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*mel bands")

FIELDS = tuple(field.name for field in dataclasses.fields(LogMelConfig))
CONFIG = LogMelConfig(fft_size=32, window_samples=20, hop_samples=7, bands=3)


@st.composite
def waveforms(draw: st.DrawFn) -> Tensor:
    """Valid waveforms of every rank, dtype and layout."""
    shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), draw(st.integers(40, 90)))
    value = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int16]))
    value = draw(laid_out((value * (8000 if dtype == torch.int16 else 1)).to(dtype)))
    return value[..., :1, :].expand_as(value) if value.ndim > 1 and draw(st.booleans()) else value


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Valid arguments of log_mel."""
    waveform = draw(waveforms())
    lengths = None
    if draw(st.booleans()):
        count, samples = waveform.shape[:-1].numel(), waveform.shape[-1]
        values = draw(st.lists(st.integers(0, samples), min_size=count, max_size=count))
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        lengths = draw(laid_out(torch.tensor(values, dtype=dtype).reshape(waveform.shape[:-1])))
    backend = draw(st.sampled_from(["auto", "reference"]))
    return {"waveform": waveform, "config": CONFIG, "lengths": lengths, "backend": backend}


@examples(80)
@given(calls())
def test_valid_arguments_give_the_features_of_the_definition(arguments: dict[str, Any]) -> None:
    features = call(log_mel, arguments)
    waveform = arguments["waveform"]
    exact = waveform.double() / (32768 if waveform.dtype == torch.int16 else 1)
    assert features.dtype == (torch.float64 if waveform.dtype == torch.float64 else torch.float32)
    assert features.shape == (*waveform.shape[:-1], CONFIG.num_frames(waveform.shape[-1]), 3)
    truth = log_mel_reference(exact, CONFIG, arguments["lengths"])
    tolerance = 1e-4 if arguments["backend"] == "reference" else tolerance_of(CONFIG)
    torch.testing.assert_close(features.double(), truth, atol=tolerance, rtol=1e-6)


@examples(250)
@given(st.data())
def test_one_strange_argument_is_refused_by_name(data: st.DataObject) -> None:
    arguments = data.draw(calls())
    name = data.draw(st.sampled_from(sorted(arguments)))
    arguments[name] = data.draw(near(arguments[name]))
    result = call(log_mel, arguments)
    if result is not REFUSED:
        assert result.ndim == arguments["waveform"].ndim + 1


@examples(60)
@given(st.fixed_dictionaries({name: anything() for name in ("waveform", "config", "lengths", "backend")}))
def test_all_arguments_strange_at_once(arguments: dict[str, Any]) -> None:
    call(log_mel, arguments)


@examples(40)
@given(calls(), st.sampled_from([float("nan"), float("inf"), 3e38, 1e-45]))
def test_what_is_not_finite_stays_in_its_clip(arguments: dict[str, Any], value: float) -> None:
    waveform = torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    waveform[1, 30] = value
    features = call(log_mel, arguments | {"waveform": waveform, "lengths": None})
    assert features[0].isfinite().all()
    assert features[2].isfinite().all()
    assert features[1].isfinite().all() == (value < 1)


@examples(60)
@given(st.data())
def test_one_strange_argument_of_the_module_is_refused_by_name(data: st.DataObject) -> None:
    settings = {"config": CONFIG, "backend": "auto"}
    settings[data.draw(st.sampled_from(sorted(settings)))] = data.draw(anything())
    if call(LogMel, settings) is REFUSED:
        call(LogMel(CONFIG), {"waveform": data.draw(anything()), "lengths": data.draw(anything())})


@examples(400)
@given(configurations(), st.sampled_from(FIELDS), scalars())
def test_a_strange_setting_is_refused_by_name_or_understood(config: LogMelConfig, field: str, value: Any) -> None:
    settings = {name: getattr(config, name) for name in FIELDS}
    changed = call(LogMelConfig, {**settings, field: value})
    if changed is REFUSED or changed.fft_size > 512 or changed.hop_samples > 4000:
        return
    waveform = 0.3 * torch.randn(2, changed.fft_size + 2 * changed.hop_samples + 1)
    assert LogMelConfig.from_text(changed.to_text()) == changed
    features = log_mel(waveform, changed)
    truth = log_mel_reference(waveform.double(), changed)
    assert features.shape == truth.shape
    assert (features.isfinite() | ~(truth.abs() < 3e38)).all()


@examples(60)
@given(scalars())
def test_texts_and_names_and_counts(value: Any) -> None:
    call(LogMelConfig.from_text, {"text": value})
    call(LogMelConfig.preset, {"name": value})
    call(CONFIG.num_frames, {"num_samples": value})
