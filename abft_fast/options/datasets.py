"""Load the datasets that the options of a run name."""

from __future__ import annotations

from pathlib import Path

from abft_fast import data
from abft_fast.data import Dataset, tables
from abft_fast.data.own import OwnDataset, OwnSource, load_own, sha256
from abft_fast.data.reading import again, is_stream
from abft_fast.errors import UserError
from abft_fast.options.base import flag
from abft_fast.options.evaluate import DrawnPromptOptions
from abft_fast.options.train import TrainConfig


def from_options(options: DrawnPromptOptions) -> Dataset:
    """Load the dataset of a run: one that has a name, or the user's own data.

    Raises:
        UserError: a file is missing, unreadable, or a row in it is not what the options say.
    """
    return own_from_options(options) if options.data_are_own else data.load(options.dataset)


def own_from_options(options: DrawnPromptOptions) -> OwnDataset:
    """Load the user's own data that `--dataset` names.

    Raises:
        UserError: as `from_options`.
    """
    path = Path(options.dataset)
    parts = tables.parts(path)
    if parts and "train" not in parts:
        raise UserError(f"{path} has no part `train`; its parts are {', '.join(parts)}")
    test = options.test_file or parts.get("test")
    for name in ("test_share", "split_seed"):
        if (
            test is not None
            and getattr(options, name) != DrawnPromptOptions.model_fields[name].default
        ):
            raise UserError(
                f"{flag(name)}: {path} has a part `test`, so nothing is split: leave this option "
                "out"
            )
    return load_own(
        OwnSource(
            name=options.dataset_name,
            training=parts.get("train", path),
            test=test,
            template=options.template,
            text_column=options.text_column,
            label_column=options.label_column,
            delimiter=options.delimiter,
            test_share=options.test_share,
            split_seed=options.split_seed,
        )
    )


def to_train_on(config: TrainConfig, name: str) -> Dataset:
    """Load one of the datasets that the training prompts come from, with the options of the run.

    Args:
        config: the run's options.
        name: one of `config.training_dataset_names`.

    Raises:
        UserError: as `from_options`.
    """
    if name == config.dataset:
        return from_options(config)
    return from_options(config.model_copy(update={"dataset": name, "test_file": None}))


def paths(options: DrawnPromptOptions) -> list[Path]:
    """Return the user's files and folders that the tested dataset is read from."""
    named = (options.dataset if options.data_are_own else None, options.test_file, options.template)
    return [Path(path) for path in named if path is not None]


def refuse_streams(options: DrawnPromptOptions, readers: str) -> None:
    """Refuse data that can be read only once, where several processes read them.

    Args:
        options: the options that name the data.
        readers: what would read them, for the message.

    Raises:
        UserError: a file is standard input or a pipe.
    """
    others: list[Path] = []
    if isinstance(options, TrainConfig):
        listed = [name for name in options.training_dataset_names if name not in data.NAMES]
        others = [*map(Path, listed), *filter(None, (options.plain_text, options.mauve_prefix))]
    for path in (*paths(options), *others):
        if is_stream(path):
            raise UserError(f"{path} can be read once, but {readers} reads it: name a file")


def file_hashes(options: DrawnPromptOptions) -> dict[str, str]:
    """Return the SHA-256 of each of the user's files that the results depend on, by path.

    Raises:
        UserError: a dataset's file is missing, unreadable or not what the options say.
    """
    hashes = dict(from_options(options).files) if options.data_are_own else {}
    if isinstance(options, TrainConfig):
        for name in options.training_dataset_names:
            if name not in data.NAMES and name != options.dataset:
                hashes |= to_train_on(options, name).files
        for path in (options.plain_text, options.mauve_prefix):
            if path is not None and again(path).is_file():  # else a later reader says what is wrong
                hashes[tables.place_to_save(path)] = sha256(path)
    return hashes
