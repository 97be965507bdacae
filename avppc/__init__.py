"""Audio-visual permutative predictive coding: a visual speech encoder from unlabelled talking-face video.

Importing it, the losses, the audio features and the encoders need torch alone; the commands (`avppc --help`),
`make_video_loader` and the names in `ON_DEMAND` need the package's other dependencies.
"""

import importlib
from typing import TYPE_CHECKING, Any

from avppc._version import __version__
from avppc.clip import Clip, ClipBatch
from avppc.data.augment import crop_video
from avppc.data.on_the_fly.loader import make_video_loader
from avppc.evaluate.lipreading.heads import LipReader, load_reader
from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.losses.permutative_info_nce import PermutativeInfoNCE
from avppc.losses.subtasks import SUBTASKS, SubTask
from avppc.models.config import EncoderConfig
from avppc.models.encoder_file import load_encoder, save_encoder
from avppc.models.encoders import VideoEncoder
from avppc.ops.info_nce.moments import moment_info_nce
from avppc.ops.info_nce.op import InfoNCEStats, bilinear_info_nce, bilinear_scores
from avppc.ops.info_nce.reference import BilinearScores
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.op import LogMel, log_mel

__all__ = [
    "SUBTASKS",
    "BilinearInfoNCE",
    "BilinearScores",
    "Clip",
    "ClipBatch",
    "EncoderConfig",
    "InfoNCEStats",
    "LipReader",
    "LogMel",
    "LogMelConfig",
    "PermutativeInfoNCE",
    "SubTask",
    "VideoEncoder",
    "__version__",
    "bilinear_info_nce",
    "bilinear_scores",
    "crop_video",
    "load_encoder",
    "load_reader",
    "log_mel",
    "make_video_loader",
    "moment_info_nce",
    "save_encoder",
]

ON_DEMAND = {
    "ClipLoader": "avppc.data.packed.loader",
    "EpochSampler": "avppc.data.packed.loader",
    "PackedDataset": "avppc.data.packed.dataset",
    "PretrainConfig": "avppc.config",
    "ProxyTask": "avppc.tasks.base",
    "TaskConfig": "avppc.config",
    "TaskOutput": "avppc.tasks.base",
    "load_clip": "avppc.data.video.decode",
    "make_task": "avppc.tasks.registry",
    "pretrain": "avppc.train.loop",
}
"""Names that are imported from here when they are first asked for, and their modules."""

if TYPE_CHECKING:
    from avppc.config import PretrainConfig as PretrainConfig
    from avppc.config import TaskConfig as TaskConfig
    from avppc.data.packed.dataset import PackedDataset as PackedDataset
    from avppc.data.packed.loader import ClipLoader as ClipLoader
    from avppc.data.packed.loader import EpochSampler as EpochSampler
    from avppc.data.video.decode import load_clip as load_clip
    from avppc.tasks.base import ProxyTask as ProxyTask
    from avppc.tasks.base import TaskOutput as TaskOutput
    from avppc.tasks.registry import make_task as make_task
    from avppc.train.loop import pretrain as pretrain


def __getattr__(name: str) -> Any:
    if name not in ON_DEMAND:
        raise AttributeError(f"module 'avppc' has no attribute {name!r}")
    return getattr(importlib.import_module(ON_DEMAND[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *ON_DEMAND})
