"""Rows of measurements: where they were taken, and a CSV they are appended to."""

from __future__ import annotations

import csv
import datetime
import functools
import platform
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from abft_fast.runtime.environment import versions

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
SEED = 0
COMMIT = ""  # where the code has no git: its name, from the command line


def quick_first(cases: Sequence, quick: Collection) -> list:
    """Parameters of a benchmark: cases in their order, those that are not quick marked `long`."""
    import pytest

    ordered = sorted(cases, key=lambda case: case not in quick)
    marks = {True: (), False: pytest.mark.long}
    return [pytest.param(case, id=str(case), marks=marks[case in quick]) for case in ordered]


@functools.cache
def commit() -> str:
    """The code's, `-dirty` where files other than results differ from it; `unknown` without git."""
    if COMMIT:
        return COMMIT

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return run.stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


_versions = functools.cache(versions)


def gpu_answers() -> bool:
    """Whether the GPU can still be used; a CPU always can."""
    try:
        if GPU:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def where() -> dict[str, object]:
    """Columns every row begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if GPU else platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: _versions()[name] for name in ("torch", "triton", "transformers")},
        "seed": SEED,
    }


def append(question: str, row: dict[str, object]) -> None:
    """Add a row to results/QUESTION.csv, at once, so that a stop loses nothing measured.

    Raises:
        ValueError: the file has other columns.
    """
    path = RESULTS / f"{question}.csv"
    row = {**where(), **row}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"{path.name} has the columns {columns}, a row {list(row)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
