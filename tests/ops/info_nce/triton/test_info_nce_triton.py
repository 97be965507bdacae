"""The Triton kernels of bilinear_info_nce without a GPU: in Triton's interpreter, and what says why they do not run."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avppc.ops import _library
from avppc.ops.info_nce import op
from avppc.ops.info_nce.moments import moment_info_nce
from avppc.ops.info_nce.op import bilinear_info_nce

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@needs_triton
@pytest.mark.timeout(900)  # a minute where nothing else runs
@pytest.mark.parametrize("name", ["interpreted_info_nce_triton.py", "interpreted_moments_triton.py"])
def test_the_contract_holds_in_the_interpreter(name: str) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined, and others compile kernels."""
    tests = Path(__file__).parent / name
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d+ passed in", result.stdout, re.MULTILINE), result.stdout[-2000:]


@needs_triton
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    x = torch.ones(2, 3, 2)
    with pytest.raises(ValueError, match=r"contexts on cpu cannot be scored with backend='triton': .*TRITON_INTERPRET"):
        bilinear_info_nce(x, x, backend="triton")


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_find", lambda _: "it was hidden")
    x = torch.ones(3, 2)
    for function in (bilinear_info_nce, moment_info_nce):
        text = rf"{function.__name__}\(backend='triton'\) needs Triton: it was hidden"
        with pytest.raises(RuntimeError, match=text):
            function(x[None], x[None], backend="triton")


@pytest.mark.parametrize("function", ["bilinear_info_nce", "moment_info_nce"])
@pytest.mark.parametrize(
    ("dtype", "triton_reason", "expected"),
    [
        (torch.bfloat16, None, None),
        (torch.float64, None, "there are no kernels for float64"),
        (torch.float32, "Old GPU has compute capability 7.5; they need 8.0", "Old GPU has compute capability 7.5"),
        (torch.float32, "Triton cannot be imported", "Triton cannot be imported"),
    ],
)
def test_auto_falls_back_on_a_gpu_and_says_why_once(
    function: str,
    dtype: torch.dtype,
    triton_reason: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_library, "triton_missing_reason", lambda *_: triton_reason)
    _library._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        picked = [op._pick_automatically(function, torch.device("cuda", 0), dtype, None) for _ in range(2)]
    assert picked == ["triton" if expected is None else "reference"] * 2
    assert len(caplog.records) == (0 if expected is None else 1)
    assert expected is None or (expected in caplog.text and f"{function} runs in plain torch" in caplog.text)
    _library._log_once.cache_clear()


def test_capabilities_below_8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_find", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    reason = _library._triton_missing_reason.__wrapped__("cuda", 0)
    assert reason == "Old GPU has compute capability 7.5; they need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert _library._triton_missing_reason.__wrapped__("cuda", 0) is None
