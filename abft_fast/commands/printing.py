"""Print the tables that commands end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from abft_fast.evaluation import titles
from abft_fast.options import listed_tests, of_one_test
from abft_fast.runtime.progress import plain_console
from abft_fast.training.run_folder import RunFolder

if TYPE_CHECKING:  # it imports torch
    from abft_fast.memory.streamed import Speeds, StreamedPlan
    from abft_fast.memory.types import Plan


def print_run(run: RunFolder) -> None:
    """Print accuracy and attention before and after, the cost, and the run's folder."""
    table = Table(title=f"abft-fast train: {run.folder.name}", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    metrics, attention = run.evaluation, run.attention
    sides = [when for when in ("before", "after") if when in metrics]
    kinds = run.options["test_type"]
    rows = [_rows_of_tests(kinds, metrics[when], attention[when]) for when in sides]
    for title in dict.fromkeys(title for side in rows for title in side):
        values = {when: side.get(title) for when, side in zip(sides, rows, strict=True)}
        table.add_row(title, values.get("before"), values.get("after"))
    steps = run.metrics()
    table.add_row("training steps", "", str(len(steps)))
    table.add_row("seconds of training", "", f"{sum(row['seconds'] for row in steps):.1f}")
    peak = max(row["peak_memory_bytes"] for row in steps)
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


def print_evaluation(test_type: str, metrics: dict[str, dict], attention: dict[str, dict]) -> None:
    """Print the metrics of each test and dataset."""
    datasets = of_one_test(metrics, test_type, listed_tests(test_type)[0])
    table = Table(title=f"abft-fast eval: {', '.join(datasets)}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    for title, value in _rows_of_tests(test_type, metrics, attention).items():
        table.add_row(title, value)
    _console().print(table)


def _rows_of_tests(
    test_type: str, metrics: dict[str, dict], attention: dict[str, dict]
) -> dict[str, str]:
    """Return titles and values of all figures; with several tests, a title begins with its test."""
    rows: dict[str, str] = {}
    tests = listed_tests(test_type)
    for test in tests:
        start = "" if len(tests) == 1 else f"{test}: "
        own = (of_one_test(found, test_type, test) for found in (metrics, attention))
        rows |= {start + title: value for title, value in _rows(*own).items()}
    return rows


def _rows(metrics: dict[str, dict], attention: dict[str, dict]) -> dict[str, str]:
    """Return titles and values of all figures; the first of several datasets is in-domain."""
    rows: dict[str, str] = {}
    for dataset, scores in metrics.items():
        start = "" if len(metrics) == 1 else f"{dataset}: "
        rows |= {start + title: text for title, text in titles.rows_of(scores).items()}
        heads = attention[dataset]
        shown = ["induction_heads", "correct_share_above_chance"]
        if heads["correct_share_above_chance"] is None and "label_mass" in heads:
            shown.append("label_mass")
        for name in shown:
            title, text = titles.titled(name, heads[name])
            rows[start + title] = text
    inside, *outside = metrics.values()
    if outside:
        for name in inside:
            if name not in titles.SHARES:
                continue
            title, rows_in = titles.titled(name, inside[name])
            values = [other[name] for other in outside if other[name] is not None]
            mean = sum(values) / len(values) if values else None
            rows[f"in-domain: {title}"] = rows_in
            rows[f"out-of-domain, mean of {len(values)}: {title}"] = titles.titled(name, mean)[1]
    return rows


def print_plan(model: str, plan: Plan, notes: list[str]) -> None:
    """Print memory by part, then by gradient flow."""
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
            parts.add_row(name, _gigabytes(size))
    parts.add_row("together", _gigabytes(static.total))
    flows = Table()
    flows.add_column("during a step, with")
    for title in ("GB fixed", "GB a 1,000 tokens", "most tokens at once", "most demonstrations"):
        flows.add_column(title, justify="right")
    for flow, step in plan.steps.items():
        flows.add_row(
            flow.options,
            _gigabytes(step.of_large_batches.fixed),
            f"{step.of_large_batches.a_token / 1e6:.4f}",
            f"{plan.most_tokens(flow):,}",
            f"{plan.most_demonstrations(flow):,}",
        )
    console = _console()
    console.print(parts)
    console.print(flows)
    for note in notes:
        console.print(note, soft_wrap=True)


def _gigabytes(size: float) -> str:
    """Return bytes in GB; a small model's are not 0."""
    return "< 0.001" if 0 < size < 5e5 else f"{size / 1e9:.3f}"


def print_streamed_plan(model: str, plan: StreamedPlan, speeds: Speeds, notes: list[str]) -> None:
    """Print memory of the device, of the host, and the time of a streamed run."""
    memory = Table(title=f"abft-fast plan --stream: {model}", title_justify="left")
    memory.add_column("memory")
    memory.add_column("GB", justify="right")
    adds = plan.step.at(plan.batch)
    each = ", each process" if plan.processes > 1 else ""
    states = "hidden states, in files" if plan.states_on_disk else "host: hidden states"
    for name, size in (
        *((f"device: {name}", size) for name, size in plan.device.items()),
        (f"device: a packed batch of {plan.batch:,} tokens", adds),
        ("device: or a weight that is being quantized", plan.quantizing),
        (f"device at most{each}", plan.device_peak),
        (states, plan.states),
        ("host: a weight that is being read", plan.host_reading),
        ("host: the block that is read ahead", plan.host_ahead),
        (f"host at most{each}, beside programs and tokenizer", plan.host_peak),
    ):
        if size:
            memory.add_row(name, _gigabytes(size))
    work = Table()
    seconds = plan.seconds(speeds)
    for title in ("once a run", "amount", "seconds"):
        work.add_column(title, justify="left" if title == "once a run" else "right")
    for name, key, amount in (
        ("read from the weights' files", "read", f"{plan.read / 1e9:,.3f} GB"),
        ("copied to the GPU", "copy", f"{plan.copied / 1e9:,.3f} GB"),
        ("products with weights", "compute", f"{plan.operations / 1e12:,.3f}e12 operations"),
    ):
        if key != "copy" or plan.copied:
            work.add_row(name, amount, f"{seconds[key]:,.1f}" if key in seconds else "")
    console = _console()
    console.print(memory)
    console.print(work)
    for note in notes:
        console.print(note, soft_wrap=True)


def print_findings(findings: list[tuple[str, str]]) -> None:
    """Print what `doctor` found."""
    table = Table(show_header=False)
    for name, value in findings:
        table.add_row(name, value)
    plain_console().print(table)


def _console() -> Console:
    console = plain_console()
    return console if console.is_terminal else plain_console(width=100)
