"""Audio-visual permutative predictive coding: a visual speech encoder from unlabeled talking-face video.

The loss, the features and the encoders need torch alone; the commands (`avppc --help`) need the package's other
dependencies.
"""

from avppc._version import __version__
from avppc.clip import Clip, ClipBatch
from avppc.config.features import LogMelConfig
from avppc.config.model import EncoderConfig
from avppc.models.encoder_file import load_encoder
from avppc.models.video import VideoEncoder
from avppc.ops.info_nce import InfoNCEStats, bilinear_info_nce
from avppc.ops.info_nce_module import BilinearInfoNCE
from avppc.ops.log_mel import LogMel, log_mel
from avppc.tasks.permutative import SUBTASKS, PermutativeInfoNCE, SubTask

__all__ = [
    "SUBTASKS",
    "BilinearInfoNCE",
    "Clip",
    "ClipBatch",
    "EncoderConfig",
    "InfoNCEStats",
    "LogMel",
    "LogMelConfig",
    "PermutativeInfoNCE",
    "SubTask",
    "VideoEncoder",
    "__version__",
    "bilinear_info_nce",
    "load_encoder",
    "log_mel",
]
