"""Read what one run left, test by test, as a report shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.evaluation.intervals import Interval, wilson
from abft_fast.options import listed_tests, of_one_test
from abft_fast.reporting.statistics import paired_difference
from abft_fast.training.run_folder import RunFolder

Metrics = dict[str, dict[str, Any]]
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
    """One test of one run.

    Attributes:
        folder: where the run is.
        name: the folder's; of a run with several tests, with the test.
        options: every option, with this test alone.
        environment: versions and device.
        steps: the rows of metrics.jsonl, for the first of several tests.
        evaluation: metrics by side and dataset.
        attention: attention behavior by side and dataset.
        sides: the predictions by side, of a test whose prompts have one right answer each.
    """

    folder: Path
    name: str
    options: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluation: Metrics
    attention: Metrics
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


def read_run(folder: Path) -> list[RunData]:
    """Read each test of the folder of a run.

    Raises:
        UserError: the folder holds no run, or a file of it is damaged.
    """
    run = RunFolder(folder)
    if not run.is_begun:
        raise UserError(
            f"{folder} holds no run of abft-fast train: name a run folder, or several (runs/*)"
        )
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        test_type = run.options["test_type"]
        tests = [_read_test(run, environment, test_type, test) for test in listed_tests(test_type)]
        return [tests[0], *(replace(test, steps=[]) for test in tests[1:])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} cannot be read ({type(error).__name__}: {error}): repair its files"
        ) from None


def _read_test(run: RunFolder, environment: dict[str, Any], test_type: str, test: str) -> RunData:
    """Return one test of a run, whose `--test-type` is given."""

    def by_side(scores: Metrics) -> Metrics:
        return {side: of_one_test(scores[side], test_type, test) for side in scores}

    has_accuracy = test in ("Normal", "UnseenLabel")
    details = by_side({side: run.details(side) for side in SIDES}) if has_accuracy else {}
    sides = {side: Side.of(result) for side, result in details.items() if result}
    return RunData(
        run.folder,
        run.folder.name if test_type == test else f"{run.folder.name}, {test}",
        run.options | {"test_type": test},
        environment,
        run.metrics(),
        by_side(run.evaluation),
        by_side(run.attention),
        {side: result for side, result in sides.items() if result.indices},
    )
