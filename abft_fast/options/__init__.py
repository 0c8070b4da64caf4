"""Every option of the command line: its default, its help and its validation, once."""

from abft_fast.options.base import CommandOptions, flag, is_positional
from abft_fast.options.data import CalibrationType, TestType
from abft_fast.options.evaluate import EvalConfig, Options
from abft_fast.options.experiments import SweepConfig, TableConfig
from abft_fast.options.merge import MergeConfig
from abft_fast.options.model import PromptOptions
from abft_fast.options.predict import PredictConfig
from abft_fast.options.train import PlanConfig, TrainConfig

__all__ = [
    "CalibrationType",
    "CommandOptions",
    "EvalConfig",
    "MergeConfig",
    "Options",
    "PlanConfig",
    "PredictConfig",
    "PromptOptions",
    "SweepConfig",
    "TableConfig",
    "TestType",
    "TrainConfig",
    "flag",
    "is_positional",
]
