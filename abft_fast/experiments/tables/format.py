"""Format a table as markdown or as LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Callable

from abft_fast.experiments.tables.types import Entry, Table

_DEVIATION = "sample standard deviation over seeds"
_MISSING, _DOES_NOT_APPLY = "missing", "-"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "[": "{[}", "*": "{*}",  # after a row's end they would be its arguments
}  # fmt: skip
_OF_LATEX = re.compile(f"[{re.escape(''.join(_LATEX))}]")
_OF_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)")


def to_markdown(table: Table) -> str:
    """Format as markdown: percentages with two decimals, `±` and the deviation, the best bold.

    A line below says what the deviation is.
    """
    alignments = ["---" if _is_text(table, i) else "---:" for i in range(len(table.titles))]
    lines = [[*map(_markdown, table.titles)], alignments]
    lines += [[_markdown(value) for value in line] for line in _models_named_once(table)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + (f"\n±: {_DEVIATION}.\n" if _has_deviation(table) else "")


def to_latex(table: Table) -> str:
    """Format as LaTeX: the deviation is a subscript, and a rule separates models.

    A comment below says what the deviation is.
    """
    columns = "".join("l" if _is_text(table, i) else "r" for i in range(len(table.titles)))
    lines = [r"\begin{tabular}{" + columns + "}", r"\toprule"]
    lines += [" & ".join(map(_latex, table.titles)) + r" \\", r"\midrule"]
    for number, line in enumerate(_models_named_once(table)):
        if number and line[0]:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(_latex, line)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if _has_deviation(table):
        lines.append(f"% Subscripts: {_DEVIATION}.")
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": to_markdown, "latex": to_latex}
"""Functions that format a table, by the value of `--format`."""


def _has_deviation(table: Table) -> bool:
    entries = (value for line in table.lines for value in line if isinstance(value, Entry))
    return any(entry.mean is not None and entry.deviation is not None for entry in entries)


def _is_text(table: Table, column: int) -> bool:
    return all(isinstance(line[column], str) for line in table.lines)


def _models_named_once(table: Table) -> list[list[str | Entry]]:
    """Return the lines with the model's name left out where the line above has it too."""
    before, lines = None, []
    for line in table.lines:
        lines.append(["" if line[0] == before else line[0], *line[1:]])
        before = line[0]
    return lines


def _markdown(value: str | Entry) -> str:
    if isinstance(value, str):
        return _escaped_markdown(value)
    if value.mean is None:
        return _MISSING if value.applies else _DOES_NOT_APPLY
    text = _number(value.mean, value.unit, times="\N{MULTIPLICATION SIGN}")
    if value.best:
        text = f"**{text}**"
    if value.deviation is not None:
        text += f" ± {100 * value.deviation:.2f}"
    return text + (f" ({_escaped_markdown(value.note)})" if value.note else "")


def _latex(value: str | Entry) -> str:
    if isinstance(value, str):
        return _escaped_latex(value)
    if value.mean is None:
        return _MISSING if value.applies else _DOES_NOT_APPLY
    text = _number(value.mean, value.unit, times=r"$\times$")
    if value.best:
        text = rf"\textbf{{{text}}}"
    if value.deviation is not None:
        text += f"$_{{{100 * value.deviation:.2f}}}$"
    return text + (f" ({_escaped_latex(value.note)})" if value.note else "")


def _number(value: float, unit: str, times: str) -> str:
    """Format a share as a percentage, a ratio with the `times` sign, a count as `2.5M`."""
    if unit == "%":
        return f"{100 * value:.2f}"
    if unit == "x":
        return f"{value:.1f}{times}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def _escaped_markdown(text: str) -> str:
    return _OF_MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def _escaped_latex(text: str) -> str:
    return _OF_LATEX.sub(lambda match: _LATEX[match[0]], " ".join(text.split()))
