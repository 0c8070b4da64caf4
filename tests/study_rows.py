"""Rows of sweeps with the built-in model, as they are committed."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows_of(name):
    """Of all cells, each finished: what was evaluated after training, or without."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["status"] == "finished" and row["side"] == "after" for row in rows)
    return rows
