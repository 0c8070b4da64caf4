"""Every option of the command line: its default, its help and its validation, once."""

from abft_fast.options.analyze import (
    AnalyzeOptions,
    AttentionConfig,
    CmapConfig,
    ComparedOnPromptsOptions,
    ComparedOptions,
    DcmConfig,
    OutputOptions,
    PathConfig,
    PlaneConfig,
    ReadPromptOptions,
    RestrictConfig,
    ShiftConfig,
    ShowConfig,
)
from abft_fast.options.base import CommandOptions, flag, is_positional
from abft_fast.options.data import CalibrationType, TestType, listed_tests, of_one_test
from abft_fast.options.doctor import DoctorConfig
from abft_fast.options.evaluate import DrawnPromptOptions, EvalConfig, Options
from abft_fast.options.experiments import SweepConfig, TableConfig
from abft_fast.options.merge import MergeConfig
from abft_fast.options.model import PlacementOptions, PromptOptions
from abft_fast.options.predict import PredictConfig
from abft_fast.options.report import FigureConfig, ReportConfig
from abft_fast.options.train import PlanConfig, TrainConfig

__all__ = [
    "AnalyzeOptions",
    "AttentionConfig",
    "CalibrationType",
    "CmapConfig",
    "CommandOptions",
    "ComparedOnPromptsOptions",
    "ComparedOptions",
    "DcmConfig",
    "DoctorConfig",
    "DrawnPromptOptions",
    "EvalConfig",
    "FigureConfig",
    "MergeConfig",
    "Options",
    "OutputOptions",
    "PathConfig",
    "PlacementOptions",
    "PlanConfig",
    "PlaneConfig",
    "PredictConfig",
    "PromptOptions",
    "ReadPromptOptions",
    "ReportConfig",
    "RestrictConfig",
    "ShiftConfig",
    "ShowConfig",
    "SweepConfig",
    "TableConfig",
    "TestType",
    "TrainConfig",
    "flag",
    "is_positional",
    "listed_tests",
    "of_one_test",
]
