"""Every setting of the package: frozen dataclasses, one docstring a field, checked when they are made."""

from avppc.data.config import IndexConfig, PrepareConfig
from avppc.data.config_augment import AugmentConfig
from avppc.data.config_feature_file import FeaturesConfig
from avppc.doctor_doctor import DoctorConfig
from avppc.evaluate.config import EvaluateConfig, RecipeConfig
from avppc.evaluate.config_probe import ProbeConfig
from avppc.evaluate.config_report import ReportConfig
from avppc.evaluate.config_sync import CheckSyncConfig
from avppc.evaluate.config_table import TableConfig
from avppc.export.config import EmbedConfig, ExportConfig
from avppc.models.config import CutConfig, EncoderConfig
from avppc.ops.log_mel.config import LogMelConfig
from avppc.synth.config import SynthConfig
from avppc.train.config import ObjectiveConfig, OptimizerConfig, PretrainConfig, RivalConfig
from avppc.train.config_bench import BenchTrainConfig
from avppc.train.config_scale import ScaleConfig

__all__ = [
    "AugmentConfig",
    "BenchTrainConfig",
    "CheckSyncConfig",
    "CutConfig",
    "DoctorConfig",
    "EmbedConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FeaturesConfig",
    "IndexConfig",
    "LogMelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ProbeConfig",
    "RecipeConfig",
    "ReportConfig",
    "RivalConfig",
    "ScaleConfig",
    "SynthConfig",
    "TableConfig",
]
