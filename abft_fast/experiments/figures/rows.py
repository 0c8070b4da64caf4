"""The rows of each figure: one observation a row, as its CSV has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from abft_fast.errors import UserError
from abft_fast.experiments.cell import CALIBRATIONS
from abft_fast.experiments.cell_folder import FINISHED, CellFolder
from abft_fast.experiments.figures.settings import setting_names
from abft_fast.experiments.records import Record
from abft_fast.training.run_folder import RunFolder

Row = dict[str, Any]


def heads(records: Sequence[Record], metric: str) -> list[Row]:
    """Return induction heads a prompt over the samples seen (paper, Figs 5 and 20-28)."""
    return _over_steps(records, ("induction_heads",))


def losses(records: Sequence[Record], metric: str) -> list[Row]:
    """Return ABFT's loss and the correct share of every method's batches (paper, section 6)."""
    return _over_steps(records, ("attention_loss", "correct_share_above_chance"))


def factors(records: Sequence[Record], metric: str) -> list[Row]:
    """Return scores of ABFT by A0, B0 and the control of A (paper, Fig. 6)."""
    trained = [record for record in records if record.method == "ABFT"]
    rows = _scores(trained, metric, ("adaptation", "penalty", "reward"))
    return [row for row in rows if row["penalty"] is not None]


def data(records: Sequence[Record], metric: str) -> list[Row]:
    """Return scores over the number of training prompts (paper, Figs 3 and 15)."""
    return _scores(records, metric, ("train_samples",))


def demonstrations(records: Sequence[Record], metric: str) -> list[Row]:
    """Return scores over the number of demonstrations."""
    return _scores(records, metric, ("k",))


def unseen(records: Sequence[Record], metric: str) -> list[Row]:
    """Return scores with demonstrations of any label, and with none of the query's (Fig. 2)."""
    wanted = ("Normal", "UnseenLabel")
    kept = [record for record in records if record.options.get("test_type", "Normal") in wanted]
    rows = _scores(kept, metric, ("test_type",))
    return rows if any(row["test_type"] == "UnseenLabel" for row in rows) else []


ROWS: dict[str, Callable[[Sequence[Record], str], list[Row]]] = {
    "heads": heads,
    "factors": factors,
    "data": data,
    "unseen": unseen,
    "demonstrations": demonstrations,
    "losses": losses,
}
"""By the name of the figure."""


def make_rows(what: str, records: Sequence[Record], metric: str) -> list[Row]:
    """Return the rows of a figure.

    Args:
        what: a name of `ROWS`.
        records: all runs.
        metric: the metric of figures that show scores.

    Raises:
        UserError: no run has what the figure shows.
    """
    rows = ROWS[what](records, metric)
    if not rows:
        raise UserError(
            f"figure {what}: none of {len(records)} run(s) has what it shows: "
            f"{_WANTED.get(what, f'a finished test with {metric}')}"
        )
    return rows


_WANTED = {
    "heads": "training steps",
    "losses": "training steps with attention_loss, which older runs lack",
    "factors": "a finished test of ABFT",
    "unseen": "a finished test with --test-type UnseenLabel",
}


def _over_steps(records: Sequence[Record], names: Sequence[str]) -> list[Row]:
    rows = []
    runs = list({record.folder: record for record in records}.values())  # whatever their tests
    for setting, record in zip(setting_names(runs, ("test_type",)), runs, strict=True):
        size = record.options.get("pseudo_batch_size", 0)
        total = record.options.get("train_samples", 0) * record.options.get("epochs", 0)
        for step in _steps(record):
            found = {name: step.get(name) for name in names}
            if found[names[0]] is not None:
                about = {"dataset": record.dataset, "setting": setting}
                place = {"step": step["step"], "samples": min(step["step"] * size, total)}
                rows.append({**about, "seed": record.options.get("seed"), **place, **found})
    return rows


def _steps(record: Record) -> list[Row]:
    is_cell = (record.folder / "cell.yaml").is_file()
    folder = CellFolder(record.folder).run if is_cell else record.folder
    return RunFolder(folder).metrics()


def _scores(records: Sequence[Record], metric: str, options: Sequence[str]) -> list[Row]:
    """Return a score for each finished run after training, and each distinct one before it.

    A score before training is left out where a run that only evaluates has it too.
    """
    finished = [record for record in records if record.status == FINISHED]
    before = [record.untrained for record in finished if record.method not in CALIBRATIONS]
    after, before = (
        [record for record in part if _score(record, metric) is not None]
        for part in (finished, before)
    )
    tested = [*after, *before]
    rows, rows_before, known = [], [], set()
    for index, setting in enumerate(setting_names(tested, options)):
        record = tested[index]
        found = {option: record.options.get(option) for option in options}
        about = {"dataset": record.dataset, "setting": setting, "seed": record.options.get("seed")}
        row = {**about, **found, metric: _score(record, metric)}
        place = (record.dataset, setting, *found.values())
        if index < len(after):
            rows.append(row)
        elif place not in known:
            rows_before.append(row)
        known.add(place)
    return [*rows_before, *rows]


def _score(record: Record, metric: str) -> float | None:
    return record.evaluation.get("after", {}).get(record.dataset, {}).get(metric)
