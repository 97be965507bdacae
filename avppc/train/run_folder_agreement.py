"""Before a run's first step: do all its processes train alike? Else they would wait for each other, or mix two runs."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from avppc._version import __version__
from avppc.settings import config_to_dict
from avppc.train.config import PretrainConfig
from avppc.train.distributed import Processes
from avppc.train.hardware import use_bf16
from avppc.train.run_folder import differences

_OWN = ("data", "out", "device", "threads")  # settings that may differ: what lies in `data` is compared by its checksum


def check_same_training(config: PretrainConfig, clips: str, processes: Processes) -> None:
    """Raises ValueError on every process unless all have the settings, clips and precision of process 0.

    Args:
        config: this process's settings.
        clips: the checksum of its training clips.
        processes: those of the run.
    """
    if processes.size == 1:
        return
    settings = {name: value for name, value in config_to_dict(config).items() if name not in _OWN}
    precision = "bf16" if use_bf16(config.precision, processes.device) else "fp32"
    versions = {"avppc": __version__, "torch": torch.__version__.split("+")[0]}
    # through text and back: tuples become lists on this side, too
    own = json.loads(json.dumps({**settings, "precision": precision, "checksum of the clips": clips, **versions}))
    first = _of_main(own)

    def compare() -> None:
        if differing := differences(own, first):
            raise ValueError(
                f"process {processes.rank} cannot train together with process 0: {'; '.join(differing[:5])}"
            )

    processes.together(compare)


def _of_main(value: Any) -> Any:
    """Process 0's value on every process, as JSON."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(text))
    dist.broadcast(length, 0)
    received = text if dist.get_rank() == 0 else text.new_empty(int(length))
    dist.broadcast(received, 0)
    return json.loads(received.numpy().tobytes())
