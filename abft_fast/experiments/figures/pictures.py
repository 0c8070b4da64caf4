"""Draw the rows of a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from abft_fast.errors import UserError
from abft_fast.evaluation import titles
from abft_fast.experiments.figures.rows import Row
from abft_fast.plots import style

_COLUMNS = 4  # panels beside one another
_SHARES = {**titles.SHARES, "correct_share_above_chance": "correct share above chance"}
_NAMES = {
    "induction_heads": "induction heads a prompt",
    "attention_loss": "ABFT's loss of a batch",
    "samples": "training prompts seen",
    "step": "step",
    "train_samples": "training prompts",
    "k": "demonstrations",
}


def heads(rows: Sequence[Row], metric: str) -> Figure:
    """Draw induction heads over samples: a panel a dataset, a line a setting, a band of seeds."""
    return _panels(rows, "samples", ["induction_heads"])


def losses(rows: Sequence[Row], metric: str) -> Figure:
    """Draw the loss of ABFT above the correct share, over steps."""
    return _panels(rows, "step", ["attention_loss", "correct_share_above_chance"])


def data(rows: Sequence[Row], metric: str) -> Figure:
    """Draw scores over the number of training prompts; what is not trained is a level."""
    return _panels(rows, "train_samples", [metric], logarithmic=True)


def demonstrations(rows: Sequence[Row], metric: str) -> Figure:
    """Draw scores over the number of demonstrations."""
    return _panels(rows, "k", [metric])


def factors(rows: Sequence[Row], metric: str) -> Figure:
    """Draw a heatmap of scores over A0 and B0 for each setting and control of A, on one scale.

    Scores are means over datasets. A cell that lacks one of them stays empty.

    Raises:
        UserError: every cell lacks a dataset.
    """
    datasets = _distinct(rows, "dataset")
    shown = list(dict.fromkeys((row["setting"], row["adaptation"]) for row in rows))
    has_settings = len({setting for setting, _ in shown}) > 1
    penalties, rewards = (sorted(_distinct(rows, name)) for name in ("penalty", "reward"))
    width = 0.9 + len(shown) * (0.75 * len(rewards) + 0.9)
    height = 1.1 + 0.42 * len(penalties)
    figure = Figure((width, height))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, top=1 - 0.4 / height, bottom=0.55 / height,
        wspace=0.75 / (0.75 * len(rewards)),
    )  # fmt: skip
    means = {
        (*panel, a, b): fmean(map(fmean, found))
        for panel in shown
        for a in penalties
        for b in rewards
        if all(
            found := [
                _values(rows, metric, **_panel(panel), penalty=a, reward=b, dataset=name)
                for name in datasets
            ]
        )
    }
    if not means:
        raise UserError(
            f"figure factors: no A and B was tested on all of {len(datasets)} datasets: let the "
            "sweep finish, or name the runs of one dataset"
        )
    low, high = min(means.values()), max(means.values())
    for axes, panel in zip(panels, shown, strict=True):
        setting, control = panel
        grid = [[means.get((*panel, a, b), float("nan")) for b in rewards] for a in penalties]
        axes.pcolormesh(grid, cmap=style.SEQUENTIAL, vmin=low, vmax=high)
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                is_bright = value - low > 0.55 * (high - low)
                text = "" if math.isnan(value) else f"{_factor(metric) * value:.1f}"
                axes.text(
                    j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8,
                    color="black" if is_bright else "white",
                )  # fmt: skip
        axes.set_xticks([j + 0.5 for j in range(len(rewards))], [f"{b:g}" for b in rewards])
        axes.set_yticks([i + 0.5 for i in range(len(penalties))], [f"{a:g}" for a in penalties])
        axes.set(xlabel="B, reward", ylabel="A at the start, penalty")
        title = f"control of A: {control}; {_name(metric)}"
        if len(datasets) > 1:
            title += f", mean of {len(datasets)} datasets"
        axes.set_title(f"{setting}\n{title}" if has_settings else title, loc="left")
    return figure


def _panel(panel: tuple[str, str]) -> dict[str, str]:
    return dict(zip(("setting", "adaptation"), panel, strict=True))


def unseen(rows: Sequence[Row], metric: str) -> Figure:
    """Draw bars: a panel a dataset, a group a setting, a bar a type of test."""
    datasets, settings = _distinct(rows, "dataset"), _distinct(rows, "setting")
    tests = _distinct(rows, "test_type")
    figure, grid = _grid(len(datasets), 1)
    for axes, dataset in zip(grid[0], datasets, strict=True):
        for index, test in enumerate(tests):
            places, middles, spreads = [], [], []
            for place, setting in enumerate(settings):
                found = _values(rows, metric, dataset=dataset, setting=setting, test_type=test)
                if found:
                    mean, deviation = _mean(found, _factor(metric))
                    places.append(place + (index - (len(tests) - 1) / 2) * 0.38)
                    middles.append(mean)
                    spreads.append(deviation)
            if places:
                axes.bar(
                    places, middles, 0.36, yerr=spreads, color=style.COLORS[index], label=test,
                    ecolor=style.GREY,
                )  # fmt: skip
        axes.set_xticks(range(len(settings)), [_wrapped(name) for name in settings])
        axes.set(ylabel=_name(metric))
        axes.set_title(dataset, loc="left")
        axes.grid(True, axis="y", linewidth=0.6)
    _legend(figure, rows, Line2D([], [], color=style.GREY))
    return figure


PICTURES: dict[str, Callable[[Sequence[Row], str], Figure]] = {
    "heads": heads,
    "factors": factors,
    "data": data,
    "unseen": unseen,
    "demonstrations": demonstrations,
    "losses": losses,
}
"""By the name of the figure."""


def _panels(
    rows: Sequence[Row], x: str, measures: Sequence[str], *, logarithmic: bool = False
) -> Figure:
    """Draw a row of panels for each measure, a panel a dataset, a line a setting."""
    datasets, settings = _distinct(rows, "dataset"), _distinct(rows, "setting")
    figure, grid = _grid(len(datasets), len(measures))
    for line, measure in zip(grid, measures, strict=True):
        for axes, dataset in zip(line, datasets, strict=True):
            for index, setting in enumerate(settings):
                own = [r for r in rows if (r["dataset"], r["setting"]) == (dataset, setting)]
                _draw_line(axes, index, setting, own, x, measure)
            ticks = sorted({row[x] for row in rows if row[x] is not None})
            if logarithmic and ticks:
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set(xlabel=_name(x), ylabel=_name(measure))
            axes.set_title(dataset, loc="left")
            axes.grid(True, linewidth=0.6)
    _legend(figure, rows, Patch(color=style.GREY, alpha=0.2, linewidth=0))
    return figure


def _draw_line(
    axes: Axes, index: int, setting: str, rows: Sequence[Row], x: str, measure: str
) -> None:
    """Draw the mean over seeds with a band of one standard deviation; a level where x is unset."""
    style_of_line: dict[str, Any] = {
        "color": style.COLORS[index % len(style.COLORS)],
        "linestyle": "-" if index < len(style.COLORS) else "--",
        "label": setting,
    }
    places = sorted({row[x] for row in rows if row[x] is not None and row[measure] is not None})
    if not places:
        if level := _values(rows, measure):
            axes.axhline(_mean(level, _factor(measure))[0], **style_of_line, linewidth=1)
        return
    found = [_mean(_values(rows, measure, **{x: place}), _factor(measure)) for place in places]
    middles = [mean for mean, _ in found]
    axes.plot(
        places, middles, **style_of_line, marker="o" if len(places) < 12 else "", markersize=3
    )
    axes.fill_between(
        places,
        [mean - deviation for mean, deviation in found],
        [mean + deviation for mean, deviation in found],
        color=style_of_line["color"], alpha=0.2, linewidth=0,
    )  # fmt: skip


def _grid(datasets: int, measures: int) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a list of panels for each measure, at most four beside one another."""
    columns = min(datasets, _COLUMNS)
    lines = math.ceil(datasets / columns) * measures
    width, height = max(3.3 * columns, 4.4), 2.5 * lines + 0.5
    figure = Figure((width, height))
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.15 / width, top=1 - 0.75 / height, bottom=0.5 / height,
        wspace=0.32, hspace=0.45,
    )  # fmt: skip
    flat = list(axes.flat)
    a_measure = len(flat) // measures
    for start in range(0, len(flat), a_measure):
        for unused in flat[start + datasets : start + a_measure]:
            unused.set_visible(False)
    return figure, [flat[i : i + datasets] for i in range(0, len(flat), a_measure)]


def _legend(figure: Figure, rows: Sequence[Row], deviation: Artist) -> None:
    """Name what any panel shows and, where there are several seeds, what `deviation` stands for."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len({row["seed"] for row in rows} - {None}) > 1:
        found["± s.d. over seeds"] = deviation
    columns = max(1, int(figure.get_figwidth() // 2.2))
    figure.legend(found.values(), found, ncols=columns, loc="upper left", bbox_to_anchor=(0.0, 1.0))


def _distinct(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _values(rows: Sequence[Row], measure: str, **wanted: Any) -> list[float]:
    """Return a value for each seed: of several runs of a seed, their mean."""
    by_seed: dict[Any, list[float]] = {}
    for row in rows:
        if row[measure] is not None and all(row[name] == value for name, value in wanted.items()):
            by_seed.setdefault(row["seed"], []).append(row[measure])
    return [fmean(values) for values in by_seed.values()]


def _mean(values: Sequence[float], factor: float) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 of one value."""
    scaled = [factor * value for value in values]
    return fmean(scaled), stdev(scaled) if len(scaled) > 1 else 0.0


def _factor(measure: str) -> float:
    return 100.0 if measure in _SHARES else 1.0


def _name(measure: str) -> str:
    if measure in _SHARES:
        return f"{_SHARES[measure]} (%)"
    return _NAMES.get(measure, measure)


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n")
