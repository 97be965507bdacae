"""Every setting of the package: frozen dataclasses, one docstring a field, checked when they are made."""

from avppc.config.augment import AugmentConfig
from avppc.config.bench import BenchTrainConfig
from avppc.config.data import IndexConfig, PrepareConfig
from avppc.config.doctor import DoctorConfig
from avppc.config.evaluate import EvaluateConfig, RecipeConfig
from avppc.config.export import EmbedConfig, ExportConfig
from avppc.config.feature_file import FeaturesConfig
from avppc.config.features import LogMelConfig
from avppc.config.model import CutConfig, EncoderConfig
from avppc.config.pretrain import ObjectiveConfig, OptimizerConfig, PretrainConfig, RivalConfig
from avppc.config.probe import ProbeConfig
from avppc.config.report import ReportConfig
from avppc.config.scale import ScaleConfig
from avppc.config.sync import CheckSyncConfig
from avppc.config.synth import SynthConfig
from avppc.config.table import TableConfig

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
