"""Make the page of a report: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

from abft_fast.evaluation import titles
from abft_fast.evaluation.intervals import Interval
from abft_fast.options.base import flag
from abft_fast.reporting.pictures import pictures
from abft_fast.reporting.run_data import SIDES, RunData
from abft_fast.reporting.statistics import confusion


def render(runs: Sequence[RunData]) -> str:
    """Return the page of the tests of one or several runs."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = titles.percent
    environment.filters["interval"] = _interval
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    return template.render(
        title="abft-fast: " + ", ".join(dict.fromkeys(run.folder.name for run in runs)),
        runs=[_view(run, f"r{index}") for index, run in enumerate(runs)],
        sides=SIDES,
    )


def _view(run: RunData, prefix: str) -> dict[str, Any]:
    """Return what the template shows of a run."""
    seconds = sum(row["seconds"] for row in run.steps)
    tokens = sum(row["tokens_per_second"] * row["seconds"] for row in run.steps)
    return {
        "id": prefix,
        "name": run.name,
        "options": run.options,
        "shown_options": {
            flag(name): value for name, value in run.options.items() if value not in (None, False)
        },
        "versions": {
            name: value for name, value in run.environment.get("versions", {}).items() if value
        },
        "environment": run.environment,
        "accuracy": {side: result.accuracy for side, result in run.sides.items()},
        "gain": run.gain,
        "metrics": _metrics(run),
        "pictures": pictures(run, prefix),
        "confusion": {side: _confusion(run, side) for side in run.sides},
        "prompts": _prompts(run),
        "steps": len(run.steps),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_memory": max((row["peak_memory_bytes"] for row in run.steps), default=0),
    }


def _metrics(run: RunData) -> dict[str, dict[str, list[str]]]:
    """Return the text of each figure before and after, by dataset and title."""
    tables: dict[str, dict[str, list[str]]] = {}
    for by_side in (run.evaluation, run.attention):
        for column, side in enumerate(SIDES):
            for dataset, figures in by_side.get(side, {}).items():
                for title, text in titles.rows_of(figures).items():
                    row = tables.setdefault(dataset, {}).setdefault(title, ["", ""])
                    row[column] = text
    return tables


def _confusion(run: RunData, side: str) -> dict[str, Any]:
    result = run.sides[side]
    words = result.details["label_words"]
    table = confusion(result.labels, result.answers, len(words))
    shares = [[cell / max(sum(row), 1) for cell in row] for row in table]
    rows = [
        (word, list(zip(cells, parts, strict=True)))
        for word, cells, parts in zip(words, table, shares, strict=True)
    ]
    return {"words": words, "rows": rows}


def _prompts(run: RunData) -> list[dict[str, Any]]:
    """Return the prompts whose last rows are known, each side's attention on one scale."""
    if not run.sides:
        return []
    first = next(iter(run.sides.values()))
    shown = []
    for place, prompt in enumerate(first.details["prompts"]):
        rows, answers = {}, {}
        for side, result in run.sides.items():
            other = result.details["prompts"][place]
            if other["index"] == prompt["index"] and prompt["index"] in result.indices:
                rows[side] = other["attention"]
                at = result.indices.index(prompt["index"])
                answers[side] = result.answers[at]
        if not rows:
            continue
        top = max(max(row) for row in rows.values()) or 1.0
        labels = dict(zip(prompt["label_positions"], prompt["label_is_correct"], strict=True))
        words = first.details["label_words"]
        truth = first.details["labels"][prompt["index"]]
        shown.append(
            {
                "query": _query(prompt["tokens"], max(labels, default=-1)),
                "truth": words[truth],
                "answers": {side: (words[a], a == truth) for side, a in answers.items()},
                "rows": {
                    side: [
                        (token, value, value / top, labels.get(i))
                        for i, (token, value) in enumerate(zip(prompt["tokens"], row, strict=True))
                    ]
                    for side, row in rows.items()
                },
            }
        )
    return shown


def _query(tokens: Sequence[str], last_label: int) -> str:
    """Return the text after the last demonstration, shortened."""
    text = " ".join("".join(tokens[last_label + 1 :]).split())
    return text if len(text) <= 90 else f"{text[:60]} … {text[-28:]}"


def _interval(interval: Interval, sign: str = "") -> str:
    low, high = (f"{100 * value:{sign}.1f}" for value in (interval.low, interval.high))
    return f"{low} to {high}"
