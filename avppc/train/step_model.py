"""Makes a task ready for its device and its processes."""

from __future__ import annotations

from typing import cast

from torch import nn

from avppc.models.backbones_checkpointing import checkpoint_blocks
from avppc.models.batch_norm import synchronise_batch_norm
from avppc.tasks.base_protocol import ProxyTask
from avppc.train.config_scale import ScaleConfig
from avppc.train.distributed import Processes


def prepare_model(task: ProxyTask, config: ScaleConfig, processes: Processes) -> ProxyTask:
    """The task on the processes' device, changed as the settings say; its state_dict stays the same."""
    task.to(processes.device)
    if processes.size > 1 and config.sync_batch_norm:
        task = cast("ProxyTask", synchronise_batch_norm(task))
    if config.activation_checkpointing:
        checkpoint_blocks(task)
    if config.compile:
        for name in ("video_encoder", "audio_encoder"):
            encoder = getattr(task, name, None)
            if isinstance(encoder, nn.Module):
                encoder.compile()
    return task
