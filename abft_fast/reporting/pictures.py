"""The pictures of a report, each as SVG that stands in the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from abft_fast.plots import style
from abft_fast.reporting.run_data import RunData
from abft_fast.reporting.statistics import calibration

_SIDES = {"before": "--", "after": "-"}
_IDS = re.compile(r'(\bid="|url\(#|href="#)')


def pictures(run: RunData, prefix: str) -> dict[str, str]:
    """Return the pictures that a run has data for, by title.

    Args:
        run: the run.
        prefix: what makes the pictures' ids unique in the page.
    """
    drawn: dict[str, str] = {}
    with style.applied():
        for title, figure in _figures(run).items():
            text = style.svg(figure)
            text = text[text.index("<svg") :]
            drawn[title] = _IDS.sub(rf"\g<1>{prefix}-{len(drawn)}-", text)
    return drawn


def _figures(run: RunData) -> dict[str, Figure]:
    figures = {}
    if run.steps:
        figures["Training loss"] = _over_steps(run.steps, "loss", "loss of a batch")
        if any(row.get("attention_loss") is not None for row in run.steps):
            title = "Loss of ABFT at the initial A and B"
            figures[title] = _over_steps(run.steps, "attention_loss", "loss of a batch")
        figure = _over_steps(run.steps, "induction_heads", "heads a prompt")
        most = max(row["induction_heads"] for row in run.steps)
        figure.axes[0].set_ylim(0, 1.08 * most or 1)
        figures["Induction heads over steps"] = figure
        title = "Label mass on correct labels over steps"
        figures[title] = _over_steps(
            run.steps, "correct_share_above_chance", "above chance (%)", 100
        )
    if run.sides:
        figures["Attention on labels by layer"] = _by_layer(run)
        figures["Calibration"] = _calibration(run)
    return figures


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure((4.6, 2.9))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.14, right=0.97, top=0.95, bottom=0.17)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(True, linewidth=0.6)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend above the axes."""
    figure.subplots_adjust(top=0.82)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, loc="upper left", bbox_to_anchor=(0.12, 1.0))


def _over_steps(steps: Sequence[dict[str, Any]], name: str, unit: str, factor: float = 1) -> Figure:
    figure, axes = _panel("step", unit)
    points = [(row["step"], factor * row[name]) for row in steps if row.get(name) is not None]
    axes.plot([step for step, _ in points], [value for _, value in points], color=style.COLORS[0])
    return figure


def _by_layer(run: RunData) -> Figure:
    figure, axes = _panel("layer with attention", "attention (%), mean of heads")
    names = {"all labels": "label_mass", "correct ones": "correct_mass"}
    for side, dash in _SIDES.items():
        if side not in run.sides:
            continue
        layers = run.sides[side].details["layers"]
        for color, marker, (title, name) in zip(style.COLORS, "os", names.items(), strict=False):
            values = [100 * value for value in layers[name]]
            axes.plot(
                range(len(values)), values, color=color, linestyle=dash, marker=marker,
                markersize=3, label=f"{title}, {side}",
            )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    return figure


def _calibration(run: RunData) -> Figure:
    figure, axes = _panel("confidence (%)", "accuracy (%)")
    axes.plot([0, 100], [0, 100], color=style.GREY, linewidth=0.8)
    for color, (side, dash) in zip(style.COLORS, _SIDES.items(), strict=False):
        if side in run.sides:
            result = run.sides[side]
            bins = calibration(result.confidences, result.right)
            xs, ys = (
                [100 * value for value in column] for column in list(zip(*bins, strict=True))[1:]
            )
            sizes = [8 + 150 * each.prompts / len(result.indices) for each in bins]
            axes.plot(xs, ys, color=color, linestyle=dash, label=side, clip_on=False)
            axes.scatter(xs, ys, sizes, color=color, clip_on=False, linewidths=0, alpha=0.8)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    _legend(figure, axes)
    return figure
