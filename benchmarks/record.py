"""Rows of measurements: where they were taken, and a CSV they are appended to."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from abft_fast.environment import versions

RESULTS = Path(__file__).parent / "results"


def where(device: str) -> dict[str, object]:
    """Columns every row begins with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: versions()[name] for name in ("torch", "triton", "transformers")},
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def reset_high_water_mark(device: str) -> None:
    """Begin to count the most memory held from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def high_water_mark(device: str) -> int:
    """Most bytes held since: allocated on a GPU, resident in the process on a CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def append(name: str, row: dict[str, object]) -> None:
    """Add a row to results/NAME.csv, at once, so that a stop loses nothing measured."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
