"""A table as markdown or as LaTeX (booktabs)."""

from __future__ import annotations

import re

from abft_fast.experiments.tables.collect import Entry, Table

_MISSING = "missing"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def to_markdown(table: Table) -> str:
    """Percent with two decimals; the best is bold, a deviation follows a plus-minus sign."""
    aligned = ["---" if _is_text(table, i) else "---:" for i in range(len(table.titles))]
    lines = [table.titles, aligned]
    lines += [[_markdown(value) for value in line] for line in _without_repeats(table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(table: Table) -> str:
    """The same, the deviation as a subscript, a rule between models."""
    columns = "".join("l" if _is_text(table, i) else "r" for i in range(len(table.titles)))
    lines = [r"\begin{tabular}{" + columns + "}", r"\toprule"]
    lines += [" & ".join(map(_escaped, table.titles)) + r" \\", r"\midrule"]
    for number, line in enumerate(_without_repeats(table)):
        if number and line[0]:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(_latex, line)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


FORMATS = {"markdown": to_markdown, "latex": to_latex}


def _is_text(table: Table, column: int) -> bool:
    return all(isinstance(line[column], str) for line in table.lines)


def _without_repeats(table: Table) -> list[list[str | Entry]]:
    """Each model named once."""
    before, lines = None, []
    for line in table.lines:
        lines.append(["" if line[0] == before else line[0], *line[1:]])
        before = line[0]
    return lines


def _markdown(value: str | Entry) -> str:
    if isinstance(value, str):
        return value.replace("|", r"\|")
    if value.mean is None:
        return _MISSING if value.applies else "-"
    text = f"**{_number(value)}**" if value.best else _number(value)
    text = text.replace("x", "\N{MULTIPLICATION SIGN}") if value.unit == "x" else text
    text += f" ± {100 * value.deviation:.2f}" if value.deviation is not None else ""
    return text + (f" ({value.note})" if value.note else "")


def _latex(value: str | Entry) -> str:
    if isinstance(value, str):
        return _escaped(value)
    if value.mean is None:
        return _MISSING if value.applies else "-"
    text = _number(value)
    text = text.replace("x", r"$\times$") if value.unit == "x" else text
    text = rf"\textbf{{{text}}}" if value.best else text
    text += f"$_{{{100 * value.deviation:.2f}}}$" if value.deviation is not None else ""
    return text + (f" ({_escaped(value.note)})" if value.note else "")


def _number(entry: Entry) -> str:
    if entry.unit == "%":
        return f"{100 * entry.mean:.2f}"
    if entry.unit == "x":
        return f"{entry.mean:.1f}x"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if entry.mean >= size:
            return f"{entry.mean / size:.1f}{letter}"
    return f"{entry.mean:.0f}"


def _escaped(text: str) -> str:
    return re.sub(r"[\\&%$#_{}~^]", lambda found: _LATEX[found[0]], text)
