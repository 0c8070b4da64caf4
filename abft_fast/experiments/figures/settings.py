"""Name what distinguishes runs that stand in one figure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from abft_fast.experiments.cell import WITHOUT_RESULT
from abft_fast.experiments.own_data import fixed_data_options
from abft_fast.experiments.records import Record

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
            f"{option}={_model(record) if option == 'model' else value}"
            for option, value in record.options.items()
            if option not in skipped and len({str(other.options.get(option)) for other in same}) > 1
        ]
        full.append(", ".join([name, *differing]))
    return full


def _model(record: Record) -> str:
    return record.labels.get("model") or str(record.options["model"]).rstrip("/").split("/")[-1]
