"""Rows as SVG, in the style of every picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from abft_fast.plots import style
from abft_fast.plots.style import COLORS, GREY, MARKERS
from benchmarks.rows import Row, distinct, group, natural
from benchmarks.tables import EAGER, STEPS, exponent, main_heads, of, slope_of, whole


def draw(plot: Callable[[list[Row]], Figure], rows: list[Row]) -> bytes:
    """A plot's file."""
    with style.applied():
        return style.svg(plot(rows)).encode()


def _plain(value: float, _: int = 0) -> str:
    """A tick of a logarithmic axis."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _logarithmic(axis) -> None:
    axis.axes.grid(True, axis=axis.axis_name, linewidth=0.6)
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 1e3 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def train_step(rows: list[Row]) -> Figure:
    """Bars of time and memory against eager attention, a group a case."""
    cases = group(rows, "model", "prompts", "tokens", "k", "dtype")
    cases = {case: ways for case, ways in cases.items() if of(ways, contender=EAGER)}
    bar = 1 / (len(STEPS) + 1)
    height = 0.95 + 0.95 * len(cases)
    figure = Figure((8.4, height))
    times, memory = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(
        left=0.17, right=0.975, top=1 - 0.62 / height, bottom=0.3 / height, wspace=0.12
    )
    for index, (case, contender) in ((i, c) for i in range(len(STEPS)) for c in enumerate(cases)):
        ways = cases[contender]
        row, eager = of(ways, contender=STEPS[index]), of(ways, contender=EAGER)
        if row is None:
            continue
        where = case + (index + 1) * bar
        low, middle, high = row.spread("speedup")
        _bar(times, where, bar, middle, COLORS[index])
        times.plot([low, high], [where, where], color=GREY, linewidth=1)
        share = row.number("peak_bytes") / eager.number("peak_bytes")
        _bar(memory, where, bar, share, COLORS[index])
    names = [
        f"{model}\n{prompts} x {whole(str(float(tokens) / float(prompts)))} tokens"
        for model, prompts, tokens, *_ in cases
    ]
    times.set_yticks([i + 0.5 for i in range(len(cases))], names)
    times.set_ylim(len(cases), 0)
    for axes, title in ((times, "times as fast as eager"), (memory, "memory, eager's = 1")):
        axes.set_xscale("log")
        _logarithmic(axes.xaxis)
        axes.margins(x=0.18)
        axes.axvline(1, color=GREY, linewidth=1)
        axes.spines["left"].set_visible(False)
        axes.set_title(title, loc="left", pad=3)
    handles = [matplotlib.patches.Patch(color=color) for color in COLORS]
    figure.legend(
        handles, STEPS, ncols=len(STEPS), loc="upper left", bbox_to_anchor=(0.0, 1.0),
        handlelength=1, columnspacing=1.4,
    )  # fmt: skip
    return figure


def _bar(axes: Axes, where: float, height: float, value: float, color: str) -> None:
    if not math.isfinite(value) or value <= 0:
        return
    axes.barh(where, value - 1, height * 0.9, left=1, color=color)
    axes.annotate(
        f"{value:.2g}" if value < 10 else f"{value:.0f}", (value, where), fontsize=7, va="center",
        ha="left" if value >= 1 else "right", xytext=(6 if value >= 1 else -6, 0),
        textcoords="offset points",
    )  # fmt: skip


def scaling(rows: list[Row]) -> Figure:
    """Seconds and memory over the size of every axis, a line a mode, its slope beside it."""
    modes, axes_of_rows = distinct(rows, "contender"), group(rows, "axis")
    width = 3.2 * len(axes_of_rows)
    figure = Figure((width, 5.2))
    grid = figure.subplots(2, len(axes_of_rows), squeeze=False)
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.45 / width, top=0.88, bottom=0.085, wspace=0.5, hspace=0.28
    )
    measures = {"seconds": ("seconds_p50", 1.0), "most memory, MiB": ("peak_bytes", 2**20)}
    for column, ((axis,), points) in enumerate(axes_of_rows.items()):
        for axes, (name, (cell, unit)) in zip(grid[:, column], measures.items(), strict=True):
            for index, mode in enumerate(modes):
                ours = [row for row in points if row["contender"] == mode]
                xs = [row.number("size") for row in ours]
                ys = [row.number(cell) / unit for row in ours]
                _line(axes, index, xs, ys, mode)
                axes.text(
                    1.04, 0.86 - 0.1 * index, exponent(slope_of(ours, cell)), fontsize=8,
                    color=COLORS[index % len(COLORS)], transform=axes.transAxes,
                )  # fmt: skip
            _both_logarithmic(axes, distinct(points, "size"))
            axes.set_title(name, loc="left", pad=4)
            axes.text(1.04, 0.97, "slope", fontsize=8, transform=axes.transAxes)
        grid[1, column].set_xlabel({"depth": "layers", "length": "tokens a prompt"}.get(axis, axis))
    figure.legend(
        grid[0, 0].lines, modes, ncols=len(modes), loc="upper left", bbox_to_anchor=(0.0, 1.0),
        columnspacing=1.4,
    )  # fmt: skip
    return figure


def _line(axes: Axes, index: int, xs: Sequence[float], ys: Sequence[float], label: str) -> None:
    """The first is wide: another that lies on it leaves it in sight."""
    axes.plot(
        xs, ys, color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)],
        linestyle="-" if index < len(COLORS) else "--", label=label,
        linewidth=3.5 if index == 0 else 1.4, markersize=4,
    )  # fmt: skip


def _both_logarithmic(axes: Axes, ticks: Sequence[str]) -> None:
    """Logarithmic axes, x marked where there are points; no axes without one."""
    values = [value for line in axes.lines for value in line.get_ydata()]
    if not any(math.isfinite(value) and value > 0 for value in values):
        axes.set_visible(False)
        return
    axes.set(xscale="log", yscale="log")
    _logarithmic(axes.yaxis)
    axes.set_xticks(list(map(float, ticks)), map(whole, ticks))
    axes.xaxis.set_minor_locator(NullLocator())


def fused_attention(rows: list[Row]) -> Figure:
    """Time over that of attention without loss, over n, by part."""
    shown = [row for row in main_heads(rows) if row["contender"] != "attention"]
    ways = distinct(shown, "contender")
    figure = Figure((8.4, 3.0))
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.85, top=0.9, bottom=0.16, wspace=0.1)
    ticks = sorted(distinct(shown, "n"), key=natural)
    for axes, part in zip(panels, ("forward", "forward and backward"), strict=True):
        for index, way in enumerate(ways):
            ours = [row for row in shown if (row["part"], row["contender"]) == (part, way)]
            ours.sort(key=lambda row: row.number("n"))
            xs = [row.number("n") for row in ours]
            low, middle, high = zip(*(r.spread("to_floor") for r in ours), strict=True) \
                if ours else ((), (), ())  # fmt: skip
            _line(axes, index, xs, middle, {"fused": "with the loss"}.get(way, way))
            axes.fill_between(xs, low, high, color=COLORS[index % len(COLORS)], alpha=0.25, lw=0)
        _both_logarithmic(axes, ticks)
        axes.axhline(1, color=GREY, linewidth=1)
        axes.set_title(f"{part}: time, flash attention = 1", loc="left", pad=4)
        axes.set_xlabel("n, tokens a prompt")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


PLOTS = {
    "train_step": (
        train_step, "Bars: time and memory of a step against eager attention matrices, by case"
    ),
    "scaling": (
        scaling, "Lines: seconds and most memory of a step over depth, length and prompts, by mode"
    ),
    "fused_attention": (
        fused_attention, "Lines: time of attention with the loss over that of attention, by n"
    ),
}  # fmt: skip
"""By question: the function from its rows, and the text for who does not see it."""
