"""Every setting of the package: frozen dataclasses, one docstring a field, checked when they are made."""

from avppc.data.config import AugmentConfig, FeaturesConfig, IndexConfig, PrepareConfig
from avppc.doctor import DoctorConfig
from avppc.evaluate.config import CheckSyncConfig, EvaluateConfig, ProbeConfig, RecipeConfig, ReportConfig, TableConfig
from avppc.export.config import EmbedConfig, ExportConfig
from avppc.losses.config import ObjectiveConfig
from avppc.models.config import EncoderConfig
from avppc.ops.log_mel.config import LogMelConfig
from avppc.synth.config import SynthConfig
from avppc.tasks.config import CutConfig, RivalConfig, TaskConfig
from avppc.train.config import BenchTrainConfig, OptimizerConfig, PretrainConfig, ScaleConfig

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
    "TaskConfig",
]
