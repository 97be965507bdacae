"""CONTRIBUTING.md is right: an addition to a copy of the package needs the files named there and no others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import ROOMS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
Addition = dict[str, str | list[tuple[str, str]]]

# By file of avppc/: the text of a new one, or pairs of how a line begins and what is put before it.
TASK: Addition = {
    "tasks/loudness.py": '''
from torch.nn import Linear, functional

from avppc.tasks.base import ProxyTask, TaskOutput


class LoudnessTask(ProxyTask):
    """How loud is the sound of this picture?"""

    def __init__(self, config):
        super().__init__(config, with_audio=False)
        self.answer = Linear(config.objective.dim, 1)

    def forward(self, batch, generator):
        elements = self.cut(batch, generator)
        loudness = elements.audio.float().square().mean(1).add(1).log()
        found = self.answer(self.embed_video(elements.video, generator)).squeeze(1)
        return TaskOutput(functional.mse_loss(found, loudness))
''',
    "tasks/config.py": [("TASK_NAMES", 'TaskName = Literal[TaskName, "loudness"]\n')],
    "tasks/registry.py": [
        ("class TaskEntry", "from avppc.tasks.loudness import LoudnessTask\n"),
        ("def make_task", 'TASKS["loudness"] = TaskEntry("Loudness", LoudnessTask)\n'),
    ],
}
TASK_PROGRAM = """
import torch
from avppc.cli import COMMANDS, _parse
from avppc.clip import ClipBatch
from avppc.evaluate.config import TableConfig
from avppc.tasks.registry import make_task

config = _parse("pretrain", COMMANDS["pretrain"], ["--data", "d", "--out", "o", "--task", "loudness"])
video, audio = torch.zeros(2, 29, 96, 96, dtype=torch.uint8), torch.ones(2, 18560, dtype=torch.int16)
batch = ClipBatch(video, audio, *(torch.arange(2) for _ in range(3)))
make_task(config.task, config)(batch, torch.Generator()).loss.backward()
assert "loudness" in TableConfig(config.data, config.out).tasks
"""

BACKEND: Addition = {
    "ops/info_nce/loop.py": '''
import torch
from torch.nn import functional


def solve_loop(problem, reduction, task_weights):
    """The mean loss, by a loop over the sub-tasks."""
    losses = []
    for k, (context, target) in enumerate(problem.pairs.tolist()):
        logits = problem.scale * problem.contexts[context] @ problem.weights[k].T @ problem.targets[target].T
        losses.append(functional.cross_entropy(logits, torch.arange(len(logits))))
    return torch.stack(losses).mean(), None
''',
    "ops/info_nce/op.py": [
        ("class InfoNCEStats", 'from avppc.ops.info_nce.loop import solve_loop\nBACKENDS = (*BACKENDS, "loop")\n'),
        ("def reduce_rows", '_SOLVERS["loop"] = solve_loop\n'),
    ],
}
BACKEND_PROGRAM = """
import torch
contexts, targets, weights = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4, 4)
losses = [avppc.bilinear_info_nce(contexts, targets, weights, backend=name) for name in ("loop", "reference")]
torch.testing.assert_close(*losses)
assert avppc.PermutativeInfoNCE(4, backend="loop")(*torch.randn(4, 5, 4)) > 0
"""

DECODER: Addition = {
    "data/video/black.py": '''
import torch

from avppc.data.video.reader import DecodedClip


def decode_clip_black(source, start_frame, num_frames, crop):
    """Black pictures and silence."""
    video = torch.full((num_frames, crop.size, crop.size), 16, dtype=torch.uint8)
    return DecodedClip(video, torch.zeros(640 * num_frames, dtype=torch.int16), start_frame, ())
''',
    "data/video/decode.py": [
        ("OnRefused", 'Backend = Literal[Backend, "black"]\n'),
        (
            '    if backend == "torchcodec"',
            """    if backend == "black":
        from avppc.data.video.black import decode_clip_black

        return decode_clip_black(source, start_frame, num_frames, crop or Crop())
""",
        ),
    ],
    "data/config.py": [("DecoderName", 'VideoDecoder = Literal[VideoDecoder, "black"]\n')],
}
DECODER_PROGRAM = """
from pathlib import Path

from avppc.config import EmbedConfig, PrepareConfig, PretrainConfig
from avppc.data.on_the_fly.videos import VideoClip, VideoDataset
import torch

batch = VideoDataset([VideoClip("a.mp4")], backend="black", threads=1).batch(torch.tensor([0]))
assert (batch.video == 16).all()
assert PrepareConfig(Path("a"), Path("b"), decoder="black").backend == "black"
PretrainConfig(Path("a"), Path("b"), loader="black")
EmbedConfig(Path("a"), Path("b"), Path("c.npz"), loader="black")
"""

COMMAND: Addition = {
    "data/count.py": '''
def execute(config):
    """Prints the number of files in a folder."""
    print(len(list(config.data.iterdir())))
    return 0
''',
    "data/config.py": [
        (
            "@dataclass",
            '''
@dataclass(frozen=True)
class CountConfig:
    """A folder whose files are counted."""

    data: Path
    """The folder."""


__all__ += ["CountConfig"]
''',
        )
    ],
    "cli.py": [("def main", 'COMMANDS["count"] = Command("Counts.", "CountConfig", "avppc.data.count")\n')],
}
COMMAND_PROGRAM = """
from avppc.cli import main

assert main(["count", "avppc/ops/log_mel"]) == 0
assert main(["count", "--help"]) == 0
"""

ADDITIONS = {
    "a proxy task": (TASK, TASK_PROGRAM),
    "a backend of the loss": (BACKEND, BACKEND_PROGRAM),
    "a decoder": (DECODER, DECODER_PROGRAM),
    "a command": (COMMAND, COMMAND_PROGRAM),
}


def add(package: Path, addition: Addition) -> None:
    for name, change in addition.items():
        path = package / name
        if isinstance(change, str):
            path.write_text(change, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for place, new in change:
            assert f"\n{place}" in text, f"{name} has no line that begins with {place!r}"
            text = text.replace(f"\n{place}", f"\n{new}{place}", 1)
        path.unlink()  # a link to the package's own file
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("kind", ADDITIONS)
def test_addition_touches_the_files_named_and_works(kind: str, tmp_path: Path) -> None:
    addition, program = ADDITIONS[kind]
    shutil.copytree(ROOT / "avppc", tmp_path / "avppc", copy_function=os.symlink, ignore=lambda *_: ["__pycache__"])
    add(tmp_path / "avppc", addition)
    program = f"import avppc\nassert {str(tmp_path)!r} in avppc.__file__\n{program}"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    row = re.search(rf"^\| {kind} \|(.*)$", PAGE, re.MULTILINE)
    assert row is not None
    always = row[1].partition("; for compiled code")[0]
    new, *others = re.findall(r"`([\w/<>]+\.py)`", always)
    expected = re.compile(re.escape(new).replace("<name>", r"\w+").replace("<room>", r"\w+"))
    assert expected.fullmatch(next(iter(addition)))
    room = next(iter(addition)).split("/")[0]
    assert [name.replace("<room>", room) for name in others] == list(addition)[1:]
    assert len(addition) <= 3


def test_rooms_are_listed_in_the_order_in_which_they_may_be_imported() -> None:
    listed = re.findall(r"^\| `(\w+)/` \|", PAGE.partition("## How the tree is laid out")[2], re.MULTILINE)
    folders = [path.parent.name for path in (ROOT / "avppc").glob("*/__init__.py")]
    assert listed == [room for room in ROOMS if room in folders]
