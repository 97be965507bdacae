"""Lip-reading evaluation: the protocol, its figures, and what it refuses."""

from __future__ import annotations

import math
import os
import shutil
import signal
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import SPLITS, WORDS, make_clip, tiny_config, write_tiny_set
from torch import nn

import avppc.evaluate.lipreading.classifier as classifier
import avppc.evaluate.lipreading.evaluate as lipreading
import avppc.evaluate.lipreading.fits as fits
from avppc import load_encoder
from avppc.cli import main
from avppc.config import EvaluateConfig, PretrainConfig, RecipeConfig
from avppc.data.packed.index import PackedIndex
from avppc.evaluate.config import RowName
from avppc.evaluate.lipreading.classifier import EncoderWithHead, FrozenFeatures, fit_classifier, predict
from avppc.evaluate.lipreading.evaluate import FitPool, RowWork
from avppc.evaluate.lipreading.fits import draw_labelled_clips
from avppc.evaluate.lipreading.results import RowResult, mean_and_interval, print_table, read_rows, write_row
from avppc.train.loop import pretrain


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny run and the trajectories of its clips."""
    folder = tmp_path_factory.mktemp("evaluated")
    pretrain(tiny_config(write_tiny_set(folder / "packed"), folder / "run", steps=4))
    for place, (split, clips) in enumerate(SPLITS.items()):
        for number in range(clips):
            word = number % len(WORDS)
            sound = make_clip(word, 1000 * place + number)["audio"].reshape(29, 640).astype(np.float32)
            path = folder / "videos" / WORDS[word] / split / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.repeat(np.log1p(sound.std(1, keepdims=True)), 8, 1).astype(np.float16))
    return folder / "run", folder / "videos"


def quick_config(run: Path, videos: Path | None, **changes: object) -> EvaluateConfig:
    settings: dict[str, object] = {
        "trajectories": videos,
        "labels_per_word": 4,
        "draws": 3,
        "training_draws": 2,
        "heads": ("bins", "tconv"),
        "head_learning_rates": (1e-2,),
        "scratch_learning_rates": (3e-3,),
        "finetune_learning_rates": (3e-3,),
        "epochs": 8,
        "training_epochs": 4,
        "selection_epochs": 2,
        "batch_size": 6,
        "threads": 1,
        "workers": 1,
        "device": "cpu",
        **changes,
    }
    return EvaluateConfig(run, **settings)


def test_every_row_is_evaluated_and_kept(finished_run: tuple[Path, Path], monkeypatch, capsys) -> None:
    run, videos = finished_run
    tested = []

    def count_tests(model: nn.Module, data: object, split: str) -> torch.Tensor:
        tested.append(split)
        return predict(model, data, split)

    monkeypatch.setattr(fits, "predict", count_tests)
    config = quick_config(run, videos)
    results = lipreading.evaluate(config)
    assert [result.row for result in results] == ["random", "supervised", "frozen", "finetuned", "ceiling"]
    # The test clips are looked at once for each draw of each row, never to choose anything.
    assert tested == ["test"] * (3 + 2 + 3 + 2 + 3)
    for result in results:
        draws = 2 if result.row in ("supervised", "finetuned") else 3
        assert len(result.draws) == draws
        assert len(result.trials) == 2
        assert result.tested == SPLITS["test"]
        assert np.sum(result.confusion) == draws * result.tested
        rates = [draw["test_wcr"] for draw in result.draws]
        assert result.wcr == pytest.approx(np.mean(rates))
        assert np.trace(result.confusion) / np.sum(result.confusion) == pytest.approx(result.wcr)
        best = max(trial["val_wcr"] for trial in result.trials)
        assert any(t["val_wcr"] == best and t["head"] == result.chosen["head"] for t in result.trials)
    assert results[-1].wcr > 0.8  # the true movement tells three such words apart
    assert read_rows(run) == results
    printed = capsys.readouterr().out
    assert "AV-PPC, frozen" in printed
    assert "Chance is 33.3 %" in printed

    tested.clear()
    assert lipreading.evaluate(config) == results
    assert tested == []  # the same settings are read, not computed again


def test_a_trial_on_features_is_tested_without_being_trained_again(
    finished_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three draws two have chosen the head; a row that trains its encoder has had shorter trials."""
    trained: list[RowName] = []
    train = fits._train_and_test
    monkeypatch.setattr(
        fits, "_train_and_test", lambda inputs, fit, *rest: (trained.append(fit.row), train(inputs, fit, *rest))[1]
    )
    config = quick_config(finished_run[0], None, rows=("supervised", "frozen"), selection_draws=2)
    _, frozen = lipreading.evaluate(config)
    assert trained.count("supervised") == 2 + 2
    assert trained.count("frozen") == 2 * 2 + 1
    monkeypatch.setattr(RowWork, "_add_draws", add_draws_anew)
    (finished_run[0] / "evaluation" / "frozen-4.json").unlink()
    _, anew = lipreading.evaluate(config)
    assert trained.count("frozen") == 2 * (2 * 2) + 1 + 3
    assert replace(anew, seconds=0.0) == replace(frozen, seconds=0.0)


def add_draws_anew(work: RowWork) -> None:
    """As RowWork does it, with each draw trained anew."""
    work.ready.extend(fits.Fit(work.row, work.best, draw, False, keeps=work.keeps) for draw in range(3))


def test_processes_give_what_one_gives(finished_run: tuple[Path, Path]) -> None:
    run, videos = finished_run
    rows = ("supervised", "frozen", "ceiling")
    config = quick_config(run, videos, rows=rows, draws=2, epochs=3, workers=1)
    alone = lipreading.evaluate(config)
    for row in rows:
        (run / "evaluation" / f"{row}-4.json").unlink()
    together = lipreading.evaluate(replace(config, workers=2))
    assert [replace(row, seconds=0.0) for row in together] == [replace(row, seconds=0.0) for row in alone]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows that are computed, not read."""
    rows: list[str] = []
    measure_rows = lipreading._measure_rows

    def count(inputs: fits.FitInputs, work: list[lipreading.RowWork]) -> object:
        rows.extend(row.row for row in work)
        return measure_rows(inputs, work)

    monkeypatch.setattr(lipreading, "_measure_rows", count)
    return rows


@pytest.fixture
def measured(finished_run: tuple[Path, Path], tmp_path: Path, computed: list[str]) -> tuple[EvaluateConfig, RowResult]:
    """A row of data and results of the test's own."""
    shutil.copytree(finished_run[0].parent / "packed", tmp_path / "packed")
    places = {"data": tmp_path / "packed", "results": tmp_path / "results"}
    config = quick_config(finished_run[0], None, rows=("frozen",), heads=("bins",), draws=1, epochs=1, **places)
    (row,) = lipreading.evaluate(config)
    assert computed == ["frozen"]
    computed.clear()
    return config, row


def test_a_row_is_read_wherever_its_data_lies(
    measured: tuple[EvaluateConfig, RowResult], computed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, row = measured
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").rename("moved")
    assert lipreading.evaluate(replace(config, data=Path("moved"))) == [row]
    assert lipreading.evaluate(replace(config, data=None)) == [row]  # the run's own, of which this is a copy
    assert computed == []
    with pytest.raises(ValueError, match=r"packed is not a packed data set: it has no index\.json"):
        lipreading.evaluate(config)


def test_a_row_of_data_that_has_changed_is_measured_anew(
    measured: tuple[EvaluateConfig, RowResult], computed: list[str], tmp_path: Path
) -> None:
    config, row = measured
    replace(PackedIndex.read(tmp_path / "packed"), words=("LEFT", "RIGHT", "UP")).write(tmp_path / "packed")
    (anew,) = lipreading.evaluate(config)
    assert (anew.words, computed) == (["LEFT", "RIGHT", "UP"], ["frozen"])
    assert row.words == list(WORDS)


def test_a_row_that_does_not_tell_its_data_is_read_for_pages_alone(
    measured: tuple[EvaluateConfig, RowResult], computed: list[str], tmp_path: Path
) -> None:
    """Those of before data_sha256; results/ has such."""
    config, row = measured
    del row.settings["data_sha256"]
    write_row(tmp_path / "results", row)
    assert read_rows(tmp_path / "results") == [row]
    lipreading.evaluate(config)
    assert computed == ["frozen"]
    committed = Path(__file__).parents[3] / "results" / "demo" / "frozen-10.json"
    (tmp_path / "old" / "evaluation").mkdir(parents=True)
    shutil.copy(committed, tmp_path / "old" / "evaluation")
    assert read_rows(tmp_path / "old")[0].row == "frozen"


def test_an_error_in_a_process_ends_the_evaluation(finished_run: tuple[Path, Path]) -> None:
    run, videos = finished_run
    config = quick_config(run, videos, rows=("ceiling",), workers=2, head_hidden=2**40)
    with pytest.raises(RuntimeError):
        lipreading.evaluate(config)


def test_a_process_that_is_killed_is_told_in_a_line(
    finished_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    submit = FitPool.submit

    def submit_and_kill(pool: FitPool, fit: fits.Fit) -> Future[fits.FitResult]:
        future = submit(pool, fit)
        monkeypatch.setattr(FitPool, "submit", submit)  # one is enough
        os.kill(min(pool._executor._processes), signal.SIGKILL)
        return future

    monkeypatch.setattr(FitPool, "submit", submit_and_kill)
    few = ["--rows", "random", "--labels-per-word", "4", "--device", "cpu", "--workers", "2"]
    assert main(["evaluate", "--run", str(finished_run[0]), "--results", str(tmp_path), *few]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "avppc: a worker process died (killed, or out of memory); the same command goes on from what is there"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_features_of_one_row_at_most_are_held_here(
    workers: int, finished_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None where processes read them from files."""
    made: list[weakref.ref[FrozenFeatures]] = []
    make = fits.FitInputs.features

    def note(inputs: fits.FitInputs, row: RowName) -> FrozenFeatures | None:
        assert [ref() for ref in made] == [None] * len(made)  # the last row's make room first
        features = make(inputs, row)
        if features is not None:
            made.append(weakref.ref(features))
        return features

    monkeypatch.setattr(fits.FitInputs, "features", note)
    inputs = fits.FitInputs(quick_config(finished_run[0], None, workers=workers, epochs=1))
    rows: tuple[RowName, ...] = ("frozen", "frozen", "random", "random", "supervised")
    with FitPool(inputs) as pool:
        results = [pool.submit(fits.Fit(row, fits.Trial("bins", 1e-2, 1e-2), 0, selects=True)) for row in rows]
        assert len(made) == 2
        assert [ref() for ref in made] == [None, None]  # one that trains its encoder has none
        assert all(0 <= result.result().val_rate <= 1 for result in results)


def test_heads_are_chosen_by_the_mean_of_several_draws(tmp_path: Path) -> None:
    """The first draw alone would choose "bins"; a row that trains its encoder has no other."""
    rates = {"bins": (0.9, 0.1, 0.2), "tconv": (0.5, 0.6, 0.4)}

    def chosen(row: RowName, **changes: object) -> tuple[str, int]:
        work = RowWork(quick_config(tmp_path, None, **changes), row)
        fits_before = work.fits
        tried = [work.ready.popleft() for _ in range(len(work.ready))]
        for fit in tried:
            work.add(fit, fits.FitResult(rates[fit.trial.head][fit.draw], torch.empty(0), 0.0))
        assert [fit.draw for fit in work.ready] == list(range(fits_before - len(tried)))
        return work.ready[0].trial.head, len(tried)

    assert chosen("frozen") == ("tconv", 6)
    assert chosen("frozen", selection_draws=1) == ("bins", 2)
    assert chosen("frozen", labels_per_word=0) == ("bins", 2)  # all labels make one draw
    assert chosen("supervised") == ("bins", 2)


def test_ceiling_needs_trajectories(finished_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = finished_run
    with pytest.raises(ValueError, match="'ceiling' needs trajectories"):
        lipreading.evaluate(quick_config(run, None, rows=("ceiling",)))
    with pytest.raises(FileNotFoundError, match=r"OPEN/train/\d+\.npy is missing"):
        lipreading.evaluate(quick_config(run, tmp_path, rows=("ceiling",), labels_per_word=2))


def test_all_labels_make_one_draw(finished_run: tuple[Path, Path]) -> None:
    run, videos = finished_run
    results = lipreading.evaluate(quick_config(run, videos, rows=("ceiling",), labels_per_word=0, epochs=2))
    assert len(results[0].draws) == 1
    assert (run / "evaluation" / "ceiling-all.json").exists()
    assert [row.labels_per_word for row in read_rows(run)][-1] == 0
    print_table(results)


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no config\.json"):
        lipreading.evaluate(quick_config(tmp_path, None, rows=("frozen",)))


def test_label_draws_are_fixed_balanced_and_different() -> None:
    labels = torch.tensor([word for word in range(4) for _ in range(9)] + [-1] * 5)
    first, again, other = (draw_labelled_clips(labels, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert labels[first].bincount().tolist() == [3, 3, 3, 3]
    assert len(first.unique()) == 12
    assert draw_labelled_clips(labels, 0, 0).tolist() == list(range(36))
    with pytest.raises(ValueError, match="labels_per_word is 10, but word number 0 has 9"):
        draw_labelled_clips(labels, 10, 0)
    with pytest.raises(ValueError, match="labels_per_word is 10, but ABOUT has 9 training clips"):
        draw_labelled_clips(labels, 10, 0, ["ABOUT"])
    with pytest.raises(ValueError, match="no labelled clips"):
        draw_labelled_clips(torch.full((3,), -1), 1, 0)


def test_interval_covers_draws_and_test_clips() -> None:
    mean, half = mean_and_interval([0.5], 100)
    assert (mean, half) == (0.5, pytest.approx(1.96 * 0.5 / math.sqrt(104)))
    assert mean_and_interval([1.0], 9)[1] > 0.1  # nine right of nine does not prove that all are
    mean, half = mean_and_interval([0.4, 0.5, 0.6], 10**9)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    with pytest.raises(ValueError, match="at least one draw"):
        mean_and_interval([], 10)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        rate = 0.4 + generator.normal(0, 0.03, 5)  # what five draws of labels would reach on endless test clips
        clips = generator.random(300)  # how hard each test clip is; all draws share them
        mean, half = mean_and_interval([float((clips < r).mean()) for r in rate], 300)
        held += abs(mean - 0.4) <= half
    assert 0.93 < held / 2000 < 0.99


def test_classifier_keeps_its_best_epoch() -> None:
    """With a rate that destroys the weights at the end, what is kept is the best epoch, not the last."""
    torch.manual_seed(0)
    features = torch.randn(40, 7, 4)
    labels = (features.mean((1, 2)) > 0).long()
    source = FrozenFeatures(features[None, :20], features[20:30], features[30:], torch.arange(20))
    model = nn.Sequential(nn.Flatten(), nn.Linear(28, 2))
    groups: list[dict[str, object]] = [{"params": model.parameters(), "lr": 0.05}]
    settings = EvaluateConfig(Path("run"), batch_size=10, validate_every=1)
    best = fit_classifier(model, groups, source, (torch.arange(20), labels[:20]), labels[20:30], settings, 20, 0)
    assert (predict(model, source, "val") == labels[20:30]).float().mean().item() == pytest.approx(best)


class Recorder(nn.Module):
    """A linear classifier that keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.shown: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.shown.append(x.detach())
        return self.linear(x.mean(1))


def fit_recorder(recipe: RecipeConfig, epochs: int = 4) -> tuple[Recorder, list[float]]:
    """A fit on three words that are one feature each; the rates of its steps."""
    torch.manual_seed(0)
    features = torch.eye(3).repeat(8, 1)[:, None].expand(-1, 7, -1)
    labels = torch.arange(24) % 3
    source = FrozenFeatures(features[None], features, features, torch.arange(24))
    model, rates = Recorder(), []
    groups: list[dict[str, object]] = [{"params": model.parameters(), "lr": 0.1}]
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        settings = EvaluateConfig(Path("run"), batch_size=12, validate_every=1, recipe=recipe)
        assert fit_classifier(model, groups, source, (torch.arange(24), labels), labels, settings, epochs, 0) > 0.5
    return model, rates


def test_mixup_blends_clips_and_words_in_the_same_shares() -> None:
    mixed, _ = fit_recorder(RecipeConfig(mixup=0.4))
    shown = torch.cat(mixed.shown)
    torch.testing.assert_close(shown.sum(2), torch.ones(len(shown), 7))  # still shares of words
    assert ((shown > 0).sum(2) > 1).any()
    plain, _ = fit_recorder(RecipeConfig())
    assert ((torch.cat(plain.shown) > 0).sum(2) == 1).all()
    # The loss of a blend is smallest for the blend's shares: cross-entropy with soft labels
    torch.manual_seed(0)
    logits = nn.Linear(3, 3)
    inputs, words = torch.randn(6, 3), torch.arange(6) % 3
    generator = torch.Generator().manual_seed(1)
    loss = classifier._loss(logits, inputs, words, RecipeConfig(mixup=0.4, label_smoothing=0.0), generator)
    generator = torch.Generator().manual_seed(1)
    share = np.random.default_rng(int(torch.randint(0, 1 << 62, (), generator=generator))).beta(0.4, 0.4)
    partner = torch.randperm(6, generator=generator)
    soft = share * torch.eye(3)[words] + (1 - share) * torch.eye(3)[words[partner]]
    blended = logits(share * inputs + (1 - share) * inputs[partner])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(blended, soft.float()))


def test_schedules() -> None:
    _, rates = fit_recorder(RecipeConfig("cosine"))
    expected = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(expected)
    _, rates = fit_recorder(RecipeConfig())
    assert max(rates) < 0.1 + 1e-9
    assert rates.index(max(rates)) in (1, 2)


@pytest.mark.parametrize("steps", range(1, 9))
def test_any_number_of_steps_has_a_schedule(steps: int) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = classifier._make_schedule(optimizer, RecipeConfig(), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert 0 < max(rates) < 0.1 + 1e-9


@pytest.mark.parametrize("clips", range(2, 12))
def test_no_batch_has_one_clip_alone(clips: int) -> None:
    """A batch norm over [N, C] has no statistics of one row."""
    features = torch.randn(clips, 7, 3)
    source = FrozenFeatures(features[None], features, features, torch.arange(clips))
    model = nn.Sequential(nn.Flatten(), nn.Linear(21, 4), nn.BatchNorm1d(4))
    labels = torch.arange(clips) % 2
    groups: list[dict[str, object]] = [{"params": model.parameters(), "lr": 0.01}]
    settings = EvaluateConfig(Path("run"), batch_size=2, validate_every=1)
    rate = fit_classifier(model, groups, source, (torch.arange(clips), labels), labels, settings, 2, 0)
    assert 0 <= rate <= 1
    assert model[2].num_batches_tracked >= 2  # an epoch of two batches or more, or two of one


def test_one_labelled_clip_in_all_is_refused(finished_run: tuple[Path, Path], monkeypatch) -> None:
    run, _ = finished_run
    monkeypatch.setattr(fits, "draw_labelled_clips", lambda *_: torch.tensor([0]))
    with pytest.raises(ValueError, match="labels_per_word gives 1 labelled clip in all, 2 are needed"):
        fits.FitInputs(quick_config(run, None))


def test_frozen_encoder_stays_as_it_is_where_features_do_not_fit(finished_run: tuple[Path, Path], monkeypatch) -> None:
    """Pictures through the frozen encoder instead: its weights and batch norms are those of the run to the last bit."""
    run, _ = finished_run
    models = []

    def keep(model: nn.Module, *args: object) -> float:
        models.append(model)
        return fit_classifier(model, *args)

    monkeypatch.setattr(fits, "fit_classifier", keep)
    config = quick_config(run, None, rows=("frozen",), heads=("bins",), epochs=2, draws=1, feature_gigabytes=0.0)
    (result,) = lipreading.evaluate(config)
    assert len(models) == 2
    assert all(isinstance(model, EncoderWithHead) and model.frozen for model in models)
    saved = load_encoder(run).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in models[-1].encoder.state_dict().items())
    assert result.wcr > 0
    monkeypatch.undo()
    random = quick_config(run, None, rows=("random",), heads=("bins",), epochs=1, draws=1, feature_gigabytes=0.0)
    assert lipreading.evaluate(random)[0].tested == SPLITS["test"]


def test_lrw_preset_is_the_usual_recipe() -> None:
    config = EvaluateConfig.from_preset("lrw", Path("run"))
    assert (config.labels_per_word, config.training_epochs, config.epochs, config.recipe.schedule) == (
        0,
        80,
        80,
        "cosine",
    )
    assert (config.recipe.mixup, config.recipe.time_mask_frames, config.recipe.weight_decay) == (0.4, 15, 1e-2)
    assert "mstcn" in config.heads
    encoder = PretrainConfig.from_preset("gpu", Path("data"), Path("run")).encoder
    assert (encoder.crop_pixels, encoder.input_pixels, encoder.backbone) == (88, 88, "resnet34")
    assert EvaluateConfig.from_preset("few-labels", Path("run")) == EvaluateConfig(Path("run"))


def test_evaluate_takes_a_preset_on_the_command_line(finished_run: tuple[Path, Path]) -> None:
    run, _ = finished_run
    few = ["--epochs", "1", "--selection-epochs", "1", "--training-epochs", "1", "--head-hidden", "6", "--workers", "1"]
    flags = ["--rows", "frozen", "supervised", "--heads", "mstcn", "--device", "cpu", "--threads", "1", *few]
    assert main(["evaluate", "--run", str(run), "--preset", "lrw", *flags]) == 0
    row = next(row for row in read_rows(run) if row.row == "supervised" and row.labels_per_word == 0)
    assert row.settings["recipe"]["mixup"] == 0.4
    assert row.chosen["head"] == "mstcn"
    assert main(["evaluate", "--run", str(run), "--preset", "grid"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("frozen", "thawed")}, "rows must be one of"),
        ({"heads": ()}, "heads must name at least one"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"seed": 2**63}, "seed must be from 0 to 9223372036854775807"),
        ({"head_learning_rates": (-1.0,)}, "head_learning_rates must be at least 0"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick_config(Path("run"), None, **changes)
