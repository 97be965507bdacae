"""Audio-visual permutative predictive coding: a visual speech encoder from unlabelled talking-face video.

Importing it, the losses, the audio features and the encoders need torch alone; the commands (`avppc --help`) and
`make_video_loader` need the package's other dependencies.
"""

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
    "LipReader",
    "LogMel",
    "LogMelConfig",
    "PermutativeInfoNCE",
    "SubTask",
    "VideoEncoder",
    "__version__",
    "bilinear_info_nce",
    "crop_video",
    "load_encoder",
    "load_reader",
    "log_mel",
    "make_video_loader",
    "moment_info_nce",
    "save_encoder",
]
