"""Show rows as markdown: a few lines for each question, and every latest row as a table."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.rows import ORIGIN, Row, distinct, group, natural, slope

EAGER = "eager, one by one"
STEPS = ("ABFT, full", "ABFT, N = 2", "ABFT, local", "eager, padded", "E2E, packed", "E2E, TRL")
NOTHING = "-"


def figure(value: float) -> str:
    """Three digits."""
    if math.isnan(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """The median, and behind it the 20th and 80th percentile if they differ."""
    low, middle, high = (figure(value * scale) for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def seconds(*values: float) -> str:
    """One duration, or a spread, in the unit that suits the median."""
    unit, scale = ("s", 1) if values[len(values) // 2] >= 1 else ("ms", 1e3)
    text = spread(values, scale) if len(values) > 1 else figure(values[0] * scale)
    return text if text == NOTHING else f"{text} {unit}"


def mebibytes(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{figure(value / 2**20)} MiB"


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    header = list(header)
    rows = [header, ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in rows)


def origin(rows: list[Row], *more: str) -> str:
    """Where and when rows were measured."""
    named = {column: listed(distinct(rows, column)) for column in ("device", *more)}
    dates = sorted(distinct(rows, "date"))
    if "threads" in named and rows[0].kind == "CPU":
        named["threads"] += " thread" if named["threads"] == "1" else " threads"
    else:
        named.pop("threads", None)
    for column in named.keys() - {"device", "threads"}:
        named[column] = f"{column} {named[column]}"
    dates = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return ", ".join([*named.values(), dates])


def whole(text: str) -> str:
    """An integer's cell with commas."""
    return f"{float(text):,.0f}" if text else NOTHING


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    *most, last = [word or "nothing" for word in words]
    return f"{', '.join(most)} and {last}" if most else last


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def main_heads(rows: list[Row]) -> list[Row]:
    """Rows of the heads that most cases have."""
    [(heads, _)] = Counter(row["heads"] for row in rows).most_common(1)
    return [row for row in rows if row["heads"] == heads]


def of(rows: Iterable[Row], **cells: str) -> Row | None:
    """The row with these cells, if there is one."""
    found = [row for row in rows if all(row[name] == cell for name, cell in cells.items())]
    return found[-1] if found else None


# The summary of each question; empty where its rows are missing.


def train_step(rows: list[Row]) -> str:
    lines = []
    cases = group(rows, "model", "prompts", "tokens", "k", "dtype")
    for (model, prompts, tokens, k, dtype), ways in cases.items():
        eager = of(ways, contender=EAGER)
        if eager is None:
            continue
        many = "prompt" if prompts == "1" else "prompts"
        lines.append(
            [
                f"{model}, {prompts} {many}, {whole(tokens)} tokens, k = {k}, {dtype}",
                f"{seconds(eager.number('seconds_p50'))}<br>"
                f"{mebibytes(eager.number('peak_bytes'))}",
                *(_step(of(ways, contender=way)) for way in STEPS),
            ]
        )
    if not lines:
        return ""
    intro = paragraph(
        f"**A step** ({origin(rows, 'threads')}). The first line of a cell says how many times as "
        "fast a step is as with eager attention matrices, one prompt at a time, which is what the "
        "original does. The second line is its time divided by the floor: the matrix products that "
        "no packed pass can leave out. The third line is the most memory."
    )
    return f"{intro}\n\n{table(['', EAGER, *STEPS], lines)}"


def _step(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return (
        f"{spread(row.spread('speedup'))}<br>{figure(row.number('to_floor_p50'))} of floor<br>"
        f"{mebibytes(row.number('peak_bytes'))}"
    )


def fused_attention(rows: list[Row]) -> str:
    shown = main_heads(rows)
    lengths = sorted(distinct(shown, "n"), key=natural)
    names = {"fused": "with the loss", "eager": "eager, with the loss"}
    lines = []
    for part in ("forward", "forward and backward"):
        for way, name in names.items():
            found = [of(shown, n=n, part=part, contender=way) for n in lengths]
            if any(found):
                cells = [spread(row.spread("to_floor")) if row else NOTHING for row in found]
                lines.append([f"{name}, {part}", *cells])
    if not lines:
        return ""
    intro = paragraph(
        f"**Attention with the loss** ({origin(shown, 'threads')}, {shown[0]['dtype']}, heads "
        f"{shown[0]['heads']}): time divided by that of flash attention without the loss, for "
        "prompts of n tokens."
    )
    return f"{intro}\n\n{table(['n', *map(whole, lengths)], lines)}"


def last_row_loss(rows: list[Row]) -> str:
    shown = main_heads(rows)
    names = [name for name in distinct(shown, "contender") if name.startswith("forward, ")]
    ours = next((n for n in ("forward, triton", "forward, torch") if n in names), None)
    if ours is None:
        return ""
    lengths = sorted(distinct(shown, "n"), key=natural)
    parts = []
    for name in (ours, ours.replace("forward", "backward"), "forward, plain"):
        found = [of(shown, n=n, contender=name) for n in lengths]
        shares = [f"{row.number('bandwidth') * 100:.0f}" if row else NOTHING for row in found]
        parts.append(f"{name} {listed(shares)} %")
    return paragraph(
        f"**The loss of last rows alone** ({origin(shown, 'threads')}, {shown[0]['dtype']}, heads "
        f"{shown[0]['heads']}), share of a copy's bandwidth at n = "
        f"{listed(list(map(whole, lengths)))}: {'; '.join(parts)}."
    )


def scaling(rows: list[Row]) -> str:
    modes = distinct(rows, "contender")
    lines = []
    for (axis,), points in group(rows, "axis").items():
        cells = []
        for mode in modes:
            ours = [row for row in points if row["contender"] == mode]
            found = (slope_of(ours, column) for column in ("seconds_p50", "peak_bytes"))
            cells.append("; ".join(map(exponent, found)))
        lines.append([f"slope in {axis}", *cells])
    lines += _most_memory(rows, modes)
    intro = paragraph(
        f"**Scaling** ({origin(rows, 'threads')}): exponents of the power laws that fit seconds "
        "and most memory best. 1 is proportional and 0 is flat."
    )
    return f"{intro}\n\n{table(['seconds; memory', *modes], lines)}"


def exponent(value: float) -> str:
    """Two places behind the point, without a minus before zero."""
    return NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


def slope_of(rows: list[Row], column: str) -> float:
    """Exponent of a column's power law in the size; NaN of fewer than two sizes."""
    return slope([row.number("size") for row in rows], [row.number(column) for row in rows])


def _most_memory(rows: list[Row], modes: Sequence[str]) -> list[list[str]]:
    """A line of most memory over a plain forward's, in the deepest model that has one."""
    floors = [row for row in rows if (row["axis"], row["contender"]) == ("depth", "inference")]
    if not floors:
        return []
    floor = max(floors, key=lambda row: row.number("size"))
    case = {name: floor[name] for name in ("axis", "size", "model", "prompts", "n")}
    found = [of(rows, contender=mode, **case) for mode in modes]
    ratios = [r.number("peak_bytes") / floor.number("peak_bytes") if r else math.nan for r in found]
    return [[f"memory over inference's, {floor['size']} layers", *map(figure, ratios)]]


def large_models(rows: list[Row]) -> str:
    ways = distinct(rows, "contender")
    lines = []
    for (shape, layers, bits), found in group(rows, "shape", "layers", "bits").items():
        for cap in distinct(found, "cap_gb"):
            cells = [_pace(of(found, contender=way, cap_gb=cap)) for way in ways]
            name = f"{shape}, {layers} layers"
            name += f", {bits} bits" if bits != "0" else ""
            line = [name + (f", {cap} GB" if cap else ""), *cells]
            if set(cells) - {NOTHING, "does not fit"}:
                break
        lines.append(line)
    ratios = [row.number("step_planned") / row.number("step_measured") for row in rows]
    ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
    text = (
        f"**Large models** of random weights ({origin(rows)}): prompts a second, on a GPU under "
        "the smallest cap of memory that any of these fits in."
    )
    if ratios:
        ends = dict.fromkeys(map(figure, (min(ratios), max(ratios))))
        text += f" Memory of a step was planned at {' to '.join(ends)} of what it took."
    return f"{paragraph(text)}\n\n{table(['', *ways], lines)}"


def _pace(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return "does not fit" if row.get("fits") == "False" else figure(row.number("prompts_a_second"))


def evaluation(rows: list[Row]) -> str:
    return _speedups(
        [row for row in rows if row["contender"] == "packed"],
        "Evaluation",
        lambda row: f"StaICC's harness by {row['clock']} time",
        lambda row: f"{row['model']}, {row['dataset']}, {whole(row['prompts'])} prompts",
    )


def shared_prefix(rows: list[Row]) -> str:
    return _speedups(
        [row for row in rows if row["contender"] == "shared"],
        "Demonstrations computed once",
        lambda row: "whole prompts",
        lambda row: f"{row['dataset']}, {row['k']} demonstrations, {whole(row['queries'])} queries",
    )


def _speedups(
    rows: list[Row], title: str, other: Callable[[Row], str], case: Callable[[Row], str]
) -> str:
    """Say how many times as fast as another way, case by case."""
    if not rows:
        return ""
    intro = paragraph(
        f"**{title}** ({origin(rows, 'threads')}), how many times as fast as {other(rows[0])}:"
    )
    lines = [[case(row), spread(row.spread("speedup"))] for row in rows]
    return f"{intro}\n\n{table(['', 'speedup'], lines)}"


def end_to_end(rows: list[Row]) -> str:
    cases = distinct(rows, "case")
    lines = []
    for phase in distinct(rows, "phase"):
        found = (of(rows, case=case, phase=phase) for case in cases)
        cells = [seconds(row.number("seconds_p50")) if row else NOTHING for row in found]
        lines.append([phase, *cells])
    intro = paragraph(
        f"**`abft-fast train`** as a user runs it ({origin(rows, 'threads')}), by phase:"
    )
    return f"{intro}\n\n{table(['', *cases], lines)}"


SUMMARIES: dict[str, Callable[[list[Row]], str]] = {
    function.__name__: function
    for function in (
        train_step, fused_attention, last_row_loss, scaling, large_models, evaluation,
        shared_prefix, end_to_end,
    )
}  # fmt: skip
"""Functions from a question's rows, at least one, to their summary."""


def every_column(rows: list[Row]) -> str:
    """A table of all cells but where they come from; percentiles of one figure in one cell."""
    shown: dict[str, Callable[[Row], str]] = {}
    for column in rows[0]:
        name, _, percentile = column.rpartition("_")
        if f"{name}_p80" in rows[0] and percentile in ("p20", "p50", "p80"):
            show = _duration(name) if name == "seconds" else _ratio(name)
            shown.setdefault(name.replace("_", " "), show)
        elif column not in (*ORIGIN, "seed"):
            shown[column.replace("_", " ")] = _cell(column)
    devices = distinct(rows, "device")
    if len(devices) > 1:
        shown = {"device": lambda row: row["device"], **shown}
    return table(shown, [[show(row) for show in shown.values()] for row in rows])


def _duration(name: str) -> Callable[[Row], str]:
    return lambda row: seconds(*row.spread(name))


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: spread(row.spread(name))


def _cell(column: str) -> Callable[[Row], str]:
    if column.endswith(("_bytes", "_planned", "_measured")):
        return lambda row: mebibytes(row.number(column))
    if column == "seconds_p50":
        return lambda row: seconds(row.number(column))
    return lambda row: whole(row[column]) if row[column].isdecimal() else row[column]
