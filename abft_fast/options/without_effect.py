"""Which options do nothing in a run: every rule, in one table for each kind of command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from abft_fast.options.base import flag
from abft_fast.options.methods import METHODS


@dataclass(frozen=True)
class Rule:
    """Options that do nothing where `is_idle` says so of the run's options.

    Attributes:
        purpose: what the options are for, as the user reads it.
        options: names of fields.
        is_idle: tells from all options of a run whether these do nothing.
    """

    purpose: str
    options: tuple[str, ...]
    is_idle: Callable[[Any], bool]


_TESTS = ("test_type", "generalization_test", "calibration", "calibration_samples")
_CONTROL = ("adaptation", "p_factor", "pid_p", "pid_i", "pid_d")

EVALUATION = (
    Rule(
        "--calibration contextual and domain",
        ("calibration_samples",),
        lambda run: run.calibration not in ("contextual", "domain"),
    ),
)
"""Rules of every command that tests."""

TRAINING = (
    *EVALUATION,
    Rule("evaluations", _TESTS, lambda run: not run.sides),
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
    Rule(
        "--method ABFT",
        ("penalty", "reward", *_CONTROL, "head_filter"),
        lambda run: not METHODS[run.method].uses_penalty,
    ),
)
"""Rules of a training run; for an option under several, the last that holds is told."""


def lines_without_effect(options: BaseModel, rules: Sequence[Rule]) -> list[str]:
    """Return a line for each option that is not at its default and does nothing in this run."""
    fields = type(options).model_fields
    lines = {
        name: f"{flag(name)} does nothing here: it is for {rule.purpose}"
        for rule in rules
        for name in rule.options
        if rule.is_idle(options) and getattr(options, name) != fields[name].default
    }
    return list(lines.values())
