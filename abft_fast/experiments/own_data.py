"""Which runs on data of the user's own can stand beside one another in a table or a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from abft_fast.errors import UserError
from abft_fast.experiments.records import Record

_DATA_OPTIONS = (
    "text_column", "label_column", "delimiter", "template", "test_file", "test_share", "split_seed",
)  # fmt: skip
"""Options that describe a dataset of the user's own; different datasets may differ in them."""


def check_data_unchanged(records: Iterable[Record]) -> None:
    """Refuse runs between which a data file changed.

    Raises:
        UserError: a file has two contents.
    """
    first_runs: dict[str, tuple[str, Record]] = {}
    for record in records:
        for path, digest in record.data.items():
            first_digest, first = first_runs.setdefault(path, (digest, record))
            if digest != first_digest:
                raise UserError(
                    f"{path} changed between {first.folder} and {record.folder}: move away the "
                    "runs on the old file"
                )


def fixed_data_options(records: Sequence[Record]) -> list[str]:
    """Return the data options that have one value for each dataset, so they split no runs.

    Raises:
        UserError: two datasets have one name, so their scores could not be told apart.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for option in ("dataset", *_DATA_OPTIONS):
            value = str(record.options.get(option))
            values.setdefault((record.dataset, option), set()).add(value)
    datasets = {record.dataset for record in records}
    for name in dict.fromkeys(record.dataset for record in records):
        if len(values[name, "dataset"]) > 1:
            first, second, *_ = sorted(values[name, "dataset"])
            raise UserError(f"two datasets are called {name}: {first} and {second}: rename one")
    return [
        option for option in _DATA_OPTIONS if all(len(values[d, option]) == 1 for d in datasets)
    ]
