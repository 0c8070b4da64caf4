"""Find the options that do nothing in a run, by one table of rules for each kind of command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from abft_fast.options.base import flag
from abft_fast.options.methods import METHODS


@dataclass(frozen=True)
class Rule:
    """Options that do nothing in some runs.

    Attributes:
        purpose: what the options are for, in the words of the message.
        options: the names of their fields.
        is_idle: takes all options of a run and returns whether these do nothing in it.
    """

    purpose: str
    options: tuple[str, ...]
    is_idle: Callable[[Any], bool]


_TESTS = ("test_type", "calibration", "calibration_samples", "test_samples")
_CONTROL = ("adaptation", "p_factor", "pid_p", "pid_i", "pid_d")

EVALUATION = (
    Rule(
        "--calibration contextual and domain",
        ("calibration_samples",),
        lambda run: run.calibration not in ("contextual", "domain"),
    ),
)
"""Rules for every command that evaluates."""

TRAINING = (
    *EVALUATION,
    Rule("evaluations", _TESTS, lambda run: not run.sides),
    Rule(
        "evaluations and training on other datasets",
        ("generalization_test",),
        lambda run: not run.sides and not set(run.training_dataset_names) - {run.dataset},
    ),
    Rule(
        "--training-labels mixed",
        ("own_labels_share",),
        lambda run: run.training_labels != "mixed",
    ),
    Rule(
        "several training datasets", ("mixture",), lambda run: len(run.training_dataset_names) < 2
    ),
    Rule("checkpoints", ("save_steps",), lambda run: run.no_save),
    Rule("--trainable lora", ("lora_r",), lambda run: run.trainable != "lora"),
    Rule("--adaptation pid", ("pid_i", "pid_d"), lambda run: run.adaptation != "pid"),
    Rule(
        "--adaptation p without --p-factor",
        ("pid_p",),
        lambda run: run.adaptation == "p" and run.p_factor is not None,
    ),
    Rule("--adaptation pid and p", ("pid_p",), lambda run: run.adaptation == "none"),
    Rule("--adaptation p", ("p_factor",), lambda run: run.adaptation != "p"),
    Rule("--objective mass", ("penalty", "reward"), lambda run: run.objective == "share"),
    Rule("--objective share", ("hold",), lambda run: run.objective != "share"),
    Rule(
        "--method ABFT",
        ("objective", "hold", "penalty", "reward", *_CONTROL, "head_filter"),
        lambda run: not METHODS[run.method].uses_penalty,
    ),
)
"""Rules for a training run; if several hold for an option, the message is of the last one."""


def lines_without_effect(options: BaseModel, rules: Sequence[Rule]) -> list[str]:
    """Return a line for each option that is not at its default and does nothing in this run."""
    fields = type(options).model_fields
    lines = {
        name: f"{flag(name)} does nothing here: it works with {rule.purpose} only"
        for rule in rules
        for name in rule.options
        if getattr(options, name) != fields[name].default and rule.is_idle(options)
    }
    return list(lines.values())
