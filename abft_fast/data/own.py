"""The user's own data as a dataset: read, labelled and split, before anything heavy is imported."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from abft_fast import data
from abft_fast.data import tables
from abft_fast.data.catalog import Dataset, Example
from abft_fast.data.template_file import TemplateFile, read_template
from abft_fast.errors import UserError
from abft_fast.options import Options, TrainConfig, flag


@dataclass(frozen=True, kw_only=True)
class OwnDataset(Dataset):
    """A dataset of the user's; test prompts draw demonstrations from its training examples.

    Attributes:
        label_values: what the label column holds for each label word.
        training_path, test_path: where the examples are from.
        training_rows, test_rows: each example's row there.
        split: how the test examples were chosen.
    """

    label_values: tuple[str, ...]
    training_path: Path
    test_path: Path
    training_rows: tuple[int, ...]
    test_rows: tuple[int, ...]
    split: str


@dataclass(frozen=True)
class _Source:
    """All that decides what a dataset holds; `files` so that a changed file is read again."""

    name: str
    training: Path
    test: Path | None
    template: Path | None
    text_column: str
    label_column: str
    test_share: float
    split_seed: int
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Labelled:
    text: str
    value: str
    row: int


def by_options(options: Options) -> Dataset:
    """The dataset of a run: StaICC's by name, or the user's own.

    Raises:
        UserError: a file is missing, unreadable, or a row in it is not what the options say.
    """
    if not options.data_are_own:
        return data.load(options.dataset)
    path = Path(options.dataset)
    parts = tables.parts(path)
    if parts and "train" not in parts:
        raise UserError(f"{path} has no part `train`; there are {', '.join(parts)}")
    test = options.test_file or parts.get("test")
    for name in ("test_share", "split_seed"):
        if test is not None and getattr(options, name) != Options.model_fields[name].default:
            raise UserError(
                f"{flag(name)}: {path} has a part `test`, nothing is split: leave it out"
            )
    read = [p for p in (parts.get("train", path), test, options.template) if p is not None]
    source = _Source(
        name=options.dataset_name,
        training=read[0],
        test=test,
        template=options.template,
        text_column=options.text_column,
        label_column=options.label_column,
        test_share=options.test_share,
        split_seed=options.split_seed,
        files=tuple((str(p.resolve()), _sha256(p)) for p in read),
    )
    return _load(source)


def meta_dataset(config: TrainConfig, name: str) -> Dataset:
    """One of the datasets that MetaICL trains on, by the options of the run.

    Raises:
        UserError: as `by_options`.
    """
    return by_options(config.model_copy(update={"dataset": name, "test_file": None}))


def paths(options: Options) -> list[Path]:
    """What of the user's a dataset is read from."""
    named = (options.dataset if options.data_are_own else None, options.test_file, options.template)
    return [Path(path) for path in named if path is not None]


def file_hashes(options: Options) -> dict[str, str]:
    """SHA-256, by path, of every file of the user's that the results depend on.

    Raises:
        UserError: a dataset's file is missing, unreadable or not what the options say.
    """
    found = dict(by_options(options).files) if options.data_are_own else {}
    if isinstance(options, TrainConfig):
        for name in options.meta_dataset_names if options.method == "MetaICL" else ():
            if name not in data.DATASETS:
                found |= meta_dataset(options, name).files
        for path in (options.plain_text, options.mauve_prefix):
            if path is not None and path.is_file():  # else who reads it says what it is
                found[str(path.resolve())] = _sha256(path)
    return found


def _sha256(path: Path) -> str:
    """SHA-256 of a file, or of a dataset's folder: of the digests of its files."""
    whole = hashlib.sha256()
    paths = tables.files_of(path)
    for file in paths:
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256")
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if len(paths) == 1:
            return digest.hexdigest()
        whole.update(f"{file.name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()


@lru_cache(maxsize=4)
def _load(source: _Source) -> OwnDataset:
    template = TemplateFile() if source.template is None else read_template(source.template)
    training = _read(source, source.training, template.labels, str(source.template))
    words = template.labels or {value: value for value in sorted({e.value for e in training})}
    _check_classes(source, training, words)
    if source.test is None:
        training, test = _split(source, training)
        split = f"{source.test_share:g} of each label's rows, by --split-seed {source.split_seed}"
    else:
        _check_distinct(source)
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
        files=source.files,
        label_values=tuple(words),
        training_path=source.training,
        test_path=source.test or source.training,
        training_rows=tuple(e.row for e in training),
        test_rows=tuple(e.row for e in test),
        split=split,
    )


def _read(
    source: _Source, path: Path, known: Collection[str] | None, known_from: str
) -> list[_Labelled]:
    """A file's texts and label values; all are among `known`, where that is given."""
    text, label = source.text_column, source.label_column
    found = []
    for row in tables.read_rows(path, (text, label)):
        value = row.category(label, known or ())
        if known is not None and value not in known:
            raise UserError(
                f"{row.place(label)}: {value!r} is not among the labels of {known_from}: "
                f"{tables.listed(known)}{tables.closest(value, known)}"
            )
        found.append(_Labelled(row.text(text), value, row.number))
    return found


def _check_classes(source: _Source, training: list[_Labelled], words: Collection[str]) -> None:
    """Every label has an example to train on, and one to test on where the rows are split."""
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
        others = f" (and {len(lonely) - 1} other labels)" if len(lonely) > 1 else ""
        raise UserError(
            f"{source.training}, row {row}, column {source.label_column!r}: the only row with the "
            f"label {lonely[0]!r}{others}, but a split needs two: add rows, or give --test-file"
        )


def _check_distinct(source: _Source) -> None:
    training, test = source.files[:2]
    if training[1] == test[1]:
        raise UserError(
            f"{source.test} holds what {source.training} does: test on rows that are not trained "
            "on, or leave out --test-file for a split"
        )


def _split(source: _Source, examples: list[_Labelled]) -> tuple[list[_Labelled], list[_Labelled]]:
    """Rows to train and to test on, of each label its share, in the file's order."""
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
