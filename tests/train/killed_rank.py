"""What torchrun starts for the test of elastic restarts: a tiny run whose last process kills itself now and then."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch
from tiny_runs import tiny_config

from avppc.train.loop import pretrain

# The log of kills lies beside the run, whose directory must be new.
data, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), [int(step) for step in sys.argv[3].split(",") if step]
done = out.with_name(out.name + "-kills")
number = len(done.read_text().split()) if done.exists() else 0
clip, config = torch.nn.utils.clip_grad_norm_, tiny_config(data, out, checkpoint_every=1)


def kill(step: int) -> None:
    with done.open("a") as file:
        file.write(f"{step}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def clip_and_die(*args: object) -> torch.Tensor:
    """Some moment after the gradients of that step: while it is applied, saved, or the next one computes."""
    saved = [int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")]
    if number < len(kills) and os.environ["RANK"] == "1" and max(saved, default=0) + 1 >= kills[number]:
        threading.Timer(random.uniform(0, 0.1), kill, [kills[number]]).start()
        kills[number] = sys.maxsize  # once
    return clip(*args)


torch.nn.utils.clip_grad_norm_ = clip_and_die
pretrain(config)
