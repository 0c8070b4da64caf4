"""Describe the user's own data before anything runs: labels, balance, lengths, duplicates."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.table import Table

from abft_fast.data import Boxes, Dataset
from abft_fast.data.own import OwnDataset
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.progress import Progress


def show_data(
    progress: Progress, dataset: Dataset, encoder: PromptEncoder, lengths: Iterable[int]
) -> None:
    """Print a table of the user's own data and their oddities; of other data, one line.

    Args:
        progress: prints messages.
        dataset: the data to describe.
        encoder: the dataset's encoder for the model.
        lengths: tokens of the run's prompts.
    """
    if isinstance(dataset, Boxes):
        progress.say(
            f"data: {dataset.name}, generated, with {len(dataset.label_words)} objects of one "
            f"token; chance is 1 in {dataset.boxes}"
        )
        return
    if not isinstance(dataset, OwnDataset):
        progress.say(f"data: {dataset.name} of StaICC")
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
            value,
            encoder.template.label_words[label],
            str(encoder.label_ids[label]),
            *(str(count[label]) for count in counts),
        )
    table.add_row("together", "", "", *(str(count.total()) for count in counts))
    progress.show(table)
    context = "" if encoder.max_length is None else f" of the model's {encoder.max_length}"
    for line in (*dataset.notes, *labels_alike(dataset.label_values)):
        progress.say(line)
    progress.say(f"longest prompt: {max(lengths)}{context} tokens")
    for line in (*_special_token_lines(dataset, encoder), *oddities(dataset)):
        progress.say(line)


def labels_alike(labels: Sequence[str]) -> list[str]:
    """Return a line that names labels which may be one, such as `1` and `1.0`, or `yes` and `Yes`.

    Labels are alike if they are the same number, truth being 1, or the same but for case, spaces
    between words and forms of a character.
    """
    alike: dict[float | str, list[str]] = {}
    for label in labels:
        alike.setdefault(_essence(label), []).append(label)
    groups = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if not groups:
        return []
    return [f"labels that may be one: {'; '.join(groups)}: write both the same way if they are"]


def _essence(label: str) -> float | str:
    folded = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    try:
        return float({"false": "0", "true": "1"}.get(folded, folded))
    except ValueError:
        return folded


def special_token_line(count: int, place: str, token: str) -> str:
    """Return a line that counts texts in which characters become a special token."""
    return (
        f"texts in which characters become a special token of the model: {count}, first {place}, "
        f"with {token!r}"
    )


def _special_token_lines(dataset: OwnDataset, encoder: PromptEncoder) -> list[str]:
    examples = dataset.training + dataset.test
    found = [(e, token) for e in examples if (token := encoder.special_token_in(e.text))]
    if not found:
        return []
    first, token = found[0]
    return [special_token_line(len(found), dataset.place_of(first), token)]


def oddities(dataset: OwnDataset) -> list[str]:
    """Return a line for each kind of duplicate text: how many there are, and the first rows."""
    places: dict[str, list[_Place]] = {}
    for path, examples, rows in (
        (dataset.training_path, dataset.training, dataset.training_rows),
        (dataset.test_path, dataset.test, dataset.test_rows),
    ):
        for example, row in zip(examples, rows, strict=True):
            place = _Place(examples is dataset.test, example.label, f"{path}, row {row}")
            places.setdefault(example.text.strip(), []).append(place)
    repeated = [rows for rows in places.values() if len(rows) > 1]
    training = [[place for place in rows if not place.tested] for rows in repeated]
    kinds = {
        "texts both to train and to test on": [_differing(rows, "tested") for rows in repeated],
        "texts more than once to train on": [rows[:2] for rows in training if len(rows) > 1],
        "texts with two labels": [_differing(rows, "label") for rows in repeated],
    }
    return [f"{kind}: {_count(list(filter(None, pairs)))}" for kind, pairs in kinds.items()]


class _Place(NamedTuple):
    tested: bool
    label: int
    row: str


def _differing(places: list[_Place], what: str) -> list[_Place]:
    """Return the first place and the first one that differs from it; nothing if all agree."""
    first = places[0]
    other = next((p for p in places if getattr(p, what) != getattr(first, what)), None)
    return [] if other is None else [first, other]


def _count(pairs: list[list[_Place]]) -> str:
    return str(len(pairs)) + "".join(f", first {a.row}, and {b.row}" for a, b in pairs[:1])
