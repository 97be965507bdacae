"""torchvision's ResNet weights in the encoders that have a ResNet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avppc import EncoderConfig, VideoEncoder
from avppc.models.backbones import ResNet, load_torchvision_weights

FC = ("fc.weight", "fc.bias")


def torchvision_weights(width: int = 8) -> dict[str, Tensor]:
    """Those of a small ResNet, with torchvision's names; none is 0 or 1, as a new layer's is."""
    torch.manual_seed(0)
    weights = ResNet((1, 1, 1, 1), width, in_channels=3).state_dict()
    weights = {
        name: torch.rand_like(value) + 0.1 if value.is_floating_point() else value for name, value in weights.items()
    }
    return {**weights, "fc.weight": torch.zeros(1000, 8 * width), "fc.bias": torch.zeros(1000)}


def make_encoder(stem: str = "2d", channels: str = "luma", backbone: str = "resnet10", width: int = 8) -> VideoEncoder:
    torch.manual_seed(1)
    return VideoEncoder(EncoderConfig(backbone, width, stem, channels, 64, 64)).eval()


def test_colours_are_summed() -> None:
    colour, luma = ResNet((1, 1, 1, 1), 8, in_channels=3).eval(), ResNet((1, 1, 1, 1), 8, in_channels=1).eval()
    weights = torchvision_weights()
    for model in (colour, luma):
        assert load_torchvision_weights(model, weights) == FC
    frames = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(luma(frames), colour(frames.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_an_encoder_takes_them_whole() -> None:
    encoder, weights = make_encoder(), torchvision_weights()
    assert load_torchvision_weights(encoder, weights) == FC
    for name, value in encoder.frames.state_dict().items():
        expected = weights[name].sum(1, keepdim=True) if name == "conv1.weight" else weights[name]
        assert torch.equal(value, expected), name


def test_a_3d_stem_keeps_its_own_and_it_is_said_what_is_left_out() -> None:
    encoder, weights = make_encoder("3d"), torchvision_weights()
    before = {name: value.clone() for name, value in encoder.stem3d.state_dict().items()}
    left_out = load_torchvision_weights(encoder, weights)
    assert set(left_out) == {*FC, *(name for name in weights if name.startswith(("conv1.", "bn1.")))}
    assert all(torch.equal(value, before[name]) for name, value in encoder.stem3d.state_dict().items())
    for name, value in encoder.frames.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert load_torchvision_weights(encoder.frames, weights) == left_out


def test_files_that_do_not_count_batches() -> None:
    weights = {name: value for name, value in torchvision_weights().items() if not name.endswith("num_batches_tracked")}
    encoder = make_encoder()
    load_torchvision_weights(encoder, weights)
    assert torch.equal(encoder.frames.layer4[0].bn2.running_var, weights["layer4.0.bn2.running_var"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"channels": "motion"}, r"4 input channels \(channels='motion'\).* use channels='luma'"),
        ({"stem": "small"}, "stem 'small', .* use stem '2d' or '3d'"),
        ({"backbone": "conv4"}, "must have a ResNet, .* got Conv4"),
        ({"backbone": "resnet18"}, r"missing \['layer1\.1\.bn1\.bias'"),
        ({"width": 16}, r"weights\['conv1\.weight'\] must have shape \(16, 1, 7, 7\), got \(8, 1, 7, 7\)"),
    ],
    ids=["motion", "small", "conv4", "deeper", "wider"],
)
def test_what_does_not_fit_is_refused_whole(model: dict[str, str], message: str) -> None:
    encoder = make_encoder(**model)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_torchvision_weights(encoder, torchvision_weights())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_lost_and_foreign_weights_are_named() -> None:
    weights = torchvision_weights()
    foreign = {"module." + name: value for name, value in weights.items()}
    with pytest.raises(ValueError, match=r"missing .*unexpected \['module\.bn1\.bias'"):
        load_torchvision_weights(make_encoder(), foreign)
    del weights["layer3.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"missing \['layer3.0.conv1.weight'\]"):
        load_torchvision_weights(make_encoder("3d"), weights)
    with pytest.raises(TypeError, match="weights must be a state_dict"):
        load_torchvision_weights(make_encoder(), "resnet18.pth")
