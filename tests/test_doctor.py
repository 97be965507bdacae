"""`avppc doctor`: findings for scripts, an exit code that says whether all is well, a self-test that can fail."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import avppc.doctor
from avppc import doctor
from avppc.cli import main
from avppc.config import DoctorConfig
from avppc.ops import _library
from avppc.ops.info_nce import cpu as info_nce_cpu
from avppc.printing import one_line
from avppc.train.hardware import package_versions


def findings(capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json", *flags]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_everything_is_said_and_every_op_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert found["versions"]["torch"] == torch.__version__
    assert found["build"] == _library.build_info()
    assert found["missing"]["cpp"] is None
    assert set(found["missing"]) == {"cpp", "cuda", "triton", "pyav", "torchcodec", "dali", "nvdec"}
    assert found["problems"] == []
    picked = {(row["op"], row["device"]): row["backend"] for row in found["backends"]}
    assert picked["log_mel", "cpu"] == picked["bilinear_info_nce", "cpu"] == "cpp"
    assert all(row["why"] for row in found["backends"])
    tested = {(test["op"], test["device"]) for test in found["self_test"]}
    assert tested == {key for key, backend in picked.items() if backend}
    assert all(test["ok"] and test["error"] <= test["allowed"] for test in found["self_test"])
    assert sum(test["seconds"] for test in found["self_test"]) < 10 or torch.cuda.is_available()


def test_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-self-test"]) == 0
    text = capsys.readouterr().out
    for part in ("versions", torch.__version__, "torchcodec", "log_mel, cpu", "not run", "all is well"):
        assert part in text


def test_what_is_required_and_missing_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_import_problem", lambda module: f"no {module} here")
    found = findings(capsys, "--no-self-test", "--require", "cpp", "dali", code=1)
    assert found["problems"] == ["dali is required: no nvidia.dali here"]
    assert main(["doctor", "--no-self-test", "--require", "dali"]) == 1
    assert "problem: dali is required" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"require must be one of 'cpp', 'cuda'.*got 'gpu'"):
        DoctorConfig(require=("gpu",))


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (lambda waveform, config, lengths: avppc.log_mel(waveform, config, lengths=lengths) + 1e-3, "errs by 0.001"),
        (lambda waveform, config, lengths: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda waveform, config, lengths: avppc.log_mel(waveform, config, lengths=lengths) * torch.nan, "errs by nan"),
    ],
    ids=["wrong", "raises", "nan"],
)
def test_a_wrong_op_fails(
    broken: Callable[..., Any], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avppc.doctor, "log_mel", broken)
    found = findings(capsys, code=1)
    assert len(found["problems"]) == 4
    assert found["problems"][0].startswith("log_mel (torchaudio) on cpu with backend 'cpp': ")
    assert text in found["problems"][0]
    assert [test["ok"] for test in found["self_test"]] == [test["op"] != "log_mel" for test in found["self_test"]]


def test_without_the_extension_the_reason_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "missing_reason", lambda backend: "it was not built")
    monkeypatch.setattr(info_nce_cpu, "MISSING", "it was not built")
    monkeypatch.setattr(_library, "has_cpp_ops", lambda: False)
    monkeypatch.setattr(_library, "build_info", lambda: None)
    found = findings(capsys)
    assert found["build"] is None
    rows = [row for row in found["backends"] if row["device"] == "cpu"]
    assert [(row["backend"], row["why"]) for row in rows] == [("reference", "it was not built")] * 2
    assert main(["doctor", "--no-self-test", "--require", "cpp"]) == 1
    assert f"not built: run `{_library.BUILD_COMMAND}`" in capsys.readouterr().out


def test_lines_stay_whole_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    tests = [line for line in lines if ", cpu, " in line]
    assert len(tests) == 6
    assert all(re.search(r"  ok: errs by \S+ of \S+$", line) for line in tests)


class TestOneLine:
    def test_what_a_package_says_of_missing_libraries(self) -> None:
        error = RuntimeError(
            "Could not load libtorchcodec. Likely causes:\n  1. FFmpeg is not installed.\n  2. Another; see below:\n"
            "[start of loading traceback]\nFFmpeg version 8:\nTraceback (most recent call last):\n  File 'x', line 1\n"
            "OSError: libavutil.so.60: cannot open shared object file: No such file or directory\n"
            "OSError: Could not load this library: x.so\n[end of loading traceback]."
        )
        assert one_line(error) == (
            "Could not load libtorchcodec: OSError: libavutil.so.60: cannot open shared object file: "
            "No such file or directory"
        )

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("", "ValueError"),
            ("one", "one"),
            ("one\ntwo", "one"),
            ("cannot:\n  for this reason\n", "cannot: for this reason"),
            ("a:\nOSError: b.so: cannot open shared object file\nOSError: c.so: undefined symbol: d",
             "a: OSError: c.so: undefined symbol: d"),
        ],
    )  # fmt: skip
    def test_others(self, text: str, line: str) -> None:
        assert one_line(ValueError(text)) == line


def test_versions_are_those_of_the_installed_packages_and_none_for_others() -> None:
    versions = package_versions(("torch", "no-such-package"))
    assert versions == {"torch": importlib.metadata.version("torch"), "no-such-package": None}
