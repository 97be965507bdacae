"""Whether an installed avppc works: run by the Python that has it, in a folder that is not the source tree.

    python smoke.py [--require cuda-build]

Prints what it found, one line a check; exit code 1 with the first that fails. The package's own dependencies suffice.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import avppc
from avppc import crop_video, save_encoder
from avppc.cli import COMMANDS

PLACE = Path(avppc.__file__).parent
DATA_FILES = (
    "py.typed",
    "evaluate/report/report.html.jinja",
    "evaluate/style.css.jinja",
    "evaluate/table/table.html.jinja",
    "export/card.md.jinja",
)


def run(*command: str | Path) -> str:
    """Standard output of a command that must end well."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stderr}")
    return result.stdout


def check_place() -> str:
    """The package is the installed one, whole, of one version."""
    assert PLACE.parent == Path(sysconfig.get_path("platlib")), f"avppc is imported from {PLACE}"
    for name in DATA_FILES:
        assert (PLACE / name).is_file(), f"{name} is missing"
    version = importlib.metadata.version("avppc")
    assert version == avppc.__version__
    libraries = sorted(path.name for path in (*PLACE.glob("_C*"), *PLACE.glob("lib/*")))
    return f"avppc {version} with {', '.join(libraries)}"


def check_import_time() -> str:
    """A new process that has imported torch already; the median of five."""
    code = "import time, torch; start = time.perf_counter(); import avppc; print(time.perf_counter() - start)"
    seconds = [float(run(sys.executable, "-c", code)) for _ in range(5)]
    return f"import avppc takes {1000 * statistics.median(seconds):.0f} ms after torch's"


def check_commands() -> str:
    """The console script is there and every command can be asked for its settings."""
    script = Path(sysconfig.get_path("scripts")) / "avppc"
    usage = run(script, "--help")
    for name in COMMANDS:
        assert name in usage
        assert "--" in run(script, name, "--help")
    assert run(script, "--version").strip() == f"avppc {avppc.__version__}"
    return f"avppc --help, and of {len(COMMANDS)} commands"


def check_doctor(require_cuda_build: bool) -> str:
    """All self-tests pass, on the compiled operators."""
    findings = json.loads(run(sys.executable, "-m", "avppc", "doctor", "--json", "--require", "cpp"))
    assert findings["problems"] == []
    tests = findings["self_test"]
    assert tests
    assert all(test["ok"] for test in tests)
    build = findings["build"]
    if require_cuda_build:
        assert build["cuda_architectures"]
        assert (PLACE / "lib" / "libavppc_cuda.so").is_file()
    cuda = f"CUDA {build['cuda']} for {', '.join(build['cuda_architectures'])}" if build["cuda"] else "no CUDA"
    return f"doctor: {len(tests)} self-tests, {build['compiler']}, torch {build['torch']}, {cuda}, {build['cpu_level']}"


def check_loss() -> str:
    """Loss and gradient of the README's example equal torch's own, by the compiled operator."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(3, 16, 8, generator=generator, requires_grad=True)
    targets = torch.randn(3, 16, 8, generator=generator)
    weights = torch.randn(4, 8, 8, generator=generator) / 8
    pairs = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2]])
    loss = avppc.bilinear_info_nce(contexts, targets, weights, pairs, backend="cpp")
    (found,) = torch.autograd.grad(loss, contexts)
    logits = torch.bmm(contexts[pairs[:, 0]] @ weights.mT, targets[pairs[:, 1]].mT)
    expected = F.cross_entropy(logits.flatten(0, 1), torch.arange(16).repeat(4))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(expected, contexts)[0], rtol=1e-3, atol=1e-5)
    whole = avppc.PermutativeInfoNCE(8)(*(torch.randn(5, 8) for _ in range(4)))
    return f"loss {loss.item():.4f} as cross_entropy's; all 42 sub-tasks {whole.item():.3f}"


def check_features() -> str:
    """The compiled features equal their definition; the same from a sound file, by the command."""
    waveform = torch.sin(torch.arange(16_000) * 2 * math.pi * 440 / 16_000) / 2
    config = avppc.LogMelConfig.preset("whisper")
    features = avppc.log_mel(waveform, config, backend="cpp")
    torch.testing.assert_close(features, avppc.log_mel(waveform, config, backend="reference"), rtol=0, atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        sound, out = Path(folder) / "tone.wav", Path(folder) / "tone.npy"
        with wave.open(str(sound), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
            file.writeframes((waveform * 32767).to(torch.int16).numpy().tobytes())
        run(sys.executable, "-m", "avppc", "features", sound, "--preset", "whisper", "--out", out)
        assert out.stat().st_size > 4 * features.numel()
    return f"features {list(features.shape)} of one second, and avppc features"


def check_encoder() -> str:
    """An encoder is saved, loaded again and gives the same features."""
    encoder = avppc.VideoEncoder().eval()
    crops = torch.randint(256, (1, 29, 96, 96), dtype=torch.uint8)
    video = crop_video(crops, encoder.config.crop_pixels, encoder.config.input_pixels)
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(encoder, Path(folder) / "encoder.safetensors")
        features = avppc.load_encoder(folder)(video)
    assert torch.equal(features, encoder(video))
    return f"encoder: {list(crops.shape)} -> {list(features.shape)}"


def checks(require_cuda_build: bool) -> Iterator[str]:
    yield f"Python {sys.version.split()[0]}, torch {torch.__version__}, in {os.getcwd()}"
    yield check_place()
    yield check_import_time()
    yield check_commands()
    yield check_doctor(require_cuda_build)
    yield check_loss()
    yield check_features()
    yield check_encoder()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--require", choices=["cuda-build"], help="what the build must have beyond the CPU's")
    arguments = parser.parse_args()
    try:
        for line in checks(arguments.require == "cuda-build"):
            print(f"ok  {line}", flush=True)
    except AssertionError as error:
        print(f"FAILED  {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
