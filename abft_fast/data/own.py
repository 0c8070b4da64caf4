"""Read the user's own data as a dataset, before anything heavy is imported."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

from abft_fast.data import tables
from abft_fast.data.dataset import Dataset, Example, text_key
from abft_fast.data.reading import sha256_of
from abft_fast.data.rows import place_of
from abft_fast.data.template_file import TemplateFile, read_template
from abft_fast.errors import UserError, closest, listed


@dataclass(frozen=True, kw_only=True)
class OwnDataset(Dataset):
    """A dataset of the user's own; its training examples are also the pool of demonstrations.

    Attributes:
        label_values: the value in the label column for each label word.
        training_path, test_path: the files or folders that hold the examples.
        training_rows, test_rows: the row number of each example in its file.
        split: how the test examples were chosen, as a phrase.
        notes: lines about files that are not read as their suffix says.
    """

    label_values: tuple[str, ...]
    training_path: Path
    test_path: Path
    training_rows: tuple[int, ...]
    test_rows: tuple[int, ...]
    split: str
    notes: tuple[str, ...]

    def without(self, keys: Collection[str]) -> Self:
        """Return the dataset without training examples whose `text_key` is among these."""
        pairs = zip(self.training, self.training_rows, strict=True)
        rows = tuple(row for each, row in pairs if text_key(each.text) not in keys)
        return replace(super().without(keys), training_rows=rows)

    def with_queries(self, count: int) -> Self:
        """Return the dataset with `count` of its test queries, as `Dataset.with_queries` does."""
        rows = tuple(self.test_rows[i] for i in self._drawn_queries(count))
        return replace(super().with_queries(count), test_rows=rows)

    def place_of(self, example: Example) -> str:
        """Return the file and the row of an example."""
        for path, examples, rows in (
            (self.training_path, self.training, self.training_rows),
            (self.test_path, self.test, self.test_rows),
        ):
            if example in examples:
                return place_of(path, rows[examples.index(example)])
        return super().place_of(example)


@dataclass(frozen=True)
class OwnSource:
    """The files of the user's data, and how to read them.

    Attributes:
        name: the name of the dataset.
        training, test: files of examples; without a test file the training rows are split.
        template: the file that says how prompts are written, if any.
        text_column, label_column: the names of the columns.
        delimiter: what separates the columns of CSV and TSV; None to find it.
        test_share: the part of each label's rows to test on, where rows are split.
        split_seed: the seed of the choice of these rows.
    """

    name: str
    training: Path
    test: Path | None
    template: Path | None
    text_column: str
    label_column: str
    delimiter: str | None
    test_share: float
    split_seed: int


@dataclass(frozen=True, slots=True)
class _Labelled:
    text: str
    value: str
    row: int


def load_own(source: OwnSource) -> OwnDataset:
    """Read the user's files into a dataset; read them again only if one has changed.

    Raises:
        UserError: a file is missing, unreadable, or a row does not fit the source.
    """
    paths = [p for p in (source.training, source.test, source.template) if p is not None]
    return _load(source, tuple((tables.place_to_save(path), sha256(path)) for path in paths))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and digests of a dataset folder's files.

    Raises:
        UserError: a file cannot be read.
    """
    whole = hashlib.sha256()
    paths = tables.files_of(path)
    for file in paths:
        digest = sha256_of(file)
        if len(paths) == 1:
            return digest
        whole.update(f"{file.name} {digest}\n".encode())
    return whole.hexdigest()


@lru_cache(maxsize=4)
def _load(source: OwnSource, files: tuple[tuple[str, str], ...]) -> OwnDataset:
    """Read a dataset; the paths and digests of its files are part of the cache's key."""
    template = TemplateFile() if source.template is None else read_template(source.template)
    training = _read(source, source.training, template.labels, str(source.template))
    words = template.labels or {value: value for value in sorted({e.value for e in training})}
    _check_classes(source, training, words)
    if source.test is None:
        training, test = _split(source, training)
        split = f"{source.test_share:g} of each label's rows, by --split-seed {source.split_seed}"
    else:
        _check_distinct(source, files)
        test = _read(source, source.test, words, str(source.template or source.training))
        split = str(source.test)
    index = {value: label for label, value in enumerate(words)}
    examples = [tuple(Example(e.text, index[e.value]) for e in part) for part in (training, test)]
    return OwnDataset(
        name=source.name,
        input_prefix=template.input_prefix,
        label_prefix=template.label_prefix,
        label_words=tuple(words.values()),
        staicc_label_words=tuple(words.values()),
        training=examples[0],
        demonstrations=examples[0],
        test=examples[1],
        files=files,
        label_values=tuple(words),
        training_path=source.training,
        test_path=source.test or source.training,
        training_rows=tuple(e.row for e in training),
        test_rows=tuple(e.row for e in test),
        split=split,
        notes=_notes(source),
    )


def _notes(source: OwnSource) -> tuple[str, ...]:
    needed = (source.text_column, source.label_column)
    files = [path for path in (source.training, source.test) if path is not None]
    return tuple(filter(None, (tables.note(path, needed, source.delimiter) for path in files)))


def _read(
    source: OwnSource, path: Path, known: Collection[str] | None, known_from: str
) -> list[_Labelled]:
    """Read a file's texts and label values; refuse a value not in `known`, where that is given."""
    text, label = source.text_column, source.label_column
    examples = []
    for row in tables.read_rows(path, (text, label), delimiter=source.delimiter):
        value = row.category(label, known or ())
        if known is not None and value not in known:
            raise UserError(
                f"{row.place(label)}: {value!r} is not among the labels of {known_from}: "
                f"{listed(known)}{closest(value, known)}"
            )
        examples.append(_Labelled(row.text(text), value, row.number))
    return examples


def _check_classes(source: OwnSource, training: list[_Labelled], words: Collection[str]) -> None:
    """Check that each label has a row to train on and, where the rows are split, one to test on."""
    rows = Counter(example.value for example in training)
    where = f"{source.training}, column {source.label_column!r}"
    if len(rows) == 1:
        value = next(iter(rows))
        raise UserError(f"{where}: every row has the label {value!r}; two labels are needed")
    for value in words:
        if not rows[value]:
            raise UserError(f"{where}: no row has the label {value!r} of {source.template}")
    if source.test is None and rows.most_common()[-1][1] == 1:
        lonely = [value for value in words if rows[value] == 1]
        row = next(example.row for example in training if example.value == lonely[0])
        others = f" ({len(lonely) - 1} more labels have one row)" if len(lonely) > 1 else ""
        raise UserError(
            f"{source.training}, row {row}, column {source.label_column!r}: this is the only row "
            f"with the label {lonely[0]!r}{others}, but a split needs two: add rows, or give "
            "--test-file"
        )


def _check_distinct(source: OwnSource, files: Sequence[tuple[str, str]]) -> None:
    training, test = files[:2]
    if training[1] == test[1]:
        raise UserError(
            f"{source.test} has the content of {source.training}: test on rows that are not "
            "trained on, or leave out --test-file for a split"
        )


def _split(source: OwnSource, examples: list[_Labelled]) -> tuple[list[_Labelled], list[_Labelled]]:
    """Split each label's rows by the test share; both parts keep the file's order."""
    by_value: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_value.setdefault(example.value, []).append(index)
    chosen: set[int] = set()
    for value, indices in by_value.items():
        count = min(max(round(source.test_share * len(indices)), 1), len(indices) - 1)
        generator = random.Random(f"{source.split_seed}-{value}")  # of text, so no hash is in it
        chosen.update(generator.sample(indices, count))
    training = [example for index, example in enumerate(examples) if index not in chosen]
    return training, [examples[index] for index in sorted(chosen)]
