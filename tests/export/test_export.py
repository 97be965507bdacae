"""`avppc export`: each file does what the encoder does, for any clips and frames, and the card's code runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from report_runs import make_row, write_run

from avppc import EncoderConfig, VideoEncoder, load_encoder
from avppc.cli import main
from avppc.config import ExportConfig
from avppc.data.augment import crop_video, grey_to_luma
from avppc.evaluate.lipreading.results import write_row
from avppc.export import export as export_module
from avppc.export.export import export
from avppc.files import read_json, sha256_of
from avppc.models.encoder_file import save_encoder
from avppc.settings import config_from_dict

pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of its own files

LUMA = EncoderConfig("resnet10", 8, "2d", channels="luma", crop_pixels=88, input_pixels=88, features=24)
MOTION = EncoderConfig(width=4, features=16, channels="motion")
LOCAL = EncoderConfig(width=4, features=16, channels="local-motion")
DEEP = EncoderConfig("resnet10", 8, "3d", channels="luma", crop_pixels=48, input_pixels=48, features=8)


def make_encoder(config: EncoderConfig, seed: int = 0) -> VideoEncoder:
    """With running statistics as after training, which eval mode must use."""
    torch.manual_seed(seed)
    encoder = VideoEncoder(config).train()
    with torch.no_grad():
        encoder(torch.rand(3, 6, config.input_pixels, config.input_pixels))
    return encoder.eval()


def make_run(directory: Path, config: EncoderConfig = MOTION) -> Path:
    write_run(directory, Path("/secret/place/clips"))
    save_encoder(make_encoder(config), directory / "encoder.safetensors")
    return directory


@pytest.fixture(
    scope="module", params=[MOTION, LOCAL, LUMA, DEEP], ids=lambda config: f"{config.channels}-{config.stem}"
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    run = make_run(place / "run", request.param)
    export(ExportConfig(run, place / "out"))
    return place / "out"


@pytest.mark.parametrize(("clips", "frames"), [(1, 1), (4, 11)], ids=["N1-T1", "N4-T11"])
def test_every_format_gives_the_encoders_features(exported: Path, clips: int, frames: int) -> None:
    encoder = load_encoder(exported.parent / "run")
    side = encoder.config.input_pixels
    video = torch.rand(clips, frames, side, side)
    expected = encoder(video)
    assert expected.std() > 0.1
    assert torch.equal(load_encoder(exported)(video), expected)
    torch.testing.assert_close(torch.export.load(exported / "encoder.pt2").module()(video), expected, rtol=0, atol=1e-4)
    session = onnxruntime.InferenceSession(exported / "encoder.onnx")
    (features,) = session.run(["features"], {"video": video.detach().numpy()})
    np.testing.assert_allclose(features, expected.detach().numpy(), rtol=0, atol=1e-4)
    assert [item.shape for item in (*session.get_inputs(), *session.get_outputs())] == [
        ["clips", "frames", side, side],
        ["clips", "frames", encoder.config.features],
    ]


def test_the_cards_code_runs_and_agrees(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three blocks, on real crops instead of the placeholder, gives the features of crop_video's crops."""
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(exported)
    crops = torch.randint(256, (2, 5, 96, 96), dtype=torch.uint8)
    encoder = load_encoder(".")
    expected = encoder(crop_video(crops, encoder.config.crop_pixels, encoder.config.input_pixels)).detach()
    for block in blocks:
        placeholder = re.search(r"crops = .*# your mouth crops\n", block)
        assert placeholder is not None
        exec(block, {})
        names: dict[str, Any] = {"crops": crops.numpy() if "numpy" in block else crops}
        exec(block.replace(placeholder[0], ""), names)
        found = torch.as_tensor(names["features"]).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_description_says_what_the_files_are(exported: Path) -> None:
    description = read_json(exported / "encoder.json")
    encoder = load_encoder(exported)
    assert config_from_dict(EncoderConfig, description["encoder"], "encoder.json") == encoder.config
    assert description["encoder_sha256"] == sha256_of(exported.parent / "run" / "encoder.safetensors")
    assert (description["input"]["luma_mean"] is None) == (encoder.config.channels != "luma")
    black, white = (description["input"][f"luma_{end}"] for end in ("black", "white"))
    assert grey_to_luma(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([black, white])
    assert set(description["files"]) == {"safetensors", "torch-export", "onnx"}
    for file in description["files"].values():
        assert file["sha256"] == sha256_of(exported / file["file"])
        assert 0 <= file["largest_difference"] <= 1e-4


def test_the_card_says_on_which_frames_a_feature_depends(exported: Path) -> None:
    encoder, card = load_encoder(exported), (exported / "README.md").read_text()
    assert ("subtracts each clip's mean frame" in card) == (encoder.config.channels == "motion")
    local = f"depend on the {encoder.reach}\n  frames before and after it" in card
    assert local == (encoder.config.channels == "local-motion")


def test_no_file_tells_of_the_machine(exported: Path) -> None:
    for file in exported.iterdir():
        content = file.read_bytes()
        for path in ("/secret/place", str(Path(export_module.__file__).parents[2]), str(exported.parent)):
            assert path.encode() not in content, (file.name, path)


def test_the_card_has_the_rates_of_this_encoder_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    digest = sha256_of(run / "encoder.safetensors")
    for row, rate, sha256 in (("frozen", 0.625, digest), ("finetuned", 0.777, "another")):
        result = make_row(run, row, rate=rate)
        write_row(run, make_row(run, row, rate=rate, settings={**result.settings, "encoder_sha256": sha256}))
    export(ExportConfig(run, tmp_path / "out", ("safetensors",)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| AV-PPC, frozen | 10 | 62.5 ±" in card
    assert "77.7" not in card
    assert "60 steps of 16 clips" in card
    assert "--data clips --out run --preset laptop --steps 60" in card
    assert "9.8.7" in card  # the version that trained it
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"encoder.safetensors", "encoder.json", "README.md"}
    assert "onnxruntime" not in card.split("## Loading")[1]
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: avppc\n")  # what the Hugging Face Hub reads


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    before = sorted(tmp_path.iterdir())

    def write_other(encoder: VideoEncoder, path: Path) -> float:
        """The file of an encoder with other weights."""
        save_encoder(make_encoder(MOTION, seed=1), path)
        return export_module.largest_difference(encoder, load_encoder(path), path.name)

    monkeypatch.setitem(export_module.WRITERS, "torch-export", ("encoder.pt2", write_other))
    with pytest.raises(ValueError, match=r"encoder\.pt2 differs by .* from the encoder with 1 clips of 1 frames"):
        export(ExportConfig(run, tmp_path / "out", ("safetensors", "torch-export")))
    assert sorted(tmp_path.iterdir()) == before


def test_a_nan_is_a_difference() -> None:
    encoder = make_encoder(MOTION)
    with pytest.raises(ValueError, match="differs by nan"):
        export_module.largest_difference(encoder, lambda video: encoder(video) * float("nan"), "encoder.onnx")
    with pytest.raises(ValueError, match=r"gives \[1, 1, 15\] where the encoder gives \[1, 1, 16\]"):
        export_module.largest_difference(encoder, lambda video: encoder(video)[..., 1:], "encoder.onnx")


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_is_there_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    assert main(["export", str(run), "--out", str(out), "--formats", "safetensors"]) == 2
    assert "out exists already: give another name, or remove it first" in capsys.readouterr().err.replace("\n", "")


def test_the_same_export_again_finds_it_done_and_any_other_is_refused(tmp_path: Path) -> None:
    """A command that is killed at its very end goes on as others do."""
    config = ExportConfig(make_run(tmp_path / "run"), tmp_path / "out", ("safetensors",))
    files = export(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.iterdir()}
    assert export(config) == files
    assert {path: path.stat().st_mtime_ns for path in config.out.iterdir()} == before
    (config.out / "theirs.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        export(config)
    (config.out / "theirs.txt").unlink()
    (config.out / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        export(config)
    assert (config.out / "README.md").read_text() == "mine"


def test_missing_packages_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "needs onnx, onnxscript, onnxruntime (import of onnxscript halted" in error
    assert "pip install 'avppc[export]'" in error
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--formats", "safetensors"]) == 0
    assert "encoder.safetensors" in capsys.readouterr().out


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tmp_path / "clips")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no encoder at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="formats must name at least one of safetensors, torch-export, onnx"):
        ExportConfig(tmp_path, tmp_path, ())
    with pytest.raises(ValueError, match=r"formats must be one of 'safetensors', .*, 'hub'; got 'tflite'"):
        ExportConfig(tmp_path, tmp_path, ("tflite",))
    with pytest.raises(TypeError, match=r"out must be a pathlib\.Path, got int"):
        ExportConfig(tmp_path, 3)
