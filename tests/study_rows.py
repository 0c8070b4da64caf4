"""What the built-in model reached: rows of its sweeps, and what reaches as much without a model."""

import csv
from collections import Counter
from pathlib import Path

from abft_fast import data

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows_of(name):
    """Of all cells, each finished: what was evaluated after training, or without."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["status"] == "finished" and row["side"] == "after" for row in rows)
    return rows


def largest_class(name):
    """The share of a dataset's test prompts that one answer to all has right."""
    counts = Counter(prompt.query.label for prompt in data.load(name).test_prompts(4))
    return max(counts.values()) / counts.total()
