"""Write the table of docs/reference/options.md: `python -m abft_fast.cli.options_table FILE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from abft_fast.cli.app import default_text, values_text
from abft_fast.options import (
    EvalConfig,
    MergeConfig,
    PlanConfig,
    PredictConfig,
    SweepConfig,
    TableConfig,
    TrainConfig,
    flag,
    is_positional,
)

_VERBS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "plan": PlanConfig,
    "predict": PredictConfig,
    "merge": MergeConfig,
    "sweep": SweepConfig,
    "table": TableConfig,
}
_BEGIN, _END = "<!-- options: begin -->", "<!-- options: end -->"


def table() -> str:
    """A markdown table of every option of every verb."""
    lines = ["| option | value | default | what it does | verbs |", "|---|---|---|---|---|"]
    verbs_of: dict[tuple[str, str], list[str]] = {}
    fields = {}
    for verb, config in _VERBS.items():
        for name, field in config.model_fields.items():
            verbs_of.setdefault((name, field.description), []).append(verb)
            fields.setdefault((name, field.description), field)
    for (name, description), field in fields.items():
        verbs = verbs_of[name, description]
        value = "" if field.annotation is bool else values_text(field).replace("|", "\\|")
        option = f"`{name.upper()}`" if is_positional(field) else f"`{flag(name)}`"
        if field.default is True:
            option += f" / `--no-{flag(name)[2:]}`"
        default = default_text(field).strip("[]")
        lines.append(f"| {option} | {value} | {default} | {description} | {', '.join(verbs)} |")
    return "\n".join(lines)


def insert(text: str) -> str:
    """A text with the table between its two marks."""
    return re.sub(
        f"{_BEGIN}.*{_END}", lambda _: f"{_BEGIN}\n{table()}\n{_END}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
