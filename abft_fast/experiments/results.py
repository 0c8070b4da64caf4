"""One CSV of a sweep: a row for each cell, side and dataset."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from abft_fast.experiments.cells import FINISHED
from abft_fast.experiments.grid import EVALUATED
from abft_fast.experiments.records import Record
from abft_fast.runtime.files import write_text

_ALWAYS = ("model", "dataset", "method", "seed")


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Replace the file by what the records say; a cell that is not finished has a row too."""
    records = list(records)
    varying = _varying(records)
    rows = [row for record in records for row in _rows(record, varying)]
    whole_first = sorted(rows, key=lambda row: "error" in row)
    columns = list(dict.fromkeys(name for row in whole_first for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _varying(records: list[Record]) -> list[str]:
    """Options that are not the same everywhere, after those that tell cells apart at once."""
    names = dict.fromkeys(name for record in records for name in record.options)
    differ = [
        name
        for name in names
        if len({str(r.options[name]) for r in records if name in r.options}) > 1
    ]
    trained = {r.options.get("calibration") for r in records if r.method not in EVALUATED}
    if len(trained) < 2:  # else it is the method
        differ = [name for name in differ if name != "calibration"]
    return [*_ALWAYS, *(name for name in differ if name not in _ALWAYS)]


def _rows(record: Record, varying: list[str]) -> list[dict[str, Any]]:
    options = {name: record.options.get(name) for name in varying} | {"method": record.method}
    if record.data:
        options["data_sha256"] = " ".join(digest[:10] for digest in record.data.values())
    labels = {f"{axis}_name": label for axis, label in record.labels.items()}
    known = {"cell": record.folder.name, "status": record.status, **options, **labels}
    if record.status != FINISHED:
        return [{**known, "error": record.line}]
    sides = [(side, name) for side, scores in record.evaluation.items() for name in scores]
    return [
        {
            **known,
            "side": side,
            "evaluated_on": name,
            **(record.evaluation[side][name] if side else {}),
            **(record.attention.get(side, {}).get(name, {})),
            "training_seconds": record.seconds,
            "peak_memory_bytes": record.peak_memory,
            "trained_parameters": record.trained_parameters,
        }
        for side, name in sides or [("", "")]
    ]
