"""Rows of results/ read back: of each kind of device, case and contender the last one."""

from __future__ import annotations

import csv
import datetime
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from abft_fast.errors import UserError

KINDS = ("GPU", "CPU")
PERCENTILES = ("p20", "p50", "p80")
ORIGIN = ("date", "commit", "device", "threads", "torch", "triton", "transformers")
_NUMERIC = ("_p20", "_p50", "_p80", "_bytes", "_planned", "_measured")
_PROCESSORS = {"x86_64", "AMD64", "aarch64", "arm64"}  # what platform.machine() says


def _spreads(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{percentile}" for name in names for percentile in PERCENTILES)


TIMING = _spreads("seconds", "to_floor", "speedup")


class Question(NamedTuple):
    """A file of results/ and what its columns mean.

    Attributes:
        name: of the file.
        title: as the subject of "was not measured".
        case: columns that together say what was measured.
        contender: the column that says by which way.
        numbers: columns that hold a number or, unless they are of the case, nothing. A file
            without one of these columns, or of those above, is of another version: not measured
            yet.
        kinds: devices it is meant for.
    """

    name: str
    title: str
    case: tuple[str, ...]
    contender: str
    numbers: tuple[str, ...]
    kinds: tuple[str, ...] = KINDS


QUESTIONS = (
    Question(
        "train_step", "a step", ("model", "prompts", "tokens", "k", "dtype"), "contender",
        (*TIMING, "prompts", "tokens", "k", "tokens_a_second", "peak_bytes"),
    ),
    Question(
        "fused_attention", "attention with the loss", ("dtype", "n", "prompts", "heads", "part"),
        "contender", (*TIMING, "n", "prompts"),
    ),
    Question(
        "last_row_loss", "the loss of last rows", ("dtype", "n", "prompts", "heads"), "contender",
        (*TIMING, "n", "prompts", "bytes", "bandwidth", "peak_bytes"),
    ),
    Question(
        "scaling", "scaling", ("axis", "size", "model", "prompts", "n"), "contender",
        (*_spreads("seconds"), "size", "prompts", "n", "peak_bytes"),
    ),
    Question(
        "large_models", "large models", ("shape", "layers", "bits", "cap_gb", "prompts", "n"),
        "contender",
        (
            *_spreads("seconds"), "layers", "bits", "prompts", "n", "static_planned",
            "static_measured", "step_planned", "step_measured", "prompts_a_second",
        ),
    ),
    Question(
        "evaluation", "evaluation", ("model", "dataset", "prompts", "tokens", "clock"), "contender",
        (*TIMING, "prompts", "tokens"),
    ),
    Question(
        "shared_prefix", "a shared prefix", ("dataset", "k", "queries"), "contender",
        (*TIMING, "k", "queries", "tokens"),
    ),
    Question(
        "unsloth_step", "E2E by unsloth", ("model", "prompts", "n"), "contender",
        (*_spreads("seconds"), "prompts", "n"), ("GPU",),
    ),
    Question("end_to_end", "`abft-fast train` end to end", ("case",), "phase", ("seconds_p50",)),
    Question(
        "loading", "loading", ("layers", "width", "vocabulary", "shards", "mmap_threshold"),
        "contender", ("layers", "width", "vocabulary", "shards", "peak_anonymous_bytes"), ("CPU",),
    ),
)  # fmt: skip


class Row(dict):
    """Cells by column, as they are written."""

    def number(self, column: str) -> float:
        """A cell's number; NaN where there is none."""
        return float(self.get(column) or "nan")

    def spread(self, name: str) -> tuple[float, ...]:
        """20th, 50th and 80th percentile."""
        return tuple(self.number(f"{name}_{percentile}") for percentile in PERCENTILES)

    @property
    def kind(self) -> str:
        return "CPU" if self["device"] in _PROCESSORS else "GPU"


def read(results: Path) -> dict[tuple[str, str], list[Row]]:
    """Rows by question and kind of device, by their cases; none where there is no such row.

    Raises:
        UserError: a row is malformed.
    """
    found = {}
    for question in QUESTIONS:
        latest = {}
        for row in _rows_of(results / f"{question.name}.csv", question):
            case = tuple(row[column] for column in question.case)
            latest[row.kind, case, row[question.contender]] = row
        for kind in KINDS:
            rows = [row for row in latest.values() if row.kind == kind]
            # Contenders stay in the order they were written in.
            rows.sort(key=lambda row: [natural(row[c]) for c in question.case])
            found[question.name, kind] = rows
    return found


def _rows_of(path: Path, question: Question) -> Iterable[Row]:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        columns = next(reader, [])
        needed = {*ORIGIN, *question.case, question.contender, *question.numbers}
        if not needed <= set(columns):
            return
        for cells in reader:
            if len(cells) != len(columns):
                _refuse(path, reader, f"{len(cells)} cells, the header has {len(columns)}")
            row = Row(zip(columns, cells, strict=True))
            for column in columns:
                numeric = column in question.numbers or column.endswith(_NUMERIC)
                empty_case = column in question.case and not row[column]
                if numeric and (empty_case or not _is_number(row[column])):
                    _refuse(path, reader, f"{column} is {row[column]!r}, not a number")
            if not _is_date(row["date"]):
                _refuse(path, reader, f"{row['date']!r} is no date")
            yield row


def _refuse(path: Path, reader, why: str) -> None:
    raise UserError(f"{path.name}, line {reader.line_num}: {why}; correct or delete the line")


def _is_number(text: str) -> bool:
    try:
        return text == "" or not math.isinf(float(text))
    except ValueError:
        return False


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def natural(text: str) -> list[tuple]:
    """A key that puts 6x512 before 24x512."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def group(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their cells of some columns, in the order they come in."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def distinct(rows: Iterable[Row], column: str) -> list[str]:
    """A column's values, each once."""
    return list(dict.fromkeys(row[column] for row in rows))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent of the power law nearest to some points, by least squares of logarithms.

    NaN where fewer than two different x have a positive y.
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope
