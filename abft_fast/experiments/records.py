"""Read runs back from disk: single runs of `train`, and the cells of sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.experiments.cell import CALIBRATIONS
from abft_fast.experiments.cell_folder import FINISHED, UNFINISHED, CellFolder
from abft_fast.options import EvalConfig, Options, listed_tests, of_one_test
from abft_fast.options.resolve import read_yaml
from abft_fast.training.run_folder import RunFolder

Metrics = dict[str, dict[str, Any]]
"""Metrics by side and dataset: `{"before": {"sst2": {"accuracy": 0.5}}, "after": ...}`.

Of a run with several tests, by side, test and dataset, until `Record.by_test` divides them.
"""


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        folder: the folder of the run or the cell.
        method: the method of training; `vanilla` or a calibration if nothing was trained.
        options: every option.
        labels: names that the sweep file gives, by axis.
        title: one line for people, in the words of the sweep file.
        status: `finished`, `failed`, `unfinished` or `waiting`.
        error: the line that says why the run failed, or "".
        evaluation: the scores; a method that trains nothing has them as `after`.
        attention: measures of attention behavior, in the same form.
        seconds: training time; None before the first step.
        peak_memory: bytes; None before the first step.
        trained_parameters: how many parameters were trained.
        data: path and SHA-256 of each of the user's own data files.
    """

    folder: Path
    method: str
    options: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    title: str = ""
    status: str = FINISHED
    error: str = ""
    evaluation: Metrics = field(default_factory=dict)
    attention: Metrics = field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    trained_parameters: int | None = None
    data: dict[str, str] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """The name that the scores give the dataset."""
        return Options.model_construct(dataset=self.options["dataset"]).dataset_name

    @property
    def untrained(self) -> Record:
        """The test before training, as the record of the method that only evaluates so."""
        calibration = self.options.get("calibration", "none")
        return replace(
            self,
            method=next(name for name, value in CALIBRATIONS.items() if value == calibration),
            options={n: v for n, v in self.options.items() if n in EvalConfig.model_fields},
            labels={axis: label for axis, label in self.labels.items() if axis == "model"},
            evaluation={"after": self.evaluation.get("before", {})},
            attention={"after": self.attention.get("before", {})},
            seconds=None,
            peak_memory=None,
            trained_parameters=None,
        )

    def by_test(self) -> list[Record]:
        """Return a record for each of the run's tests, as if each had a run of its own."""
        test_type = self.options.get("test_type", "Normal")
        return [
            replace(
                self,
                options=self.options | {"test_type": test},
                evaluation=_of_test(self.evaluation, test_type, test),
                attention=_of_test(self.attention, test_type, test),
            )
            for test in listed_tests(test_type)
        ]


def ambiguous(names: Iterable[tuple[str, str]]) -> set[str]:
    """Return the names that stand for several values, of pairs of a name and its value."""
    values: dict[str, set[str]] = {}
    for name, value in names:
        values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


def read_records(folder: Path) -> list[Record]:
    """Read every run below a folder, in the order of their paths; a run is a record for each test.

    Raises:
        UserError: there is no run, or a file of a run cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    records = []
    for path in sorted([*folder.rglob("cell.yaml"), *folder.rglob("config.yaml")]):
        if path.name == "cell.yaml":
            records += read_cell(path.parent).by_test()
        elif _is_run(path.parent) and not (path.parent.parent / "cell.yaml").is_file():
            records += _read(_read_run, path.parent).by_test()
    if not records:
        raise UserError(
            f"folder {folder} holds no run: name the folder of a run or a sweep, or one above them"
        )
    return records


def read_cell(folder: Path) -> Record:
    """Read a cell of a sweep, whatever its status and whatever its tests.

    Raises:
        UserError: a file of the cell cannot be read.
    """
    return _read(_read_cell, folder)


def _of_test(scores: Metrics, test_type: str, test: str) -> Metrics:
    return {side: of_one_test(found, test_type, test) for side, found in scores.items()}


def _is_run(folder: Path) -> bool:
    """Return whether the config.yaml in a folder is a run's; trackers write files of that name."""
    return (folder / "environment.json").is_file()


def _read(reader: Callable[[Path], Record], folder: Path) -> Record:
    """Read a folder, and raise UserError if its files are missing or damaged."""
    try:
        return reader(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} cannot be read ({type(error).__name__}: {error}): "
            "repair the files in it, or move the folder away"
        ) from None


def _read_cell(folder: Path) -> Record:
    cell = CellFolder(folder)
    about, outcome = cell.about, cell.outcome
    measured: dict[str, Any] = {}
    if about["command"] == "train":
        measured = _measured_in_training(cell.run)
    elif cell.metrics.is_file():
        after = json.loads(cell.metrics.read_text(encoding="utf-8"))
        measured = {"evaluation": {"after": after}}
    measured["data"] = measured.get("data") or about.get("data", {})
    return Record(
        folder,
        about["method"],
        cell.options,
        about["labels"],
        about["title"],
        outcome.status,
        outcome.error,
        **measured,
    )


def _read_run(folder: Path) -> Record:
    options = read_yaml(folder / "config.yaml")
    measured = _measured_in_training(folder)
    status = FINISHED if "after" in measured["evaluation"] else UNFINISHED
    return Record(folder, options.get("method", "ABFT"), options, status=status, **measured)


def _measured_in_training(folder: Path) -> dict[str, Any]:
    """Return the fields of a record that the run folder of `train` knows."""
    run = RunFolder(folder)
    environment_file = folder / "environment.json"
    environment: dict[str, Any] = {}
    if environment_file.is_file():
        environment = json.loads(environment_file.read_text(encoding="utf-8"))
    steps = run.metrics()
    return {
        "evaluation": run.evaluation,
        "attention": run.attention,
        "seconds": sum(step["seconds"] for step in steps) if steps else None,
        "peak_memory": max(step["peak_memory_bytes"] for step in steps) if steps else None,
        "trained_parameters": environment.get("trained_parameters"),
        "data": environment.get("data", {}),
    }
