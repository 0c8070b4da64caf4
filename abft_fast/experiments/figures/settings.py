"""Name what distinguishes runs that stand in one figure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from abft_fast.experiments.cell import WITHOUT_RESULT
from abft_fast.experiments.own_data import fixed_data_options
from abft_fast.experiments.records import Record
from abft_fast.options import TrainConfig
from abft_fast.training.run_folder import MOVABLE

_NEVER = WITHOUT_RESULT | {"dataset", "seed", "output_dir", "generalization_test"}
"""Options that are a panel or a band of a figure, or change no result."""


def setting_names(records: Sequence[Record], without: Collection[str] = ()) -> list[str]:
    """Return a name for each record; records of one name differ in dataset and seed alone.

    A name is the sweep file's name of the setting, or the method. Where records of one such name
    have different options, the name says these too.

    Args:
        records: all runs of the figure.
        without: options that the figure shows in another way.

    Raises:
        UserError: two datasets have one name, so their runs could not be told apart.
    """
    names = [record.labels.get("setting") or record.method for record in records]
    skipped = {*_NEVER, *without, *fixed_data_options(records), "method"}
    full = []
    for name, record in zip(names, records, strict=True):
        same = [other for own, other in zip(names, records, strict=True) if own == name]
        differing = [
            f"{option}={_shown(record, option)}"
            for option in record.options
            if option not in skipped and len({str(_value(other, option)) for other in same}) > 1
        ]
        full.append(", ".join([name, *differing]))
    return full


def _value(record: Record, option: str) -> object:
    """Return an option's value: its default where the option did not exist yet."""
    field = TrainConfig.model_fields.get(option)
    return record.options.get(option, None if field is None else field.default)


def _shown(record: Record, option: str) -> object:
    """Return an option's value as a figure has it: of a path, the last part."""
    if option == "model" and record.labels.get("model"):
        return record.labels["model"]
    value = record.options[option]
    return value.rstrip("/").split("/")[-1] if option in ("model", *MOVABLE) and value else value
