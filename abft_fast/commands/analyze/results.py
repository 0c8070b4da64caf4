"""Write what an analysis found: `NAME.csv` and `NAME.svg` in one folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from abft_fast.plots import style
from abft_fast.runtime.files import unused_folder, write_csv, write_text


class Results:
    """The files of one analysis.

    Args:
        folder: where they go; None for a new folder in `analysis/`.
        name: the files' name without suffix.

    Attributes:
        written: the files so far.
    """

    def __init__(self, folder: Path | None, name: str):
        self.folder = folder or unused_folder(
            Path("analysis") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        )
        self.name = name
        self.written: list[Path] = []

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a tidy CSV, one observation a row; None is an empty cell."""
        write_csv(
            self._path(".csv"),
            [{name: _cell(value) for name, value in row.items()} for row in rows],
        )

    def picture(self, draw: Callable[..., Figure], *arguments: Any) -> None:
        """Draw a figure in the style of all pictures, and write it as SVG."""
        with style.applied():
            style.save(draw(*arguments), self._path(".svg"))

    def page(self, text: str) -> None:
        """Write an HTML page."""
        write_text(self._path(".html"), text)

    def _path(self, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}{suffix}"
        self.written.append(path)
        return path


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
