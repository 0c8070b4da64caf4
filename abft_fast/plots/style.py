"""One style for every picture: readable on light and dark, the same bytes from the same data.

Text stays text. Nothing may be placed by matplotlib's tight or constrained layout, and axes,
legends and labels stand at fixed places, so fonts of the machine have no say.

    with style.applied():
        figure = Figure((6, 3))
        …
        style.save(figure, path)
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from abft_fast.runtime.files import write_text

GREY = "#797979"  # as far from white as from GitHub's #0d1117
COLORS = ("#8716f4", "#d2750b", "#29a179", "#c80b37", "#888cba", "#ce63f8")
"""Apart for every kind of colour vision, and each stands out on white and on #0d1117."""
MARKERS = ("", *"s^Dvp")
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
"""Color maps of heatmaps: of shares from 0, and of signed values around 0."""

STYLE: Any = {  # its type names every setting of matplotlib
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8,
    "svg.fonttype": "none", "svg.hashsalt": "abft-fast", "path.simplify": False,
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "grid.color": GREY, "grid.alpha": 0.3,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "xtick.bottom": False, "ytick.left": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.handlelength": 1.6,
}  # fmt: skip
_IDLE = re.compile(r'(?<=\n) +| transform="rotate\(-0 [^)]*\)"')  # a third of the bytes


@contextmanager
def applied() -> Iterator[None]:
    """Draw in the style inside the block, whatever the user's own matplotlibrc says.

    A figure is made and saved in one block: matplotlib reads its settings when a part is made, and
    some parts are made only as the figure is saved.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def svg(figure: Figure) -> str:
    """Return a figure as SVG, without a date or a version."""
    file = io.StringIO()
    with applied():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _IDLE.sub("", file.getvalue())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG; a crash leaves no half of it."""
    write_text(path, svg(figure))
