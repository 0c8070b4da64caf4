"""Draw what the analyses found; `plots.style` decides how pictures look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from abft_fast.analysis.attention import HeadMeans
from abft_fast.analysis.cmap import Effects
from abft_fast.analysis.path import PathEffects
from abft_fast.analysis.plane import Coefficients, Score
from abft_fast.analysis.shift import Shift
from abft_fast.plots import style

if TYPE_CHECKING:
    from abft_fast.commands.analyze.dcm import Learnt
    from abft_fast.commands.analyze.show import Token
    from abft_fast.options import CmapConfig

_WIDTH, _HEIGHT = 4.6, 3.6  # inches of one panel


def grid(rows: int, columns: int) -> tuple[Figure, NDArray]:
    """Return a figure with panels, (rows, columns), each with room for its labels and legend."""
    figure = Figure((_WIDTH * columns, _HEIGHT * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.75 / (_WIDTH * columns), right=1 - 0.2 / (_WIDTH * columns),
        bottom=0.55 / (_HEIGHT * rows), top=1 - 0.45 / (_HEIGHT * rows),
        wspace=0.27, hspace=0.35,
    )  # fmt: skip
    return figure, axes


_SIDES = {"before": "--", "after": "-"}


def attention(layers: Sequence[int], means: Mapping[str, HeadMeans], with_correct: bool) -> Figure:
    """Draw masses over layers before and after, and two heatmaps of the last side's heads."""
    figure, axes = grid(2, 2)
    figures = {"labels": "label_mass", "correct labels": "correct_mass"}
    if not with_correct:
        figures.pop("correct labels")
    _over_layers(axes[0][0], layers, means, figures, "attention (%)")
    others = {"first token": "first_token", "induction heads": "induction"}
    _over_layers(axes[0][1], layers, means, others, "attention, or prompts (%)")
    side, last = list(means.items())[-1]
    heatmap(
        axes[1][0], layers, 100 * last.above_threshold, f"S - T, {side} (percentage points)",
        center=True,
    )  # fmt: skip
    if with_correct:
        title = f"share of label mass on correct labels, {side} (%)"
        heatmap(axes[1][1], layers, 100 * last.correct_share, title)
    else:
        heatmap(axes[1][1], layers, 100 * last.label_mass, f"label mass S, {side} (%)")
    return figure


def _over_layers(
    axes: Axes,
    layers: Sequence[int],
    means: Mapping[str, HeadMeans],
    figures: Mapping[str, str],
    unit: str,
) -> None:
    for color, (title, name) in zip(style.COLORS, figures.items(), strict=False):
        for side, one in means.items():
            values = 100 * getattr(one, name).mean(axis=1)
            axes.plot(layers, values, _SIDES[side], color=color, label=f"{title}, {side}")
    _layer_axis(axes)
    axes.set_ylabel(f"{unit}, mean of heads")
    axes.set_ylim(bottom=0)
    legend_above(axes)


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_above(axes: Axes) -> None:
    """Put the legend above a panel, in two columns, where it hides no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def heatmap(
    axes: Axes,
    layers: Sequence[int],
    values: NDArray,
    title: str,
    *,
    center: bool = False,
    limit: float | None = None,
) -> None:
    """Draw a value for each layer (down) and head (to the right), with its scale.

    Args:
        axes: where.
        layers: indices of the layers.
        values: (layers, Hq).
        title: what is shown, with its unit.
        center: draw 0 in the neutral middle of a diverging scale.
        limit: largest absolute value of the scale; None for that of the values.
    """
    if center:
        most = limit or float(np.nanmax(np.abs(values), initial=0)) or 1.0
        options: dict[str, Any] = {"cmap": style.DIVERGING, "vmin": -most, "vmax": most}
    else:
        options = {"cmap": style.SEQUENTIAL, "vmin": 0, "vmax": limit}
    rows, heads = values.shape
    edges = np.arange(heads + 1) - 0.5, np.arange(rows + 1) - 0.5
    mesh = axes.pcolormesh(*edges, values, edgecolors="none", linewidth=0, **options)
    axes.set_yticks(
        range(rows)[:: max(rows // 10, 1)], list(map(str, layers[:: max(rows // 10, 1)]))
    )
    axes.set_xticks(range(heads)[:: max(heads // 10, 1)])
    axes.invert_yaxis()
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.outline.set_visible(False)


def show(shown: Mapping[str, Mapping[int, NDArray]], tokens: Sequence[Token]) -> Figure:
    """Draw the last row of every head: a panel a layer and model, tokens to the right as text."""
    panels = [
        (layer, name, by_layer[layer])
        for layer in next(iter(shown.values()))
        for name, by_layer in shown.items()
    ]
    heads = len(panels[0][2])
    width, height = 1.4 + 0.13 * len(tokens), 1.25 + 0.16 * heads
    figure = Figure((width, height * len(panels)))
    axes = figure.subplots(len(panels), 1, squeeze=False)
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.8 / width, hspace=1.25 / (0.16 * heads),
        bottom=1 / (height * len(panels)), top=1 - 0.25 / (height * len(panels)),
    )  # fmt: skip
    colors = {"right": style.COLORS[2], "wrong": style.COLORS[3], "asked": style.COLORS[0]}
    edges = np.arange(len(tokens) + 1) - 0.5, np.arange(heads + 1) - 0.5
    for axis, (layer, name, values) in zip(axes[:, 0], panels, strict=True):
        scale = PowerNorm(0.5, 0, 1)
        mesh = axis.pcolormesh(*edges, values, cmap=style.SEQUENTIAL, norm=scale, linewidth=0)
        texts = [token.shown.replace("$", r"\$") for token in tokens]
        axis.set_xticks(range(len(tokens)), texts, rotation=90, fontsize=6)
        for label, token in zip(axis.get_xticklabels(), tokens, strict=True):
            label.set_color(colors.get(token.mark, style.GREY))
        axis.set_yticks(range(0, heads, max(heads // 8, 1)))
        axis.invert_yaxis()
        axis.set_ylabel("head")
        axis.set_title(f"layer {layer}, {name}", loc="left")
        bar = figure.colorbar(
            mesh,
            cax=axis.inset_axes((1.0 + 0.15 / width, 0, 0.12 / width, 1)),
            ticks=[0, 0.1, 0.5, 1],
        )
        bar.set_label("attention")
        bar.outline.set_visible(False)
    return figure


def shift(found: Sequence[Shift]) -> Figure:
    """Draw the change of W_Q and W_K over layers, absolute and relative, with dots for heads."""
    figure, axes = grid(1, 2)
    for color, projection in zip(style.COLORS, ("q", "k"), strict=False):
        own = [each for each in found if each.projection == projection]
        for axis, relative in zip(axes[0], (False, True), strict=True):
            sizes = [100 * each.change / each.weight if relative else each.change for each in own]
            whole = [
                (each.layer, size)
                for each, size in zip(own, sizes, strict=True)
                if each.head is None
            ]
            heads = [
                (each.layer, size)
                for each, size in zip(own, sizes, strict=True)
                if each.head is not None
            ]
            axis.plot(
                *zip(*whole, strict=True), color=color, label=f"W_{projection.upper()}, layer"
            )
            axis.scatter(
                *zip(*heads, strict=True), color=color, s=6, alpha=0.5, linewidths=0,
                label=f"W_{projection.upper()}, heads",
            )  # fmt: skip
    for axis, title in zip(axes[0], ("‖ΔW‖ (Frobenius norm)", "‖ΔW‖ / ‖W‖ (%)"), strict=True):
        _layer_axis(axis)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        legend_above(axis)
    return figure


def cmap(
    effects: Effects, curve: Effects | None, layers: Sequence[int], heads: int, config: CmapConfig
) -> Figure:
    """Draw what each head or layer alone recovers, and the best n heads against random ones.

    Without single heads or layers, there is one panel, of the groups.
    """
    values = np.full((len(layers), heads), np.nan)
    by_layer = np.full((len(layers), 1), np.nan)
    for way, (odds, _) in zip(effects.ways, effects.recovered(), strict=True):
        if odds.share is None or not way.heads:
            continue
        if way.group == "head":
            values[next(iter(way.heads))] = 100 * odds.share
        elif way.group == "layer":
            by_layer[min(way.heads)[0]] = 100 * odds.share
    direction = "base heads put into the tuned model" if config.reverse else ""
    title = f"log-odds recovered by one head's {config.what} (%)"
    groups = {way.group for way in effects.ways}
    figure, axes = grid(1, 1 if groups.isdisjoint({"head", "layer"}) else 2)
    if "head" in groups:
        heatmap(axes[0][0], layers, values, title, center=True)
    elif "layer" in groups:
        axes[0][0].plot(layers, by_layer[:, 0], "o-", color=style.COLORS[0])
        axes[0][0].set_xlabel("layer")
        axes[0][0].set_ylabel(f"log-odds recovered by a layer's {config.what} (%)")
    if curve is not None:
        curve_over_heads(axes[0][-1], curve, "heads patched together")
    else:
        _bars(axes[0][-1], effects)
    figure.suptitle(direction)
    return figure


def restrict(effects: Effects) -> Figure:
    """Draw what changed weights of the best n heads keep of the gain, against random ones."""
    figure, axes = grid(1, 1)
    curve_over_heads(axes[0][0], effects, "heads whose change of weights is kept")
    return figure


def curve_over_heads(axes: Axes, effects: Effects, what: str) -> None:
    """Draw recovered log-odds over the number of heads, with 95 % intervals of the best ones."""
    for color, group, title in zip(
        style.COLORS, ("top", "random", "chosen"),
        ("the best n", "random n (dots: draws)", "chosen heads"), strict=False,
    ):  # fmt: skip
        by_count: dict[int, list[float]] = {}
        for way, (odds, _) in zip(effects.ways, effects.recovered(), strict=True):
            if way.group != group or odds.share is None:
                continue
            count, share = len(way.heads or ()), 100 * odds.share
            by_count.setdefault(count, []).append(share)
            if group == "random":
                axes.scatter(count, share, color=color, s=6, alpha=0.5, linewidths=0)
            elif odds.low is not None and odds.high is not None:
                axes.vlines(count, 100 * odds.low, 100 * odds.high, color=color, alpha=0.5)
        if by_count:
            means = [sum(shares) / len(shares) for shares in by_count.values()]
            axes.plot(
                list(by_count), means, "o-" if group != "random" else "--", color=color, label=title
            )
    axes.axhline(0, color=style.GREY, linewidth=0.6)
    axes.axhline(100, color=style.GREY, linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_xlabel(what)
    axes.set_ylabel("log-odds recovered (%)")
    if axes.get_legend_handles_labels()[0]:
        legend_above(axes)


def _bars(axes: Axes, effects: Effects) -> None:
    """Draw what each group of heads recovers, other than single heads and layers."""
    rows = [
        (way.group, odds)
        for way, (odds, _) in zip(effects.ways, effects.recovered(), strict=True)
        if way.group not in ("head", "layer", "none") and odds.share is not None
    ]
    for place, (group, odds) in enumerate(rows):
        assert odds.share is not None
        axes.barh(place, 100 * odds.share, color=style.COLORS[0], height=0.6)
        if odds.low is not None and odds.high is not None:
            axes.hlines(place, 100 * odds.low, 100 * odds.high, color=style.GREY)
        axes.text(0, place - 0.4, group)
    axes.set_yticks([])
    axes.set_xlabel("log-odds recovered (%)")


def plane(
    parts: Mapping[str, Sequence[Coefficients]], scores: Mapping[Coefficients, Score]
) -> Figure:
    """Draw accuracy over the plane with its three models, and over the path and the ray."""
    figure, axes = grid(2, 2)
    figure.subplots_adjust(wspace=0.42, right=0.94)
    xs, ys = (sorted({point[i] for point in parts["grid"]}) for i in (0, 1))
    for axis, name, factor, title in (
        (axes[0][0], "accuracy", 100, "accuracy (%)"), (axes[0][1], "loss", 1, "loss (nats)"),
    ):  # fmt: skip
        values = [[factor * getattr(scores[x, y], name) for x in xs] for y in ys]
        filled = axis.contourf(xs, ys, values, levels=12, cmap=style.SEQUENTIAL)
        for x, y, text in ((0, 0, "base"), (1, 0, "E"), (0, 1, "A")):
            axis.plot(x, y, "o", color="white", markeredgecolor="black", markersize=5)
            axis.annotate(
                text, (x, y), xytext=(5, 4), textcoords="offset points", color="white",
                path_effects=[withStroke(linewidth=2, foreground="black")],
            )  # fmt: skip
        axis.set_xlabel("coefficient of E")
        axis.set_ylabel("coefficient of A")
        axis.set_title(title)
        axis.figure.colorbar(filled, ax=axis).outline.set_visible(False)
    for axis, name, title in (
        (axes[1][0], "path", "from E (0) to A (1)"),
        (axes[1][1], "ray", "from the base (0) through A (1)"),
    ):
        _along(axis, [scores[point] for point in parts[name]], [p[1] for p in parts[name]], title)
    return figure


def _along(axes: Axes, scores: Sequence[Score], at: Sequence[float], title: str) -> None:
    axes.plot(at, [100 * score.accuracy for score in scores], "o-", color=style.COLORS[0])
    axes.set_xlabel(title)
    axes.set_ylabel("accuracy (%)", color=style.COLORS[0])
    other = axes.twinx()
    other.plot(at, [score.loss for score in scores], "s--", color=style.COLORS[1])
    other.set_ylabel("loss (nats)", color=style.COLORS[1])
    other.spines["right"].set_visible(True)


def paths(layers: Sequence[int], means: Mapping[str, PathEffects]) -> Figure:
    """Draw each path's effects as a signed heatmap, a row of panels a model, one scale a path."""
    titles = {
        "direct": "direct", "queries": "by induction heads' queries",
        "values": "by values at labels",
    }  # fmt: skip
    figure, axes = grid(len(means), len(titles))
    for column, (name, title) in enumerate(titles.items()):
        values = {side: getattr(effects, name).numpy() for side, effects in means.items()}
        limit = max(float(np.abs(each).max()) for each in values.values()) or 1.0
        for row, (side, each) in enumerate(values.items()):
            shown = f"{title}, {side} (log-odds)"
            heatmap(axes[row][column], layers, each, shown, center=True, limit=limit)
    return figure


def masks(layers: Sequence[int], learnt: Mapping[tuple[str, str], Learnt]) -> Figure:
    """Draw each desideratum's mask as a heatmap, a row of panels a model."""
    names, sides = (list(dict.fromkeys(key[i] for key in learnt)) for i in (0, 1))
    figure, axes = grid(len(sides), len(names))
    for (name, side), one in learnt.items():
        title = f"mask of {name}, {side}: {one.chosen.sum()} heads"
        axis = axes[sides.index(side)][names.index(name)]
        heatmap(axis, layers, one.mask, title, limit=1.0)
    return figure
