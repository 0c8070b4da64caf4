"""Name what distinguishes runs that stand in one figure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from abft_fast.experiments.cell import CALIBRATIONS, SAID_BY_METHOD, WITHOUT_RESULT
from abft_fast.experiments.own_data import fixed_data_options
from abft_fast.experiments.records import Record, ambiguous
from abft_fast.options import TrainConfig
from abft_fast.training.run_folder import MOVABLE

_NEVER = WITHOUT_RESULT | {"dataset", "seed", "output_dir", "generalization_test"}
"""Options that are a panel or a band of a figure, or change no result."""


def setting_names(records: Sequence[Record], without: Collection[str] = ()) -> list[str]:
    """Return a name for each record; records of one name differ in dataset and seed alone.

    A name is the sweep file's name of the setting, or the method; both where methods share a
    setting, and the method where nothing is trained. Where records of one such name have different
    options, the name says these too, with paths shortened as far as they stay distinct.

    Args:
        records: all runs of the figure.
        without: options that the figure shows in another way.

    Raises:
        UserError: two datasets have one name, so their runs could not be told apart.
    """
    labels = [_label(record) for record in records]
    shared = ambiguous((label, r.method) for label, r in zip(labels, records, strict=True))
    names = [
        f"{record.method}, {label}" if label in shared else label
        for label, record in zip(labels, records, strict=True)
    ]
    skipped = {*_NEVER, *without, *fixed_data_options(records), "method"}
    full = []
    for name, record in zip(names, records, strict=True):
        same = [other for own, other in zip(names, records, strict=True) if own == name]
        own_skipped = skipped | SAID_BY_METHOD if record.method in CALIBRATIONS else skipped
        differing = [
            f"{option}={_shown(record, option, same)}"
            for option in record.options
            if option not in own_skipped and len({str(_value(other, option)) for other in same}) > 1
        ]
        full.append(", ".join([name, *differing]))
    return full


def _label(record: Record) -> str:
    """Return the sweep file's name of the setting, or the method."""
    setting = None if record.method in CALIBRATIONS else record.labels.get("setting")
    return setting or record.method


def _value(record: Record, option: str) -> object:
    """Return an option's value: its default where the option did not exist yet."""
    field = TrainConfig.model_fields.get(option)
    return record.options.get(option, None if field is None else field.default)


def _shown(record: Record, option: str, others: Sequence[Record]) -> object:
    """Return an option's value as a figure has it: of a path, the last part if none shares it."""
    pairs = ((str(_short(other, option)), str(_value(other, option))) for other in others)
    short = _short(record, option)
    return record.options[option] if str(short) in ambiguous(pairs) else short


def _short(record: Record, option: str) -> object:
    """Return the sweep file's name of the model, the last part of a path, or the value."""
    if option == "model" and record.labels.get("model"):
        return record.labels["model"]
    value = _value(record, option)
    is_path = option in ("model", *MOVABLE) and value
    return str(value).rstrip("/").split("/")[-1] if is_path else value
