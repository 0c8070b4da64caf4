"""Rows of the built-in model's sweeps, configs/builtin/, as they are committed."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows_of(name):
    """Of every cell after training, all of them finished."""
    with (RESULTS / f"builtin_{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["status"] == "finished" and row["side"] == "after" for row in rows)
    return rows
