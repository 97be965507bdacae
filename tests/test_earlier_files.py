"""Data sets and runs on disk stay usable: tests/earlier/ was written by an earlier state of the package.

`packed/` holds 12 clips of 9 frames of 20 x 20 pixels. `run/` is the task "time-arrow" after two steps on them: its
last checkpoint is that of the first step, its encoder that of the second, and one row is evaluated. `parameters.json`
has the name and shape of every parameter of each task; the learned scale of the loss, [] then, is [1] now and read from
either.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from avppc import load_encoder
from avppc.config import EncoderConfig, EvaluateConfig, ObjectiveConfig, PretrainConfig, ReportConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.lipreading.evaluate import evaluate
from avppc.evaluate.lipreading.results import read_rows
from avppc.evaluate.report.report import render
from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.settings import config_from_dict, config_to_dict
from avppc.tasks.registry import TASKS, make_task
from avppc.train.checkpoint import load_optimizer_tensors
from avppc.train.log import read_metrics
from avppc.train.loop import pretrain
from avppc.train.run_folder import read_run_config

EARLIER = Path(__file__).parent / "earlier"
ENCODER = EncoderConfig(width=4, channels="motion", features=8, crop_pixels=16, input_pixels=16)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in the folder that the paths in its configuration start from."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


def test_a_name_and_its_former_one_are_not_both_taken() -> None:
    with pytest.raises(ValueError, match=r"run: a field is given twice, by its name and a former one: .*'rivals'"):
        config_from_dict(PretrainConfig, {"data": "d", "out": "o", "rivals": {}, "baselines": {}}, "run")


def includes(settings: object, earlier: object) -> bool:
    """Whether all earlier settings are there with their values; new ones may have joined them."""
    if isinstance(settings, dict) and isinstance(earlier, dict):
        return all(name in settings and includes(settings[name], value) for name, value in earlier.items())
    return settings == earlier


def test_a_packed_set_is_read() -> None:
    for split, clips in (("train", 6), ("val", 2), ("test", 4)):
        with PackedDataset(EARLIER / "packed", split, verify=True) as data:
            batch = data.batch(torch.arange(clips))
        assert batch.video.shape == (clips, 9, 20, 20)
        assert batch.labels.tolist() == [number % 2 for number in range(clips)]
        # The dark square in the middle of each first picture is shut, or wide open.
        assert [bool(clip[0, 5, 10] > 100) for clip in batch.video] == [number % 2 == 0 for number in range(clips)]


def test_the_settings_of_a_run_are_read() -> None:
    config = read_run_config(EARLIER / "run")
    assert (config.task, config.steps, config.encoder) == ("time-arrow", 2, ENCODER)
    assert config.baselines.arrow_pool == "mean"
    earlier = json.loads((EARLIER / "run" / "config.json").read_text())
    earlier["baselines"] = earlier.pop("rivals")  # renamed since
    assert includes(config_to_dict(config), earlier)


def test_a_run_goes_on_from_its_checkpoint(place: Path) -> None:
    encoder = place / "run" / "encoder.safetensors"
    expected = load_encoder(encoder).state_dict()
    encoder.unlink()
    pretrain(read_run_config(place / "run"))
    assert [row["step"] for row in read_metrics(place / "run")] == [1, 2]
    # With the moments of the first step; rounding differs from one processor to the next.
    torch.testing.assert_close(dict(load_encoder(encoder).state_dict()), dict(expected), rtol=1e-3, atol=1e-5)


def test_an_evaluated_row_is_read_and_reported(place: Path) -> None:
    (row,) = read_rows(place / "run")
    assert (row.row, row.wcr, row.words) == ("frozen", 0.75, ["OPEN", "SHUT"])
    assert "75.0" in render(ReportConfig(place / "run"))


def test_the_encoder_is_evaluated(place: Path) -> None:
    config = EvaluateConfig(
        place / "run", results=place / "again", rows=("frozen",), labels_per_word=2, draws=2, heads=("bins",),
        head_learning_rates=(1e-2,), epochs=2, batch_size=2, threads=1, workers=1, device="cpu", precision="fp32",
    )  # fmt: skip
    (row,) = evaluate(config, show=False)
    (earlier,) = read_rows(place / "run")
    assert includes(row.settings, earlier.settings)
    assert row.tested == earlier.tested == 4
    assert row.chosen == earlier.chosen


def test_a_scale_of_no_dimensions_and_its_moments_are_read() -> None:
    module = BilinearInfoNCE(4, 4, learn_scale=True)
    module.load_state_dict({**module.state_dict(), "log_scale": torch.tensor(2.5)})
    torch.testing.assert_close(module.scale.detach(), torch.tensor(2.5).exp())
    optimizer = torch.optim.AdamW(module.parameters())
    earlier = {"log_scale.exp_avg": torch.tensor(0.1), "log_scale.exp_avg_sq": torch.tensor(0.2)}
    load_optimizer_tensors(optimizer, module, {**earlier, "log_scale.step": torch.tensor(3.0)})
    assert {name: list(value.shape) for name, value in optimizer.state[module.log_scale].items()} == {
        "exp_avg": [1], "exp_avg_sq": [1], "step": []
    }  # fmt: skip
    module.log_scale.grad = torch.ones(1)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[module.log_scale]["exp_avg"], torch.tensor([0.19]))


@pytest.mark.parametrize("task", TASKS)
def test_parameters_keep_their_names(task: str) -> None:
    config = PretrainConfig(
        Path("packed"),
        Path("run"),
        task=task,
        encoder=ENCODER,
        audio_width=4,
        objective=ObjectiveConfig(dim=4, moments="none"),
    )
    parameters = {name: list(value.shape) for name, value in make_task(task, config).state_dict().items()}
    assert parameters == json.loads((EARLIER / "parameters.json").read_text())[task]
