"""Encoders: shapes, torchvision's names, what they ignore, and the file they are kept in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from avppc import EncoderConfig, VideoEncoder, load_encoder
from avppc.evaluate.lipreading.heads import HEADS, MultiScaleHead, make_head
from avppc.models import batch_norm
from avppc.models.backbones import ResNet, use_channels_last
from avppc.models.batch_norm import FusedSequential
from avppc.models.encoder_file import save_encoder
from avppc.models.encoders import AudioEncoder
from avppc.ops import _library
from avppc.ops.clips import motion_frames
from avppc.tasks.base import ElementPool

LUMA = EncoderConfig("resnet10", 8, "2d", channels="luma", crop_pixels=88, input_pixels=88, features=24)
CONFIGS = {
    "conv4": EncoderConfig(),
    "small": EncoderConfig("resnet10", 8, "small"),
    "2d": LUMA,
    "3d": EncoderConfig("resnet18", 8, "3d", channels="luma", crop_pixels=48, input_pixels=48, features=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_features_have_one_vector_a_frame(name: str) -> None:
    config = CONFIGS[name]
    encoder = VideoEncoder(config).eval()
    video = torch.rand(2, 7, config.input_pixels, config.input_pixels)
    features = encoder(video)
    assert features.shape == (2, 7, config.features)
    strided = encoder(video, frame_stride=3, frame_phase=1)
    torch.testing.assert_close(strided, features[:, 1::3], rtol=1e-4, atol=1e-5)


def test_resnet34_has_torchvisions_parameters() -> None:
    names = dict(ResNet((3, 4, 6, 3), in_channels=3).named_parameters())
    # torchvision's resnet34 has 21,797,672 parameters, 513,000 of them in its classifier
    assert sum(parameter.numel() for parameter in names.values()) == 21_797_672 - 513_000
    for name in (
        "conv1.weight",
        "bn1.bias",
        "layer1.2.conv2.weight",
        "layer2.0.downsample.1.weight",
        "layer4.2.bn2.bias",
    ):
        assert name in names


def test_motion_ignores_a_constant_face() -> None:
    generator = torch.Generator().manual_seed(0)
    mouth = torch.rand(1, 5, 8, 8, generator=generator)
    face = torch.rand(1, 1, 8, 8, generator=generator)
    motion = motion_frames(mouth)[None, :, :3]
    torch.testing.assert_close(motion_frames(mouth + face)[None, :, :3], motion, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(motion[:, 1:, 0], motion[:, :-1, 1])
    torch.testing.assert_close(motion[:, :-1, 2], motion[:, 1:, 1])


@pytest.mark.parametrize("channels", ["luma", "local-motion"])
def test_a_local_encoder_gives_a_part_what_the_whole_gives(channels: str) -> None:
    encoder = VideoEncoder(EncoderConfig(channels=channels)).eval()
    assert encoder.is_local
    video = torch.rand(2, 20, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, part = encoder(video), encoder(video[:, 5:16])
    inner = slice(encoder.reach, 11 - encoder.reach)
    torch.testing.assert_close(whole[:, 5:16][:, inner], part[:, inner])
    assert not VideoEncoder(EncoderConfig(channels="motion")).is_local


@pytest.mark.parametrize("frames", [1, 3])
def test_a_still_clip_has_a_finite_gradient(frames: int) -> None:
    """The root of a motion of nothing, and of an even frame, has none of its own; the values stay what they were."""
    still = torch.full((1, frames, 8, 8), 0.5, dtype=torch.float64, requires_grad=True)
    channels = motion_frames(still)
    channels.sum().backward()
    assert still.grad is not None
    assert still.grad.isfinite().all()
    assert torch.equal(channels, torch.zeros_like(channels))
    moving = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(motion_frames, (moving,))


def test_wrong_video_is_refused_by_name() -> None:
    encoder = VideoEncoder()
    with pytest.raises(ValueError, match=r"video must be \[N, T, 32, 32\].*\[2, 3, 96, 96\]"):
        encoder(torch.rand(2, 3, 96, 96))
    with pytest.raises(TypeError, match=r"video must be floating point.*uint8"):
        encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "vgg"}, "backbone must be one of"),
        ({"crop_pixels": 97}, "crop_pixels must be from 8 to 96"),
        ({"input_pixels": 33}, "input_pixels must divide crop_pixels"),
        ({"backbone": "resnet10", "stem": "3d"}, "channels='luma'"),
        ({"backbone": "resnet10", "width": 7, "stem": "small"}, "width must be 8 or more for a ResNet, got 7: "),
    ],
)
def test_bad_settings_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**values)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "config",
    [EncoderConfig(width=width, features=8) for width in (4, 5, 6, 7, 8)]
    + [EncoderConfig("resnet10", width, "small", features=8) for width in (8, 9, 12)]
    + [EncoderConfig("resnet10", 8, "2d", features=8)],
    ids=lambda config: f"{config.backbone}-{config.stem}-{config.width}",
)
def test_gradients_are_those_of_float64(config: EncoderConfig, threads: int) -> None:
    """Also of narrow encoders, whose convolutions a library may do otherwise."""
    torch.manual_seed(0)
    encoder, before = VideoEncoder(config).eval(), torch.get_num_threads()
    exact = VideoEncoder(config).eval().double()
    exact.load_state_dict(encoder.state_dict())
    video = torch.rand(2, 4, 32, 32)
    torch.set_num_threads(threads)
    try:
        encoder(video).square().mean().backward()
    finally:
        torch.set_num_threads(before)
    exact(video.double()).square().mean().backward()
    for (name, parameter), true in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert true.grad is not None, name
        error = (parameter.grad - true.grad).norm() / true.grad.norm().clamp_min(1e-12)
        assert error < 1e-3, name


def conv_layers(kind: type[nn.Sequential]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = kind(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    use_channels_last(layers)
    return layers


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_norm_and_relu_in_one_are_what_they_are_apart(training: bool) -> None:
    fused, plain = (conv_layers(kind).train(training) for kind in (FusedSequential, nn.Sequential))
    for seed in range(2):
        x = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
        y, expected = fused(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        expected.square().sum().backward()
    for (name, value), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            value.grad, other.grad, rtol=1e-4, atol=1e-3, msg=lambda text, name=name: name + text
        )
    torch.testing.assert_close(dict(fused.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not _library.has_cpp_ops(), reason=f"compiled operators: {_library.missing_reason('cpp')}")
def test_norm_and_relu_are_one_only_while_nobody_looks_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, calls = conv_layers(FusedSequential), []
    whole = batch_norm.batch_norm_relu
    monkeypatch.setattr(batch_norm, "batch_norm_relu", lambda *arguments: calls.append(0) or whole(*arguments))
    x = torch.randn(5, 3, 9, 9)
    layers(x)
    assert len(calls) == 1
    for place in (1, 2):
        handle = layers[place].register_forward_hook(lambda *_: calls.append("hook"))
        layers(x)
        handle.remove()
    assert calls == [0, "hook", "hook"]


def test_audio_encoder_follows_the_video_clock_and_ignores_level() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder(bands=40, features=16, width=4).eval()
    log_mel = torch.randn(3, 4 * 14, 40)
    features = encoder(log_mel)
    assert features.shape == (3, 14, 16)
    torch.testing.assert_close(encoder(log_mel + 3.0), features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_heads_give_one_logit_a_word(name: str) -> None:
    head = make_head(name, 16, 5).eval()
    features = torch.randn(4, 29, 16)
    assert head(features).shape == (4, 5)
    # Each head reads the order of the frames.
    assert not torch.allclose(head(features), head(features.flip(1)), atol=1e-3)


def test_multi_scale_head_sees_several_lengths_and_keeps_every_frame() -> None:
    head = MultiScaleHead(16, 5, hidden=8, blocks=2).eval()
    assert [layer.kernel_size[0] for layer in head.blocks[1].layers[0].branches] == [3, 5, 7]
    assert {layer.dilation[0] for layer in head.blocks[1].layers[0].branches} == {2}
    features = torch.randn(2, 29, 16)
    frames = head.blocks(features.transpose(1, 2))
    assert frames.shape == (2, 12, 29)
    changed = features.clone()
    changed[:, 14] += 1
    touched = (head.blocks(changed.transpose(1, 2)) - frames).abs().amax((0, 1)) > 1e-6
    # two layers of kernel 7 in each block, dilated by 1 and then 2: 18 frames to either side
    assert torch.where(touched)[0].tolist() == list(range(29))
    small = MultiScaleHead(16, 5, hidden=8, blocks=1).eval()
    touched = (small.blocks(changed.mT) - small.blocks(features.mT)).abs().amax((0, 1)) > 1e-6
    assert touched.nonzero().flatten().tolist() == list(range(8, 21))


def test_element_pool_is_the_last_state() -> None:
    pool = ElementPool(8, 6).eval()
    frames = torch.randn(2, 9, 8)
    changed = frames.clone()
    changed[:, 0] += 1.0
    assert pool(frames).shape == (2, 6)
    assert not torch.allclose(pool(frames), pool(changed))


def test_encoder_file_keeps_every_bit(tmp_path) -> None:
    encoder = VideoEncoder(LUMA).eval()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path)
    assert loaded.config == LUMA
    assert not loaded.training
    video = torch.rand(1, 3, 88, 88)
    assert torch.equal(loaded(video), encoder(video))


def test_the_encoder_that_comes_with_the_package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder("talking-mouths")
    assert encoder.config == EncoderConfig()
    assert not encoder.training
    opening = torch.linspace(0.2, 0.8, 29)[:, None, None].expand(29, 32, 32).clone()
    opening[:, 12:20, 8:24] = 0.1  # a mouth in a face that brightens
    features = encoder(torch.stack([opening, opening.flip(0)]))
    assert features.isfinite().all()
    assert (features[0] - features[1]).abs().max() > 0.1
    monkeypatch.chdir(tmp_path)
    save_encoder(VideoEncoder(EncoderConfig(width=4)), tmp_path / "talking-mouths")
    assert load_encoder("talking-mouths").config.width == 4  # a file of that name comes first
    with pytest.raises(
        FileNotFoundError, match=r"there is no encoder at talking.*pretrained encoder \(talking-mouths\)"
    ):
        load_encoder("talking")


def test_no_flipped_bit_of_an_encoder_file_is_taken(tmp_path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(VideoEncoder(EncoderConfig(features=8)), path)
    whole = path.read_bytes()
    # In the settings of its header, in its last weight, and in weights between.
    for place in (whole.index(b"crop_pixels") + 15, len(whole) - 1, len(whole) // 2, len(whole) // 3):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"encoder\.safetensors"):
            load_encoder(path)
    path.write_bytes(whole)
    load_encoder(path)


def test_a_version_of_true_is_none(tmp_path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(VideoEncoder(), path)
    header = json.dumps({"format": "avppc-encoder", "version": True, "config": {}})
    save_file(load_file(path), path, {"avppc": header})
    with pytest.raises(ValueError, match="is not an avppc encoder of version 1"):
        load_encoder(path)


def encoder_metadata(config: dict[str, object]) -> dict[str, str]:
    return {"avppc": json.dumps({"format": "avppc-encoder", "version": 1, "config": config})}


def test_saving_twice_gives_the_same_bytes(tmp_path) -> None:
    encoder = VideoEncoder()
    for number in range(8):
        save_encoder(encoder, tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_damaged_encoder_files_are_refused_by_name(tmp_path) -> None:
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no encoder at .*encoder\.safetensors"):
        load_encoder(tmp_path)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no encoder at .*encoder\.safetensors"):
        load_encoder(tmp_path)
    path.rmdir()
    save_encoder(VideoEncoder(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"encoder\.safetensors is not a whole safetensors file"):
        load_encoder(path)
    path.write_bytes(whole)
    weights = load_file(path)
    save_file(weights, path)
    with pytest.raises(ValueError, match="is not an avppc encoder"):
        load_encoder(path)
    for config, message in (
        ({"backbone": "conv4", "depth": 3}, r"unknown fields \['depth'\]"),
        ({"features": 10**12}, r"encoder\.safetensors: features must be from 8 to 65536"),
    ):
        save_file(weights, path, encoder_metadata(config))
        with pytest.raises(ValueError, match=message):
            load_encoder(path)
    del weights["project.0.weight"]
    save_file(weights, path, encoder_metadata({}))
    with pytest.raises(ValueError, match=r"(?s)weights do not fit.*project\.0\.weight"):
        load_encoder(path)
