"""Audio-visual permutative predictive coding: a visual speech encoder from unlabeled talking-face video.

The loss, the features and the encoders need torch alone; the commands (`avppc --help`) need the package's other
dependencies.
"""

from avppc._version import __version__
from avppc.clip import Clip, ClipBatch
from avppc.data.augment import crop_video
from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.losses.permutative_info_nce import SUBTASKS, PermutativeInfoNCE, SubTask
from avppc.models.config import EncoderConfig
from avppc.models.encoder_file import load_encoder, save_encoder
from avppc.models.video import VideoEncoder
from avppc.ops.info_nce.op import InfoNCEStats, bilinear_info_nce
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.op import LogMel, log_mel

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
    "crop_video",
    "load_encoder",
    "log_mel",
    "save_encoder",
]
