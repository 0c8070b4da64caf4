"""The types of a table: one entry, the whole table, and the runs that one line summarizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abft_fast.experiments.cell import CALIBRATIONS

BySeed = dict[int | None, list[float]]
"""Values by seed: `{0: [0.61], 1: [0.64, 0.64]}` has seed 1 measured twice.

The seed of a method that trains nothing is None.
"""


@dataclass(frozen=True)
class Entry:
    """One value as a table shows it.

    Attributes:
        mean: the value, or None if no run has it.
        deviation: sample standard deviation over seeds; None with fewer than two seeds.
        unit: `%` for shares, which are shown times 100; `x` for ratios; `` for counts.
        note: a remark for the reader, such as `7 of 8 datasets`.
        best: whether this is the best entry of its model and column.
        applies: False where the method can have no such value, as training time without training.
    """

    mean: float | None = None
    deviation: float | None = None
    unit: str = "%"
    note: str = ""
    best: bool = False
    applies: bool = True


@dataclass(frozen=True)
class Table:
    """Titles of the columns, and the lines; the first column is the model."""

    titles: list[str]
    lines: list[list[str | Entry]]


@dataclass
class MethodRuns:
    """All runs of one method on one model that differ in dataset and seed alone.

    Attributes:
        model: the model's name in the sweep file, else its path.
        method: `ABFT`, `vanilla`, ...
        setting: the name of the entry under `settings` in the sweep file; "" where there is none,
            or where it is the method's.
        options: the options that distinguish these runs from other runs of the method.
        datasets: the datasets of the runs; some may have no score yet.
        scores: values of the metric, by (dataset trained on, dataset evaluated on) and seed.
        seconds: training times, by dataset and seed.
        trained_parameters: how many parameters each run trained.
        name: what a table calls the method; unique within its model.
    """

    model: str
    method: str
    setting: str
    options: dict[str, Any]
    datasets: set[str] = field(default_factory=set)
    scores: dict[tuple[str, str], BySeed] = field(default_factory=dict)
    seconds: dict[str, BySeed] = field(default_factory=dict)
    trained_parameters: list[int] = field(default_factory=list)
    name: str = ""

    @property
    def trains(self) -> bool:
        """Whether the method trains, rather than only evaluates."""
        return self.method not in CALIBRATIONS

    @property
    def seeds(self) -> str:
        """How many seeds the means are taken over: `2`, or `2-3` if scores differ in it."""
        counts = {len(by_seed) for by_seed in self.scores.values()}
        return "-".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"

    def in_domain(self, dataset: str) -> BySeed:
        """Return the scores on the dataset that was also trained on."""
        return self.scores.get((dataset, dataset), {})
