"""Read tables whose columns are separated by a character: CSV and TSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from abft_fast.data.reading import opened
from abft_fast.data.rows import Row, check_columns, place_of
from abft_fast.errors import UserError

_MARKS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}


def read_separated(
    path: Path, columns: Sequence[str] | None, needed: Sequence[str], delimiter: str | None
) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; see `tables.read_rows`."""
    mark = delimiter_of(path, needed, delimiter)
    with opened(path, newline="") as file:
        records = _records(path, csv.reader(file, delimiter=mark, strict=True))
        number, header = next(records, (0, []))
        if not number:
            raise UserError(f"{path} is empty: its first row must name the columns")
        where = place_of(path, number)
        check_columns(where, needed, header, _hint(header, mark))
        kept = _kept(where, header, columns)
        for number, cells in records:
            _check_length(place_of(path, number), cells, header, mark)
            if mark == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise UserError(
                    f"{place_of(path, number)}: a quote at a cell's beginning takes up the rows "
                    "after it: double that quote and quote the cell, or save the file as .jsonl"
                )
            if columns is None and len(kept) < len(header):
                _check_unnamed(place_of(path, number), header, cells)
            yield Row(path, number, {header[i]: cells[i] for i in kept})


def delimiter_of(path: Path, needed: Sequence[str], given: str | None = None) -> str:
    """Return the character that separates a file's columns.

    This is `given`, or the one of the file's suffix. If the header then is one name that is not
    needed, it is the only other character that finds all needed names, or that splits the header.
    """
    usual = given or _usual(path)
    headers = {mark: _header(path, mark) for mark in dict.fromkeys((usual, *_MARKS))}
    if len(headers[usual]) != 1 or headers[usual][0] in needed:
        return usual
    splitting = [mark for mark, header in headers.items() if len(header) > 1]
    finding = [mark for mark in splitting if needed and set(needed) <= set(headers[mark])]
    for candidates in (finding, splitting):
        if len(candidates) == 1:
            return candidates[0]
    return usual


def separator_note(path: Path, needed: Sequence[str], given: str | None) -> str:
    """Return a line that says which character was found to separate columns; empty if no other."""
    found = delimiter_of(path, needed, given)
    line = f"{path} seems separated by {_shown(found)} and is read so; --delimiter sets another one"
    return "" if found == (given or _usual(path)) else line


def _usual(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _shown(mark: str) -> str:
    return "tabs" if mark == "\t" else repr(mark)


def _header(path: Path, mark: str) -> list[str]:
    """Return the names in a file's first row; empty if the row cannot be read so."""
    with opened(path, newline="") as file:
        try:
            return next(filter(None, csv.reader(file, delimiter=mark, strict=True)), [])
        except csv.Error:
            return []


def _hint(header: list[str], mark: str) -> str:
    """Return what to do about a header that lacks a column, where the separator may be wrong."""
    if "".join(header).startswith("sep="):
        return "; delete this row, which only Excel reads"
    if header[0].startswith("{"):
        return "; the file looks like JSON lines: name it .jsonl"
    name = _MARKS.get(mark, repr(mark))
    if len(header) == 1 and re.search(r"\w[^\w ]+\w", header[0]):
        return f"; {name} separates columns, unless --delimiter names another character"
    return ""


def _kept(where: str, header: list[str], columns: Sequence[str] | None) -> list[int]:
    """Return the positions of the columns that rows hold; refuse one of them named twice.

    Columns without a name are left out if there are several, as commas at the ends of lines make
    them.
    """
    kept = [i for i, name in enumerate(header) if columns is None or name in columns]
    if columns is None and header.count("") > 1:
        kept = [i for i in kept if header[i]]
    names = [header[i] for i in kept]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: column {twice[0]!r} is named twice")
    return kept


def _check_unnamed(where: str, header: list[str], cells: list[str]) -> None:
    for name, cell in zip(header, cells, strict=True):
        if not name and cell.strip():
            raise UserError(
                f"{where}: {cell[:40]!r} is in a column without a name: name each column"
            )


def _check_length(where: str, cells: list[str], header: list[str], mark: str) -> None:
    if len(cells) == len(header):
        return
    name = _MARKS.get(mark, repr(mark))
    line = f"{where}: the row must have {len(header)} cells, not {len(cells)}"
    if len(cells) < len(header):
        raise UserError(
            f"{line}: write {name} for each cell that is missing; put a text of several lines in "
            '"quotes"'
        )
    if not any(cell.strip() for cell in cells[len(header) :]):
        raise UserError(f"{line}: delete what follows the last cell, or name more columns")
    raise UserError(f'{line}; put a text with {name} in it in "quotes"')


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
            raise UserError(f"{place_of(path, begin)}: {error}: {hint}") from None
        if cells:
            yield begin, cells
