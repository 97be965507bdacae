"""The flags: above a file of settings and a preset, with a help that fits a screen, completed by shells."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import tyro

import avppc.config
from avppc import flags
from avppc.cli import COMMANDS, _parse, main
from avppc.config import EvaluateConfig, PretrainConfig, TableConfig
from avppc.files import write_json
from avppc.settings import config_to_dict, write_checked_json

EARLIER = Path(__file__).parent / "earlier" / "run" / "config.json"
NEEDED = ["--data", "d", "--out", "o"]


def parse(name: str, *given: str) -> Any:
    return _parse(name, COMMANDS[name], list(given))


def config_of(name: str) -> Any:
    return getattr(avppc.config, COMMANDS[name].config)


def written(folder: Path, text: str) -> str:
    (folder / "a.yaml").write_text(text)
    return str(folder / "a.yaml")


class TestFile:
    def test_flags_win_over_the_file_and_the_file_over_the_preset(self, tmp_path: Path) -> None:
        file = written(tmp_path, "preset: gpu\nsteps: 30\noptimizer: {learning_rate: 5e-3}\nencoder:\n  width: 32\n")
        gpu = PretrainConfig.from_preset("gpu", Path("d"), Path("o"))
        expected = dataclasses.replace(
            gpu,
            steps=40,
            optimizer=dataclasses.replace(gpu.optimizer, learning_rate=5e-3),
            encoder=dataclasses.replace(gpu.encoder, width=32, features=64),
        )
        assert parse("pretrain", *NEEDED, "--config", file, "--steps", "40", "--encoder.features", "64") == expected
        laptop = parse("pretrain", *NEEDED, f"--config={file}", "--preset", "laptop")
        assert (laptop.preset, laptop.steps, laptop.batch_size, laptop.encoder.width) == ("laptop", 30, 128, 32)

    def test_every_command_takes_one(self, tmp_path: Path) -> None:
        evaluate = parse(
            "evaluate", "r", "--config", written(tmp_path, "rows: [frozen]\nhead_learning_rates: [1, 2.5]\n")
        )
        assert evaluate == EvaluateConfig(Path("r"), rows=("frozen",), head_learning_rates=(1, 2.5))
        file = written(tmp_path, 'data: d\nout: o\nlabels: "10,1"\ntasks: [time-arrow]')
        assert parse("table", "--config", file) == TableConfig(
            Path("d"), Path("o"), tasks=("time-arrow",), labels="10,1"
        )

    @pytest.mark.parametrize("name", COMMANDS)
    def test_what_has_no_default_is_still_to_be_given(self, name: str) -> None:
        config_type = config_of(name)
        needed = [field.name for field in dataclasses.fields(config_type) if field.default is field.default_factory]
        below = flags.defaults(config_type, [])
        missing = [field.name for field in dataclasses.fields(below) if getattr(below, field.name) is tyro.MISSING]
        assert missing == needed

    @pytest.mark.parametrize("checked", [True, False], ids=["as written", "changed by hand"])
    def test_the_settings_of_a_run_repeat_it(self, checked: bool, tmp_path: Path) -> None:
        run = PretrainConfig.from_preset("gpu", Path("d"), Path("o"))
        run = dataclasses.replace(run, seed=3, baselines=dataclasses.replace(run.baselines, multiway_context=9))
        (write_checked_json if checked else write_json)(tmp_path / "config.json", config_to_dict(run))
        assert parse("pretrain", "--config", str(tmp_path / "config.json")) == run
        again = parse("pretrain", "--config", str(tmp_path / "config.json"), "--out", "p", "--seed", "4")
        assert again == dataclasses.replace(run, seed=4, out=Path("p"))

    def test_an_earlier_run_means_what_it_meant(self, tmp_path: Path) -> None:
        run = parse("pretrain", "--config", str(EARLIER))
        assert (run.objective.moments, run.baselines.multiway_context, run.baselines.arrow_pool) == ("none", 5, "mean")
        few = {"rivals": {"margin": 2}, "objective": {"dim": 64}}  # not a run's: the rest is as it is today
        write_json(tmp_path / "few.json", few)
        config = parse("pretrain", *NEEDED, "--config", str(tmp_path / "few.json"))
        assert (config.objective.dim, config.objective.moments, config.baselines.margin) == (64, "clip", 2.0)
        assert config.baselines.multiway_context == PretrainConfig(Path("d"), Path("o")).baselines.multiway_context

    def test_a_preset_below_a_whole_file_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"--preset gpu would change nothing: .*config\.json has a value for every"
        ):
            parse("pretrain", "--config", str(EARLIER), "--preset", "gpu")
        assert parse("pretrain", "--config", str(EARLIER), "--preset", "laptop").preset == "laptop"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("stepz: 3", r"unknown fields \['stepz'\] \(did you mean 'steps'\?\); allowed are"),
            ("optimizer: {lr: 3}", r"optimizer: unknown fields \['lr'\]"),
            ("optimizer: 3", "optimizer: expected an object with the fields of OptimizerConfig, got int"),
            ("steps: many", "steps must be an int, got str"),
            ("subtasks: 3", "subtasks must be a str, got int 3"),
            ("preset: phone", "preset must be one of 'laptop', 'gpu'; got 'phone'"),
            ("rivals: {}\nbaselines: {}", "a field is given twice, by its name and a former one"),
            ("steps: 3\nsteps: 4", "'steps' is there twice, line 1"),
            ("a: &x [1]\nb: *x", "aliases are not read, line 2"),
            ("on: 3", "a name must be a text, line 1"),
            ("? [a]\n: 3", "a name must be a text, line 1"),
            ("task: !!python/name:os.system", "could not determine a constructor"),
            ("{", "while parsing a flow node"),
            ("[" * 5000, "recursion"),
            ("", "expected an object with the fields of PretrainConfig, got NoneType"),
            ("- steps", "expected an object with the fields of PretrainConfig, got list"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_in_it_is_told_with_its_name(
        self, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pretrain", *NEEDED, "--config", written(tmp_path, text)]) == 2
        error = capsys.readouterr().err
        assert re.match(rf"avppc: {re.escape(str(tmp_path))}/a\.yaml: .*{message}", error), error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--config"], "--config needs a value"),
            (["--config", "--steps"], "--config needs a value"),
            (["--config="], "--config needs a value"),
            (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times"),
            (["--config", "a.toml"], r"must end in \.yaml, \.yml or \.json, got a\.toml"),
            (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_told(self, given: list[str], message: str) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            parse("pretrain", *NEEDED, *given)

    def test_a_damaged_file_of_a_run_is_told(self, tmp_path: Path) -> None:
        write_checked_json(tmp_path / "config.json", config_to_dict(PretrainConfig(Path("d"), Path("o"))))
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
        with pytest.raises(ValueError, match="its checksum is not that of its content"):
            parse("pretrain", "--config", str(tmp_path / "config.json"))


def test_what_is_needed_first_may_come_without_its_flag() -> None:
    assert parse("evaluate", "r", "--draws", "2") == EvaluateConfig(Path("r"), draws=2)
    assert parse("pretrain", "d", "--out", "o") == PretrainConfig(Path("d"), Path("o"))


def test_settings_of_a_group_are_refused_by_their_whole_name() -> None:
    with pytest.raises(ValueError, match=r"^encoder\.width must be from 4 to 512, got 1$"):
        parse("pretrain", *NEEDED, "--encoder.width", "1")


def help_of(name: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, flag])
    return re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, "--help", monkeypatch, capsys)
    lines = text.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines[1:])) <= 80
    options = re.split(r"^(?:│| ) (?=--[a-z])", text, flags=re.MULTILINE)[1:]
    usual = COMMANDS[name].usual
    own = [option for option in options if not option.startswith(("--config", "--quiet", "--help-all"))]
    assert len(own) == (len(dataclasses.fields(config_of(name))) if usual is None else len(usual)) <= 12
    assert [option for option in own if "(default: " not in option and "(required)" not in option] == []
    assert ("--help-all" in text) == (usual is not None)


UNITS = re.compile(
    r"\b(batch|bin|byte|channel|clip|coefficient|band|decay|draw|epoch|exponent|factor|feature|frame|megabyte|gigabyte|hz|label|"
    r"layer|length|margin|norm|offset|parameter|pixel|point|power|probability|process|rate|sample|scale|second|seed|share|"
    r"side|size|speaker|stage|step|thread|value|weight|width|word|checkpoint)(e?s)?\b"
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_says_what_it_counts(name: str) -> None:
    for cls, prefix in flags._groups(config_of(name)):
        hints = typing.get_type_hints(cls)
        for field, text in flags.field_texts(cls).items():
            kinds = {hints.get(field), *typing.get_args(hints.get(field))}
            if kinds & {int, float}:
                assert UNITS.search(f"{field.replace('_', ' ')} {text.lower()}"), f"{prefix}{field}: {text}"


def test_texts_name_flags_that_are_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of("pretrain", "--help-all", monkeypatch, capsys).replace("│", " ").split())
    assert "with --scale.cached-negatives they share one loss" in text
    assert "Length of the window, at most --features.fft-size." in text
    assert "--features.max-hz FLOAT|None" in text


def test_a_shell_completes_commands_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "csh"]) == 2
    assert "--print-completion needs one of bash, zsh, fish" in capsys.readouterr().err
    for shell in ("zsh", "bash"):
        assert main(["--print-completion", shell]) == 0
        program = capsys.readouterr().out
        assert "avppc" in program
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    (tmp_path / "program").write_text(program)
    script = """
        source program
        for line in 'avppc pre' 'avppc pretrain --optimizer.l' 'avppc evaluate --rows f' 'avppc table --qui'; do
            COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
            $(complete -p avppc | sed 's/.*-F \\([^ ]*\\).*/\\1/') avppc
            echo "${COMPREPLY[*]}"
        done"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "prepare pretrain", "--optimizer.learning-rate", "frozen finetuned", "--quiet"
    ]  # fmt: skip


def test_a_json_value_of_every_kind_comes_from_yaml(tmp_path: Path) -> None:
    from avppc.settings import read_settings

    values = {"a": [1, 2.5, "x", None, True], "b": {"c": 1e-6, "d": -3, "e": "4e-3x", "f": 0.5}}
    (tmp_path / "a.yaml").write_text(json.dumps(values))
    assert read_settings(tmp_path / "a.yaml", PretrainConfig) == values
    (tmp_path / "b.yml").write_text("a: 4e-3\nb: +.5\nc: 1E6\nd: 12\ne: 1.5.2\nf: '3'\nh: 1-2")
    assert read_settings(tmp_path / "b.yml", PretrainConfig) == {
        "a": 4e-3, "b": 0.5, "c": 1e6, "d": 12, "e": "1.5.2", "f": "3", "h": "1-2"
    }  # fmt: skip
