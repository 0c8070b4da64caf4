"""Read and write the files of `predict`: demonstrations, queries, and predictions."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

from abft_fast.data import Dataset, Example, tables
from abft_fast.data.reading import STDIN
from abft_fast.data.rows import Row
from abft_fast.data.template_file import TemplateFile, read_template
from abft_fast.errors import UserError, closest, listed
from abft_fast.models.files import check_adapter
from abft_fast.options import PredictConfig
from abft_fast.runtime.files import atomic_file, check_output
from abft_fast.runtime.streams import check_stdout, utf8_stdout

_DIGITS = 7  # of a probability, about what float32 has
_HALF = re.compile("[\ud800-\udfff]")  # JSON can name half a character, UTF-8 has none


def check_files(config: PredictConfig) -> None:
    """Refuse paths that cannot be used.

    Raises:
        UserError: the output is in no folder or would replace an input file, the adapter's folder
            holds no adapter, or the input cannot be read.
    """
    output = config.output
    if config.adapter is not None:
        check_adapter(config.adapter)
    if output is None:
        check_stdout()
    else:
        read = (config.input, config.demonstrations, config.template, config.config)
        check_output(output, read=[path for path in read if path is not None])
    if str(config.input) == STDIN == str(config.demonstrations):
        raise UserError("--input and --demonstrations are both -: name a file for one of them")
    next(_input_rows(config))  # raises for a wrong header


def check_queries(config: PredictConfig, label_words: Sequence[str]) -> None:
    """Read the whole input once, because its last row may be the one that cannot be used.

    Raises:
        UserError: as `read_queries`, or rows differ in their columns or hold half a character, and
            the output is CSV.
    """
    columns = None
    for row, _ in read_queries(config, label_words):
        columns = columns or row.cells.keys()
        if _writes_json(config):
            continue
        if row.cells.keys() != columns:
            odd = sorted(row.cells.keys() ^ columns)[0]
            raise UserError(
                f"{row.place()}: not all rows have column {odd!r}, but CSV needs this: write .jsonl"
            )
        for name, value in row.cells.items():
            if _HALF.search(_csv_line([name, _csv_cell(value)])):
                raise UserError(
                    f"{row.place(name)}: half a character (a lone surrogate) cannot be written as "
                    "CSV: write .jsonl, which keeps it"
                )


def read_demonstrations(config: PredictConfig) -> Dataset:
    """Return the demonstrations in the file's order.

    The label words are the template's, or else the values of the label column.

    Raises:
        UserError: a row is not what the options say, or there is only one label.
    """
    path = config.demonstrations
    template = TemplateFile() if config.template is None else read_template(config.template)
    labelled = []
    columns = (config.text_column, config.label_column)
    for row in tables.read_rows(path, columns, delimiter=config.delimiter):
        value = row.category(config.label_column, template.labels or ())
        if template.labels is not None and value not in template.labels:
            raise UserError(
                f"{row.place(config.label_column)}: {value!r} is not among the labels of "
                f"{config.template}: {listed(template.labels)}"
                f"{closest(value, template.labels)}"
            )
        labelled.append((row.text(config.text_column), value))
    words = template.labels or {value: value for value in sorted({value for _, value in labelled})}
    if len(words) == 1:
        raise UserError(
            f"{path}, column {config.label_column!r}: every row has the label {labelled[0][1]!r}; "
            "two labels are needed"
        )
    index = {value: label for label, value in enumerate(words)}
    examples = tuple(Example(text, index[value]) for text, value in labelled)
    return Dataset(
        name=tables.name_of(path),
        input_prefix=template.input_prefix,
        label_prefix=template.label_prefix,
        label_words=tuple(words.values()),
        staicc_label_words=tuple(words.values()),
        training=examples,
        demonstrations=examples,
        test=(),
    )


def read_queries(config: PredictConfig, label_words: Sequence[str]) -> Iterator[tuple[Row, str]]:
    """Yield the input's rows with their texts, one at a time.

    Raises:
        UserError: a row has no text, or has a column that the output adds.
    """
    written = _columns(label_words)
    for row in _input_rows(config):
        for column in written:
            if column in row.cells:
                raise UserError(
                    f"{config.input or 'standard input'} has a column {column!r}, which the output "
                    "adds: rename it in the input"
                )
        yield row, row.text(config.text_column)


def notes(config: PredictConfig) -> list[str]:
    """Return lines about files that are not read as their suffix says."""
    needed = {
        config.demonstrations: (config.text_column, config.label_column),
        config.input: (config.text_column,),
    }
    lines = (tables.note(path, columns, config.delimiter) for path, columns in needed.items())
    return [line for line in lines if line]


class PredictionWriter:
    """Write rows with their predictions, as JSON lines or as CSV with the first row's columns."""

    def __init__(self, file: TextIO, label_words: Sequence[str], as_json: bool):
        self._file, self._as_json = file, as_json
        self._words, self._written = list(label_words), _columns(label_words)
        self._columns: list[str] | None = None

    def write(self, row: Row, probabilities: Sequence[float] | None) -> None:
        """Write one row; without probabilities, its predictions stay empty."""
        predictions: list[Any] = [None] * len(self._written)
        if probabilities is not None:
            word = self._words[max(range(len(self._words)), key=probabilities.__getitem__)]
            predictions = [word, *(float(f"{p:.{_DIGITS}g}") for p in probabilities)]
        cells = {**row.cells, **dict(zip(self._written, predictions, strict=True))}
        if self._as_json:
            self._file.write(_json_line(cells))
            return
        if self._columns is None:
            self._columns = list(cells)
            self._file.write(_csv_line(self._columns))
        self._file.write(_csv_line([_csv_cell(cells[name]) for name in self._columns]))


@contextmanager
def open_output(config: PredictConfig, label_words: Sequence[str]) -> Iterator[PredictionWriter]:
    """Open the output file, which appears only when it is complete, or standard output."""
    with (
        nullcontext(utf8_stdout()) if config.output is None else atomic_file(config.output) as file
    ):
        yield PredictionWriter(file, label_words, _writes_json(config))


def _input_rows(config: PredictConfig) -> Iterator[Row]:
    needed = (config.text_column,)
    return tables.read_rows(config.input, needed=needed, delimiter=config.delimiter)


def _writes_json(config: PredictConfig) -> bool:
    return config.output is not None and config.output.suffix.lower() == ".jsonl"


def _columns(label_words: Sequence[str]) -> list[str]:
    return ["prediction", *(f"p_{word}" for word in label_words)]


def _csv_line(cells: Sequence[Any]) -> str:
    """Return a CSV line that ends in a line feed; carriage returns in cells are quoted."""
    line = io.StringIO(newline="")
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _csv_cell(value: Any) -> Any:
    """Return lists, mappings and booleans as JSON; csv writes None as nothing, the rest by str."""
    of_json = isinstance(value, dict | list | bool)
    return json.dumps(value, ensure_ascii=False, default=str) if of_json else value


def _json_line(cells: dict[str, Any]) -> str:
    """Return a line of JSON; half characters are escaped, and null stands for NaN and infinity."""
    try:
        line = json.dumps(cells, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        line = json.dumps(_finite(cells), ensure_ascii=False, default=str)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", line) + "\n"


def _finite(value: Any) -> Any:
    """Return a value with None in place of each NaN and infinity in it."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(part) for name, part in value.items()}
        case list():
            return [_finite(part) for part in value]
    return value
