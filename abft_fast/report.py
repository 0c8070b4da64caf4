"""The table a run ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from abft_fast.evaluation import Behavior, Metrics
from abft_fast.plan import Plan
from abft_fast.run import Run

_METRICS = {
    "accuracy": "accuracy (%)",
    "macro_f1": "macro F1 (%)",
    "true_label_likelihood": "true-label likelihood (%)",
    "expected_calibration_error": "expected calibration error (%)",
}
_ATTENTION = {
    "induction_heads": "induction heads a prompt",
    "correct_share_above_chance": "label mass on correct labels, above chance (%)",
}


def print_run(run: Run) -> None:
    """Accuracy and attention before and after, what it took, and where the run is."""
    table = Table(title=f"abft-fast train: {run.folder.name}", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    content = run.evaluation
    for dataset in next(iter(content.values()), {}):
        sides = [content.get(when, {}).get(dataset, {}) for when in ("before", "after")]
        heads = [run.attention.get(when, {}).get(dataset, {}) for when in ("before", "after")]
        for name, title in _METRICS.items():
            table.add_row(title, *(_percent(side.get(name)) for side in sides))
        name = "induction_heads"
        table.add_row(_ATTENTION[name], *(f"{side[name]:.2f}" if side else "-" for side in heads))
        name = "correct_share_above_chance"
        table.add_row(_ATTENTION[name], *(_percent(side.get(name), "+") for side in heads))
    rows = run.metrics()
    table.add_row("training steps", "", str(len(rows)))
    table.add_row("seconds of training", "", f"{sum(row['seconds'] for row in rows):.1f}")
    peak = max(row["peak_memory_bytes"] for row in rows)
    table.add_row("peak memory (MiB)", "", f"{peak / 2**20:.0f}")
    console = _console()
    console.print(table)
    if run.mauve:
        console.print(
            f"MAUVE of {run.mauve['texts']} texts against those of before: "
            f"{run.mauve['after']:.3f}; the model before against itself: "
            f"{run.mauve['before_again']:.3f}"
        )
    console.print(f"run folder: {run.folder}", soft_wrap=True)
    if run.artifact.is_dir():
        console.print(f"trained {run.artifact.name}: {run.artifact}", soft_wrap=True)


def print_evaluation(dataset: str, metrics: Metrics, behavior: Behavior) -> None:
    """One dataset's metrics."""
    table = Table(title=f"abft-fast eval: {dataset}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, title in _METRICS.items():
        table.add_row(title, _percent(getattr(metrics, name)))
    table.add_row(_ATTENTION["induction_heads"], f"{behavior.induction_heads:.2f}")
    share = behavior.correct_share_above_chance
    table.add_row(_ATTENTION["correct_share_above_chance"], _percent(share, "+"))
    _console().print(table)


def print_plan(model: str, plan: Plan, notes: list[str]) -> None:
    """Memory by part, then by how far gradients flow."""
    static = plan.static
    parts = Table(title=f"abft-fast plan: {model}", title_justify="left")
    parts.add_column("there all the time")
    parts.add_column("GB", justify="right")
    for name, size in (
        ("quantized weights", static.quantized),
        ("other frozen weights", static.frozen),
        (f"trained: {static.parameters:,} parameters, float32", static.trained),
        ("their gradients", static.gradients),
        ("Adam's moments", static.optimizer),
    ):
        if size:
            parts.add_row(name, f"{size / 1e9:.3f}")
    parts.add_row("together", f"{static.total / 1e9:.3f}")
    flows = Table()
    flows.add_column("during a step, with")
    for title in ("GB fixed", "GB a 1,000 tokens", "most tokens at once", "most demonstrations"):
        flows.add_column(title, justify="right")
    for flow, step in plan.steps.items():
        flows.add_row(
            flow.options,
            f"{step.fixed / 1e9:.3f}",
            f"{step.a_token / 1e6:.4f}",
            f"{plan.most_tokens(flow):,}",
            f"{plan.most_demonstrations(flow):,}",
        )
    console = _console()
    console.print(parts)
    console.print(flows)
    for note in notes:
        console.print(note, soft_wrap=True)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"
