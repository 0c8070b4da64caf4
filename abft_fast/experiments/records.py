"""What runs left on disk, read back: plain runs of `train`, and the cells of sweeps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.experiments.cells import FINISHED, UNFINISHED, CellFolder
from abft_fast.options import Options
from abft_fast.options.resolve import read_yaml
from abft_fast.training.run_folder import Run

Scores = dict[str, dict[str, dict[str, float]]]
"""Metrics by side, `before` and `after`, and dataset."""


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        folder: of the run or the cell.
        method: what was done to the model; `vanilla` or a calibration where nothing was trained.
        options: every option.
        labels: what a sweep file calls it, by axis.
        title: the same in one line.
        status: finished, failed, unfinished or waiting; `line` is what it failed with.
        evaluation: scores; of a method that trains nothing, as `after`.
        attention: the same for attention behavior.
        seconds: of training; None without a step.
        peak_memory: bytes.
        trained_parameters: how many numbers were trained.
        data: path and SHA-256 of each file, of the user's own data.
    """

    folder: Path
    method: str
    options: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    title: str = ""
    status: str = FINISHED
    line: str = ""
    evaluation: Scores = field(default_factory=dict)
    attention: Scores = field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    trained_parameters: int | None = None
    data: dict[str, str] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """The name that scores have it by."""
        return Options.model_construct(dataset=self.options["dataset"]).dataset_name


def read_records(folder: Path) -> list[Record]:
    """Every run below a folder, in the order of paths.

    Raises:
        UserError: there is none, or a file of one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    found = []
    for path in sorted([*folder.rglob("cell.yaml"), *folder.rglob("config.yaml")]):
        if path.name == "cell.yaml":
            found.append(read_cell(path.parent))
        elif _is_run(path.parent) and not (path.parent.parent / "cell.yaml").is_file():
            found.append(_read(_read_run, path.parent))
    if not found:
        raise UserError(f"folder {folder} holds no run: name a run's, a sweep's or one above them")
    return found


def _is_run(folder: Path) -> bool:
    """Whether a config.yaml there is a run's, not a tracker's or anybody else's."""
    return (folder / "environment.json").is_file()


def read_cell(folder: Path) -> Record:
    """A cell of a sweep, as far as it is.

    Raises:
        UserError: a file of it cannot be read.
    """
    return _read(_read_cell, folder)


def _read(reader: Any, folder: Path) -> Record:
    try:
        return reader(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} cannot be read ({type(error).__name__}: {error}): "
            "mend what is in it, or move it away"
        ) from None


def _read_cell(folder: Path) -> Record:
    cell = CellFolder(folder)
    about, (status, line) = cell.labels, cell.status
    known = {
        "labels": about["labels"], "title": about["title"], "status": status, "line": line
    }  # fmt: skip
    known["data"] = about.get("data", {})
    if about["command"] == "train":
        found = _what_training_left(cell.run)
    else:
        found = {}
        if cell.metrics.is_file():
            found["evaluation"] = {"after": json.loads(cell.metrics.read_text(encoding="utf-8"))}
    return Record(folder, about["method"], cell.options, **{**found, **known})


def _read_run(folder: Path) -> Record:
    options = read_yaml(folder / "config.yaml")
    found = _what_training_left(folder)
    status = FINISHED if "after" in found["evaluation"] else UNFINISHED
    return Record(folder, options.get("method", "ABFT"), options, status=status, **found)


def _what_training_left(folder: Path) -> dict[str, Any]:
    run = Run(folder)
    environment = folder / "environment.json"
    described = json.loads(environment.read_text("utf-8")) if environment.is_file() else {}
    rows = run.metrics()
    return {
        "evaluation": run.evaluation,
        "attention": run.attention,
        "seconds": sum(row["seconds"] for row in rows) if rows else None,
        "peak_memory": max(row["peak_memory_bytes"] for row in rows) if rows else None,
        "trained_parameters": described.get("trained_parameters"),
        "data": described.get("data", {}),
    }
