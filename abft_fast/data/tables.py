"""Read the rows of a table one at a time, each with its place in the file.

Text files are read in constant memory. The number of a row is the line that an editor shows in CSV,
TSV and JSONL; in other formats rows are counted from 1.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from abft_fast.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FORMATS = f"{', '.join(SUFFIXES)}, or a folder saved by `datasets`"
_NOT_A_NUMBER = frozenset({"nan", "NaN"})
_MISSING = _NOT_A_NUMBER | {"None", "null", "NULL", "NA", "N/A", "<NA>"}
_FILL = "fill it in, or leave the row out"
_BATCH = 1024  # rows of a binary format decoded at a time


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its file, its number in the file, and its cells by column."""

    path: Path
    number: int
    cells: dict[str, Any]

    def place(self, column: str | None = None) -> str:
        """Return the place of the row or of a cell, such as `a.csv, row 7, column 'text'`."""
        return _place(self.path, self.number) + (f", column {column!r}" if column else "")

    def text(self, column: str) -> str:
        """Return a cell as text.

        Raises:
            UserError: the cell is empty, NaN, or no string.
        """
        value = self.cells[column]
        if _is_missing(value, _NOT_A_NUMBER):
            raise UserError(f"{self.place(column)}: the text is {_empty(value)}; {_FILL}")
        if not isinstance(value, str):
            raise UserError(f"{self.place(column)}: a text is needed, not {_shown(value)}")
        return self._whole(column, value)

    def category(self, column: str, known: Collection[str] = ()) -> str:
        """Return a cell as a label.

        A string loses the spaces around it; a number or truth value is written as in JSON.
        Spellings of a missing value, such as `NA`, are labels only if `known` holds them.

        Raises:
            UserError: the cell is empty, or no single value.
        """
        value = self.cells[column]
        if _is_missing(value, _MISSING - set(known)):
            raise UserError(f"{self.place(column)}: the label is {_empty(value)}; {_FILL}")
        if isinstance(value, bool | int | float):
            return json.dumps(value)
        if not isinstance(value, str):
            raise UserError(f"{self.place(column)}: a label is needed, not {_shown(value)}")
        return self._whole(column, value).strip()

    def _whole(self, column: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode-escape").decode()
            raise UserError(f"{self.place(column)}: {half} is half a character") from None
        return value


def is_table(name: str) -> bool:
    """Return whether a name stands for data: it has a known suffix, or such a path exists."""
    return bool(name.strip()) and (Path(name).suffix.lower() in SUFFIXES or os.path.exists(name))


def name_of(path: Path) -> str:
    """Return a table's short name: the name of its file without the suffix, or of its folder."""
    path = path.resolve()
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV, TSV, JSONL or parquet file, or of a folder saved by `datasets`.

    Args:
        path: the file or folder; text is UTF-8, with or without a byte order mark.
        columns: the columns that every row must have; a row holds no others. None for all columns.

    Raises:
        UserError: the file cannot be read as what its suffix says, lacks a column, or has no rows;
            or the library that reads its format is not installed.
    """
    empty = True
    for row in _reader(path)(path, columns):
        empty = False
        yield row
    if empty:
        raise UserError(f"{path} has no rows")


def parts(folder: Path) -> dict[str, Path]:
    """Return the parts of a DatasetDict's folder, such as `train` and `test`, by name.

    Any other path has no parts.

    Raises:
        UserError: the folder's list of parts cannot be read.
    """
    listing = folder / "dataset_dict.json"
    if not os.path.isfile(listing):  # False, too, where nothing may be read
        return {}
    try:
        return {name: folder / name for name in json.loads(listing.read_bytes())["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{listing} is damaged: save the dataset again") from None


def files_of(path: Path) -> list[Path]:
    """Return the files that a table is read from: the file itself, or the files of its folder.

    Raises:
        UserError: a folder was not saved by `datasets`, or is a DatasetDict's with several parts.
    """
    if not os.path.isdir(path):
        return [path]
    if names := parts(path):
        raise UserError(f"{path} holds the parts {', '.join(names)}: name one, as {path}/PART")
    state = path / "state.json"
    if not os.path.isfile(state):
        raise UserError(f"folder {path} was not saved by `datasets` (it has no state.json)")
    try:
        data_files = json.loads(state.read_bytes())["_data_files"]
        return [state, path / "dataset_info.json", *(path / f["filename"] for f in data_files)]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{state} is damaged: save the dataset again") from None


def closest(name: str, names: Iterable[str]) -> str:
    """Return a hint such as `; did you mean 'text'?`, or nothing if no name is similar."""
    by_lower = {other.lower(): other for other in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""


def listed(names: Iterable[str], most: int = 12) -> str:
    """Return the names in quotes, separated by commas; beyond `most` only the first ones."""
    names = [repr(name) for name in names]
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _reader(path: Path) -> Callable[[Path, Sequence[str] | None], Iterator[Row]]:
    with _errors_about(path, OSError):
        path.stat()
    if path.is_dir():
        return _read_folder
    readers = (_read_csv, _read_csv, _read_jsonl, _read_parquet)
    reader = dict(zip(SUFFIXES, readers, strict=True)).get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: suffix {path.suffix!r} is unknown: use {FORMATS}")
    return reader


def _read_csv(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    delimiter, mark = ("\t", "tab") if path.suffix.lower() == ".tsv" else (",", "comma")
    with _opened(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        records = _records(path, reader)
        number, header = next(records, (0, []))
        if not number:
            raise UserError(f"{path} is empty: its first row must name the columns")
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise UserError(f"{_place(path, number)}: column {twice[0]!r} is named twice")
        _check_columns(_place(path, number), columns, header, f"; a {mark} separates columns")
        for number, cells in records:
            if len(cells) != len(header):
                raise UserError(
                    f"{_place(path, number)}: the row must have {len(header)} cells, not "
                    f'{len(cells)}; put a text with a {mark} in it in "quotes"'
                )
            if mark == "tab" and any("\t" in cell and "\n" in cell for cell in cells):
                raise UserError(
                    f"{_place(path, number)}: a quote at a cell's beginning takes up the rows "
                    "after it: double that quote and quote the cell, or save the file as .jsonl"
                )
            yield _row(path, number, dict(zip(header, cells, strict=True)), columns)


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line on which it begins; skip blank lines."""
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = (
                "longer texts need .jsonl, unless a quote was left open"
                if "field limit" in str(error)
                else "end a quoted cell with a quote, and double each quote inside it"
            )
            raise UserError(f"{_place(path, begin)}: {error}: {hint}") from None
        if cells:
            yield begin, cells


def _read_jsonl(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line.rstrip(), object_pairs_hook=_object)
            except json.JSONDecodeError as error:
                where = f"{_place(path, number)}, character {error.colno}"
                raise UserError(f"{where}: the line is not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{_place(path, number)}: the line cannot be read: {error}"
                ) from None
            if not isinstance(cells, dict):
                raise UserError(
                    f"{_place(path, number)}: {_shown(cells)} is not an object: each line must "
                    'be an object, such as {"text": "…", "label": "…"}'
                )
            _check_columns(_place(path, number), columns, cells)
            yield _row(path, number, cells, columns)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return cells


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    pyarrow = _library("pyarrow", path)
    from pyarrow import parquet

    kinds = (OSError, ValueError, pyarrow.ArrowException)
    with _errors_about(path, *kinds), parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{path}: column {twice[0]!r} is named twice")
        _check_columns(str(path), columns, names)
        batches = file.iter_batches(_BATCH, columns=None if columns is None else [*columns])
        yield from _rows_of(path, batches, _class_labels(file.schema_arrow.metadata or {}))


def _class_labels(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the words of each ClassLabel column, which `datasets` writes beside a table.

    Metadata in any other form name no such column.
    """
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _read_folder(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    files_of(path)
    datasets = _library("datasets", path)
    with _errors_about(path, Exception):  # the library raises errors of its own on bad metadata
        dataset = datasets.load_from_disk(path)
        _check_columns(str(path), columns, dataset.column_names)
        words = {
            name: feature.names
            for name, feature in dataset.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        if columns is not None:
            dataset = dataset.select_columns([*columns])
        yield from _rows_of(path, dataset.with_format("arrow").iter(_BATCH), words)


def _rows_of(path: Path, batches: Iterable[Any], words: dict[str, list[str]]) -> Iterator[Row]:
    """Yield the rows of arrow tables; replace indices by words in the columns of `words`.

    An index below 0 stands for a missing label.
    """
    number = 0
    for batch in batches:
        for cells in batch.to_pylist():
            number += 1
            for column in words.keys() & cells.keys():
                if isinstance(cells[column], int):
                    place = _place(path, number) + f", column {column!r}"
                    cells[column] = _word(place, cells[column], words[column])
            yield Row(path, number, cells)


def _word(place: str, index: int, words: Sequence[str]) -> str | None:
    if index >= len(words):
        raise UserError(
            f"{place}: the label {index} has no name: the table names {len(words)} labels, from 0 "
            f"to {len(words) - 1}: save it again with all names"
        )
    return words[index] if index >= 0 else None


def _library(name: str, path: Path) -> ModuleType:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(
            f"{path} cannot be read without {name}: `pip install 'abft-fast[data]'`"
        ) from None


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    with _errors_about(path, OSError):
        try:
            with path.open(encoding="utf-8-sig", newline=newline) as file:
                yield file
        except UnicodeDecodeError:
            raise UserError(f"{_first_not_utf8(path)}: save the file as UTF-8") from None


def _first_not_utf8(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{_place(path, number)}: byte {line[error.start]:#04x} is not UTF-8"
    return f"{path} is not UTF-8"


@contextmanager
def _errors_about(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a reader raises into a UserError about the file."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or repr(error)
        raise UserError(f"{path} cannot be read: {reason.splitlines()[0]}") from None


def _check_columns(
    where: str, columns: Sequence[str] | None, there: Collection[str], if_one: str = ""
) -> None:
    for column in columns or ():
        if column not in there:
            raise UserError(
                f"{where}: there is no column {column!r}; the columns are {listed(there) or 'none'}"
                f"{closest(column, there) or (if_one if len(there) == 1 else '')}"
            )


def _row(path: Path, number: int, cells: dict[str, Any], columns: Sequence[str] | None) -> Row:
    if columns is not None:
        cells = {column: cells[column] for column in columns}
    return Row(path, number, cells)


def _place(path: Path, number: int) -> str:
    return f"{path}, row {number}"


def _is_missing(value: Any, spellings: Collection[str]) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip() in spellings
    return value is None or (isinstance(value, float) and math.isnan(value))


def _empty(value: Any) -> str:
    return (
        value.strip()
        if isinstance(value, str) and value.strip()
        else ("empty" if isinstance(value, str) or value is None else "NaN")
    )


def _shown(value: Any) -> str:
    """Describe a value of the wrong kind in a few words."""
    kinds: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes", str: "a string"}
    return kinds.get(type(value), f"{type(value).__name__} {value}"[:40])
