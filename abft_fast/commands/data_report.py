"""What the user's own data are, said before anything runs: labels, balance, lengths, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from abft_fast.data import Dataset
from abft_fast.data.own import OwnDataset
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.progress import Progress


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
    """Texts that stand twice, or with two labels; of each kind the number and the first rows."""
    places: dict[str, list[_Place]] = {}
    for path, examples, rows in (
        (dataset.training_path, dataset.training, dataset.training_rows),
        (dataset.test_path, dataset.test, dataset.test_rows),
    ):
        for example, row in zip(examples, rows, strict=True):
            place = _Place(examples is dataset.test, example.label, f"{path}, row {row}")
            places.setdefault(example.text.strip(), []).append(place)
    again = [found for found in places.values() if len(found) > 1]
    training = [[place for place in found if not place.tested] for found in again]
    kinds = {
        "texts both to train and to test on": [_differing(found, "tested") for found in again],
        "texts more than once to train on": [found[:2] for found in training if len(found) > 1],
        "texts with two labels": [_differing(found, "label") for found in again],
    }
    return [f"{kind}: {_count(list(filter(None, pairs)))}" for kind, pairs in kinds.items()]


class _Place(NamedTuple):
    tested: bool
    label: int
    row: str


def _differing(places: list[_Place], what: str) -> list[_Place]:
    """The first place and the first other one that differs from it; none if all agree."""
    first = places[0]
    other = next((p for p in places if getattr(p, what) != getattr(first, what)), None)
    return [] if other is None else [first, other]


def _count(pairs: list[list[_Place]]) -> str:
    return str(len(pairs)) + "".join(f", first {a.row}, and {b.row}" for a, b in pairs[:1])
