"""Write the tables of docs/reference/options.md: `python -m abft_fast.cli.options_table FILE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from abft_fast.cli.app import default_text, values_text
from abft_fast.options import (
    AttentionConfig,
    CmapConfig,
    CommandOptions,
    DcmConfig,
    DoctorConfig,
    EvalConfig,
    FigureConfig,
    MergeConfig,
    PathConfig,
    PlanConfig,
    PlaneConfig,
    PredictConfig,
    ReportConfig,
    RestrictConfig,
    ShiftConfig,
    ShowConfig,
    SweepConfig,
    TableConfig,
    TrainConfig,
    flag,
    is_positional,
)

VERBS: dict[str, type[CommandOptions]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "plan": PlanConfig,
    "predict": PredictConfig,
    "merge": MergeConfig,
    "sweep": SweepConfig,
    "table": TableConfig,
    "report": ReportConfig,
    "analyze attention": AttentionConfig,
    "analyze show": ShowConfig,
    "analyze shift": ShiftConfig,
    "analyze cmap": CmapConfig,
    "analyze restrict": RestrictConfig,
    "analyze path": PathConfig,
    "analyze dcm": DcmConfig,
    "analyze plane": PlaneConfig,
    "figure": FigureConfig,
    "doctor": DoctorConfig,
}
_BEGIN, _END = "<!-- options: begin -->", "<!-- options: end -->"


def tables() -> str:
    """Return a markdown table for each set of verbs that share options."""
    verbs_of: dict[tuple[str, str | None], list[str]] = {}
    fields = {}
    for verb, config in VERBS.items():
        for name, field in config.model_fields.items():
            verbs_of.setdefault((name, field.description), []).append(verb)
            fields[name, field.description] = field
    groups: dict[tuple[str, ...], list[str]] = {}
    for (name, description), verbs in verbs_of.items():
        line = _row(name, fields[name, description])
        groups.setdefault(tuple(verbs), []).append(line)
    parts = []
    for group, rows in groups.items():
        title = _title(group)
        header = ["| option | value | default | what it does |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {title}", "", *header, *rows]))
    return "\n\n".join(parts)


def _title(verbs: tuple[str, ...]) -> str:
    """Return verbs as a heading; those of a sub-command together, as `analyze show, shift`."""
    together: dict[str, list[str]] = {}
    for verb in verbs:
        first, _, second = verb.partition(" ")
        together.setdefault(first, []).extend([second] if second else [])
    return ", ".join(
        f"`{first} {', '.join(below)}`" if below else f"`{first}`"
        for first, below in together.items()
    )


def _row(name: str, field: FieldInfo) -> str:
    value = "" if field.annotation is bool else values_text(field).replace("|", ", ")
    option = f"`{name.upper()}`" if is_positional(field) else f"`{flag(name)}`"
    if field.default is True:
        option += f"<br>`--no-{flag(name)[2:]}`"
    default = default_text(field).strip("[]")
    description = (field.description or "").replace("<", "&lt;")
    return f"| {option} | {value} | {default} | {description} |"


def insert(text: str) -> str:
    """Return a text with the tables between its two marks."""
    return re.sub(
        f"{_BEGIN}.*{_END}", lambda _: f"{_BEGIN}\n\n{tables()}\n\n{_END}", text, flags=re.DOTALL
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
