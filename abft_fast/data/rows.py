"""A row of a table: its cells, its place in the file, and what a cell may be."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError, closest, listed

_NOT_A_NUMBER = frozenset({"nan", "NaN"})
_MISSING = _NOT_A_NUMBER | {"None", "null", "NULL", "NA", "N/A", "<NA>"}
_FILL = "fill it in, or leave the row out"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its file, its number in the file, and its cells by column."""

    path: Path
    number: int
    cells: dict[str, Any]

    def place(self, column: str | None = None) -> str:
        """Return the place of the row or of a cell, such as `a.csv, row 7, column 'text'`."""
        return place_of(self.path, self.number) + (f", column {column!r}" if column else "")

    def text(self, column: str) -> str:
        """Return a cell as text.

        Raises:
            UserError: the cell is empty, NaN, or no string.
        """
        value = self.cells[column]
        if _is_missing(value, _NOT_A_NUMBER):
            raise UserError(f"{self.place(column)}: the text is {_empty(value)}; {_FILL}")
        if not isinstance(value, str):
            raise UserError(f"{self.place(column)}: a text is needed, not {shown(value)}")
        return self._whole(column, value)

    def category(self, column: str, known: Collection[str] = ()) -> str:
        """Return a cell as a label.

        A string loses the spaces around it; a number or boolean is written as in JSON.
        Spellings of a missing value, such as `NA`, are labels only if `known` holds them.

        Raises:
            UserError: the cell is empty, or no single value.
        """
        value = self.cells[column]
        if _is_missing(value, _MISSING - set(known)):
            empty = _empty(value)
            admit = f"; if {empty} is a label, name it under `labels` in a --template"
            is_word = isinstance(value, str) and value.strip()
            raise UserError(
                f"{self.place(column)}: the label is {empty}; {_FILL}{admit if is_word else ''}"
            )
        if isinstance(value, bool | int | float):
            return json.dumps(value)
        if not isinstance(value, str):
            raise UserError(f"{self.place(column)}: a label is needed, not {shown(value)}")
        return self._whole(column, value).strip()

    def _whole(self, column: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode-escape").decode()
            raise UserError(f"{self.place(column)}: {half} is half a character") from None
        return value


def place_of(path: Path, number: int) -> str:
    """Return the place of a row, such as `a.csv, row 7`."""
    return f"{path}, row {number}"


def check_columns(
    where: str, needed: Sequence[str], there: Collection[str], hint: str = ""
) -> None:
    """Refuse a table, or a row of JSON, that lacks a column.

    Args:
        where: the place that the message names.
        needed: the columns that must be there.
        there: the columns that are there.
        hint: ends the message in place of a similar name.

    Raises:
        UserError: a column is not there.
    """
    for column in needed:
        if column not in there:
            raise UserError(
                f"{where}: there is no column {column!r}; the columns are {listed(there) or 'none'}"
                f"{hint or closest(column, there)}"
            )


def shown(value: Any) -> str:
    """Describe a value of the wrong kind in a few words."""
    kinds: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes", str: "a string"}
    return kinds.get(type(value), f"{type(value).__name__} {value}"[:40])


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
