"""`import avppc` needs torch alone."""

from __future__ import annotations

import subprocess
import sys

# Refuses whatever is neither avppc, nor torch with its own needs, nor the standard library.
BLOCKER = """
import sys, importlib.metadata, importlib.util

class Refuse:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)

sys.meta_path.insert(0, Refuse())
"""

HIDDEN = ["av", "cv2", "numpy", "scipy", "safetensors", "tyro", "rich", "tensorboard", "matplotlib", "jinja2", "fsspec"]
HIDDEN += ["espeakng_loader", "triton", "nvidia", "pybind11"]


def run_hidden(code: str, names: list[str]) -> subprocess.CompletedProcess[str]:
    program = BLOCKER.format(names=set(names)) + code
    return subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)


def test_import_and_loss_need_torch_alone() -> None:
    code = """
import torch, avppc
loss = avppc.PermutativeInfoNCE(8, backend="reference")
value = loss(*(torch.randn(5, 8) for _ in range(4)))
value.backward()
features = avppc.log_mel(torch.zeros(2, 16000), backend="reference")
print(float(value) > 0, tuple(features.shape), len(avppc.SUBTASKS), sorted(avppc.__all__) == sorted(set(avppc.__all__)))
"""
    result = run_hidden(code, HIDDEN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "True (2, 100, 80) 42 True"


def test_import_brings_nothing_heavy() -> None:
    code = """
import torch
before = set(sys.modules)
import avppc
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"avppc", "torch"}), "torch._dynamo" in sys.modules)
"""
    result = run_hidden(code, [])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] False"


def test_star_import_needs_torch_alone_and_decoding_names_what_it_lacks() -> None:
    code = """
from avppc import *
import avppc
print(all(name in globals() for name in avppc.__all__), "av" in sys.modules)
try:
    make_video_loader([], None, "cpu")
except ImportError as error:
    print(error.name)
"""
    result = run_hidden(code, HIDDEN)
    assert result.returncode == 0, result.stderr
    complete, decoder, lacking = result.stdout.split()
    assert (complete, decoder) == ("True", "False")
    assert lacking in HIDDEN
