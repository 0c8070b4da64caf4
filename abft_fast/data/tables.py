"""Read the rows of a table one at a time, each with its place in the file.

Text files are read in constant memory. The number of a row is the line that an editor shows in CSV,
TSV and JSONL; in other formats rows are counted from 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from abft_fast.data.reading import STDIN, again, errors_about, is_stream, opened
from abft_fast.data.rows import Row, check_columns, place_of, shown
from abft_fast.data.separated import read_separated, separator_note
from abft_fast.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FORMATS = f"{', '.join(SUFFIXES)}, or a folder saved by `datasets`"
_BATCH = 1024  # rows of a binary format decoded at a time


def is_table(name: str) -> bool:
    """Return whether a name stands for data: it has a known suffix, or such a path exists.

    `-` is standard input.
    """
    known = name == STDIN or Path(name).suffix.lower() in SUFFIXES
    return bool(name.strip()) and (known or os.path.exists(name))


def name_of(path: Path) -> str:
    """Return a table's short name: the name of its file without the suffix, or of its folder.

    The name of standard input, and of a pipe without a known suffix, is `stdin`.
    """
    if place_to_save(path) == STDIN:
        return "stdin"
    path = path.resolve()
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def place_to_save(path: Path) -> str:
    """Return what a saved run calls a file: its absolute path, or `-` for a nameless pipe."""
    nameless = is_stream(path) and path.suffix.lower() not in SUFFIXES
    return STDIN if nameless else str(path.resolve())


def read_rows(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    needed: Sequence[str] = (),
    delimiter: str | None = None,
) -> Iterator[Row]:
    """Yield the rows of a CSV, TSV, JSONL or parquet file, or of a folder saved by `datasets`.

    A pipe without a known suffix is CSV, or what its first bytes say.

    Args:
        path: the file or folder, or `-`; text is UTF-8, with or without a byte order mark.
        columns: the columns that every row must have; a row holds no others. None for all columns.
        needed: the columns that must be there where a row holds all columns.
        delimiter: what separates the columns of CSV and TSV; None for `separated.delimiter_of`.

    Raises:
        UserError: the file cannot be read as what its suffix says, lacks a column, or has no rows;
            or the library that reads its format is not installed.
    """
    needed = needed if columns is None else columns
    empty = True
    for row in _rows(path, columns, needed, delimiter):
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


def note(path: Path, needed: Sequence[str], delimiter: str | None) -> str:
    """Return a line about how a file is read, where that is not what its suffix says, else ""."""
    return separator_note(path, needed, delimiter) if _format(path) in (".csv", ".tsv") else ""


def _rows(
    path: Path, columns: Sequence[str] | None, needed: Sequence[str], delimiter: str | None
) -> Iterator[Row]:
    match _format(path):
        case "folder":
            return _read_folder(path, columns, needed)
        case ".csv" | ".tsv":
            return read_separated(path, columns, needed, delimiter)
        case ".jsonl":
            return _read_jsonl(path, columns, needed)
        case ".parquet":
            return _read_parquet(path, columns, needed)
        case suffix:
            raise UserError(f"{path}: suffix {suffix!r} is unknown: use {FORMATS}")


def _format(path: Path) -> str:
    """Return a file's suffix, `folder`, or the suffix that a nameless pipe would have."""
    suffix = path.suffix.lower()
    if is_stream(path) and suffix not in SUFFIXES:
        with again(path).open("rb") as file:
            beginning = file.read(_BATCH).removeprefix(b"\xef\xbb\xbf").lstrip()
        by_beginning = {b"PAR1": ".parquet", b"{": ".jsonl"}
        kinds = (kind for start, kind in by_beginning.items() if beginning.startswith(start))
        return next(kinds, ".csv")
    with errors_about(path, OSError):
        path.stat()
    return "folder" if path.is_dir() else suffix


def _read_jsonl(path: Path, columns: Sequence[str] | None, needed: Sequence[str]) -> Iterator[Row]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line.rstrip(), object_pairs_hook=_object)
            except json.JSONDecodeError as error:
                where = f"{place_of(path, number)}, character {error.colno}"
                several = line.strip() in ("[", "{") or line.startswith("[{")
                hint = ": write each object on one line, and nothing else" if several else ""
                raise UserError(f"{where}: the line is not JSON: {error.msg}{hint}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{place_of(path, number)}: the line cannot be read: {error}"
                ) from None
            if not isinstance(cells, dict):
                raise UserError(
                    f"{place_of(path, number)}: {shown(cells)} is not an object: each line must "
                    'be an object, such as {"text": "…", "label": "…"}'
                )
            check_columns(place_of(path, number), needed, cells)
            if columns is not None:
                cells = {column: cells[column] for column in columns}
            yield Row(path, number, cells)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return cells


def _read_parquet(
    path: Path, columns: Sequence[str] | None, needed: Sequence[str]
) -> Iterator[Row]:
    pyarrow = _library("pyarrow", path)
    from pyarrow import parquet

    kinds = (OSError, ValueError, pyarrow.ArrowException)
    with errors_about(path, *kinds), parquet.ParquetFile(again(path)) as file:
        names = file.schema_arrow.names
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{path}: column {twice[0]!r} is named twice")
        check_columns(str(path), needed, names)
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


def _read_folder(path: Path, columns: Sequence[str] | None, needed: Sequence[str]) -> Iterator[Row]:
    files_of(path)
    datasets = _library("datasets", path)
    with errors_about(path, Exception):  # the library raises errors of its own on bad metadata
        dataset = datasets.load_from_disk(path)
        check_columns(str(path), needed, dataset.column_names)
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
                    place = f"{place_of(path, number)}, column {column!r}"
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
