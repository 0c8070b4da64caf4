"""Read what one run left, as a report shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.evaluation.intervals import Interval, wilson
from abft_fast.reporting.statistics import paired_difference
from abft_fast.training.run_folder import RunFolder

Scores = dict[str, dict[str, dict[str, float]]]
"""Figures by side, dataset and name; a figure may be None."""

SIDES = ("before", "after")


@dataclass(frozen=True)
class Side:
    """The predictions of one evaluation; prompts that were left out are not among them.

    Attributes:
        details: the run's details of the side, by `evaluation.details`.
        indices: index of each prompt in the test.
        labels: its true label.
        answers: the label predicted.
        confidences: the probability of the answer.
    """

    details: dict[str, Any]
    indices: list[int]
    labels: list[int]
    answers: list[int]
    confidences: list[float]

    @classmethod
    def of(cls, details: dict[str, Any]) -> Side:
        """Return the predictions that details hold."""
        pairs = zip(details["labels"], details["probabilities"], strict=True)
        kept = [(i, label, row) for i, (label, row) in enumerate(pairs) if row]
        answers = [max(range(len(row)), key=row.__getitem__) for _, _, row in kept]
        return cls(
            details,
            [i for i, _, _ in kept],
            [label for _, label, _ in kept],
            answers,
            [max(row) for _, _, row in kept],
        )

    @property
    def right(self) -> list[bool]:
        """Return whether each prompt was answered rightly."""
        return [a == b for a, b in zip(self.answers, self.labels, strict=True)]

    @property
    def queries(self) -> list[int]:
        """Return the query of each prompt."""
        return [self.details["queries"][i] for i in self.indices]

    @property
    def accuracy(self) -> Interval:
        """Return the accuracy with its interval."""
        right = self.right
        return wilson(sum(right) / len(right), len(set(self.queries)))


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        folder: where it is.
        options: every option.
        environment: versions and device.
        steps: the rows of metrics.jsonl.
        evaluation: metrics by side and dataset.
        attention: attention behavior by side and dataset.
        sides: the predictions by side, of a test whose prompts have one right answer each.
    """

    folder: Path
    options: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluation: Scores
    attention: Scores
    sides: dict[str, Side]

    @property
    def gain(self) -> Interval | None:
        """Return how much the accuracy rose; None without the same prompts on both sides."""
        if len(self.sides) < 2:
            return None
        before, after = self.sides["before"], self.sides["after"]
        if before.indices != after.indices:
            return None
        return paired_difference(before.right, after.right, after.queries)


def read_run(folder: Path) -> RunData:
    """Read the folder of a run.

    Raises:
        UserError: the folder holds no run, or a file of it is damaged.
    """
    run = RunFolder(folder)
    if not run.is_begun:
        raise UserError(f"{folder} holds no run of abft-fast train: name a run folder")
    options = run.options
    has_accuracy = options.get("test_type", "Normal") in ("Normal", "UnseenLabel")
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        details = {side: run.details(side) for side in SIDES} if has_accuracy else {}
        sides = {side: Side.of(result) for side, result in details.items() if result}
        sides = {side: result for side, result in sides.items() if result.indices}
        steps = run.metrics()
        return RunData(folder, options, environment, steps, run.evaluation, run.attention, sides)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} cannot be read ({type(error).__name__}: {error}): repair its files"
        ) from None
