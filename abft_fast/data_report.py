"""What the user's own data are, said before anything runs: labels, balance, lengths, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from abft_fast.data import Dataset
from abft_fast.own_data import OwnDataset
from abft_fast.progress import Progress
from abft_fast.prompts import PromptEncoder


def show_data(
    progress: Progress, dataset: Dataset, encoder: PromptEncoder, lengths: Iterable[int]
) -> None:
    """Print the table and what is odd; nothing for StaICC's datasets.

    Args:
        progress: what says it.
        dataset: what is described.
        encoder: its encoder for the model.
        lengths: tokens of the run's prompts.
    """
    if not isinstance(dataset, OwnDataset):
        return
    progress.say(f"data: {dataset.training_path}; to test on: {dataset.split}")
    table = Table()
    for title in ("label", "label word", "token"):
        table.add_column(title)
    for title in ("to train", "to test"):
        table.add_column(title, justify="right")
    counts = [Counter(e.label for e in part) for part in (dataset.training, dataset.test)]
    for label, value in enumerate(dataset.label_values):
        table.add_row(
            Text(value),
            Text(encoder.template.label_words[label]),
            str(encoder.label_ids[label]),
            *(str(count[label]) for count in counts),
        )
    table.add_row("together", "", "", *(str(count.total()) for count in counts))
    progress.show(table)
    context = "" if encoder.max_length is None else f" of the model's {encoder.max_length}"
    progress.say(f"longest prompt: {max(lengths)}{context} tokens")
    for line in oddities(dataset):
        progress.say(line)


def oddities(dataset: OwnDataset) -> list[str]:
    """Texts that stand twice, or with two labels; each kind with its number and first rows."""
    rows: dict[str, list[tuple[str, int, int]]] = {}  # by text: part, row, label
    parts = (
        ("to train", dataset.training, dataset.training_rows),
        ("to test", dataset.test, dataset.test_rows),
    )
    for part, examples, numbers in parts:
        for example, row in zip(examples, numbers, strict=True):
            rows.setdefault(example.text.strip(), []).append((part, row, example.label))
    again = [places for places in rows.values() if len(places) > 1]
    kinds = {
        "texts both to train and to test on": [
            places for places in again if len({part for part, _, _ in places}) == 2
        ],
        "texts more than once to train on": [
            twice for places in again if len(twice := [p for p in places if p[0] == "to train"]) > 1
        ],
        "texts with two labels": [
            places for places in again if len({label for _, _, label in places}) > 1
        ],
    }
    return [f"{kind}: {_count(found)}" for kind, found in kinds.items()]


def _count(found: Sequence[Sequence[tuple[str, int, int]]]) -> str:
    if not found:
        return "0"
    first = " and ".join(f"row {row} ({part})" for part, row, _ in found[0][:2])
    return f"{len(found)}, first {first}"
