"""Write the results of a sweep as one CSV: a row for each cell, test, side and dataset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from abft_fast.experiments.cell import CALIBRATIONS
from abft_fast.experiments.cell_folder import FINISHED
from abft_fast.experiments.records import Record
from abft_fast.runtime.files import write_csv

_FIRST_COLUMNS = ("model", "dataset", "method", "seed")


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Replace a CSV by the records' results; a cell that is not finished has a row too."""
    records = [
        part
        for record in records
        for part in (record.by_test() if record.status == FINISHED else [record])
    ]
    options = _shown_options(records)
    rows = [row for record in records for row in _rows(record, options)]
    complete_first = sorted(rows, key=lambda row: "error" in row)
    columns = list(dict.fromkeys(name for row in complete_first for name in row))
    write_csv(path, rows, columns)


def _shown_options(records: list[Record]) -> list[str]:
    """Return the columns for options: some always, then all that differ between records."""
    values: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.options.items():
            values.setdefault(name, set()).add(str(value))
    differing = [name for name, found in values.items() if len(found) > 1]
    calibrations = {r.options.get("calibration") for r in records if r.method not in CALIBRATIONS}
    if len(calibrations) < 2 and "calibration" in differing:
        differing.remove("calibration")  # only evaluations differ in it, and it is their method
    return [*_FIRST_COLUMNS, *(name for name in differing if name not in _FIRST_COLUMNS)]


def _rows(record: Record, option_names: list[str]) -> list[dict[str, Any]]:
    about: dict[str, Any] = {"cell": record.folder.name, "status": record.status}
    about |= {name: record.options.get(name) for name in option_names}
    about["method"] = record.method
    if record.data:
        about["data_sha256"] = " ".join(digest[:10] for digest in record.data.values())
    about |= {f"{axis}_name": label for axis, label in record.labels.items()}
    if record.status != FINISHED:
        return [{**about, "error": record.error}]
    costs = {
        "training_seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory,
        "trained_parameters": record.trained_parameters,
    }
    rows = [
        {
            **about,
            "side": side,
            "evaluated_on": dataset,
            **metrics,
            **record.attention.get(side, {}).get(dataset, {}),
            **costs,
        }
        for side, datasets in record.evaluation.items()
        for dataset, metrics in datasets.items()
    ]
    return rows or [{**about, "side": "", "evaluated_on": "", **costs}]
