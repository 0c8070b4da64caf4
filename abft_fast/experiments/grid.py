"""Expand a sweep file into its cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from abft_fast.errors import UserError
from abft_fast.experiments.cell import CALIBRATIONS, Cell
from abft_fast.experiments.sweep_file import (
    PARTS,
    Group,
    SweepFile,
    named_axes,
    parse_sweep,
    require_known,
)
from abft_fast.options import EvalConfig, TrainConfig, datasets
from abft_fast.options.resolve import read_yaml, resolve

_METHODS = (*get_args(TrainConfig.model_fields["method"].annotation), *CALIBRATIONS)


def read_cells(path: Path, overrides: dict[str, Any]) -> list[Cell]:
    """Read the cells of a sweep file, in its order; cells with the same options are one.

    Args:
        path: the sweep file.
        overrides: values, or lists of values, by option; see `SweepFile.override`.

    Raises:
        UserError: the file or an option of any cell is invalid.
    """
    content = read_yaml(path)
    if not content:
        raise UserError(f"sweep {path} is empty: it needs at least one of {', '.join(PARTS)}")
    try:
        file = parse_sweep(content).override(overrides)
        file.check()
    except UserError as error:
        raise UserError(f"sweep {path}: {error}") from None
    cells: dict[str, Cell] = {}
    axes = list(file.axes)
    for options, groups in _combinations(file):
        try:
            cell = _cell(options, groups, axes)
        except UserError as error:
            raise UserError(f"sweep {path}: {_title(options, groups, axes)}: {error}") from None
        cells.setdefault(cell.name, cell)
    return list(cells.values())


def _combinations(file: SweepFile) -> Iterator[tuple[dict[str, Any], dict[str, Group]]]:
    """Yield the options of every combination, and its named groups by axis.

    If a named group sets an option, it overrides that option's grid values; a setting also
    overrides the groups of the grid.
    """
    with_names = named_axes(file.axes)
    plain_axes = {axis: groups for axis, groups in file.axes.items() if axis not in with_names}
    levels = list(with_names.items())
    if file.settings:
        levels.append(("setting", file.settings))
    for combination in itertools.product(*(groups for _, groups in levels)):
        values = dict(file.options)
        axes = dict(plain_axes)
        for group in combination:
            for name in group.sets():
                axes.pop(name, None)
                values.pop(name, None)
            values.update(group.options)
            axes.update(group.axes)
        groups = {
            axis: group
            for (axis, _), group in zip(levels, combination, strict=True)
            if group.label is not None
        }
        for choices in itertools.product(*axes.values()):
            options = dict(values)
            for choice in choices:
                options.update(choice.options)
            yield options, groups


def _cell(options: dict[str, Any], groups: dict[str, Group], axes: list[str]) -> Cell:
    method = str(options.get("method", "ABFT"))
    if method.lower() not in map(str.lower, _METHODS):
        require_known(method, _METHODS, "method", "--method")
    if method.lower() in CALIBRATIONS:
        return _evaluation_cell(method.lower(), options, groups, axes)
    config = resolve(TrainConfig, options)
    datasets.refuse_streams(config, "every cell")
    files = tuple(datasets.file_hashes(config).items())
    title = _title(options, groups, axes)
    return Cell("train", config.method, config, _labels(groups), title, files)


def _evaluation_cell(
    method: str, options: dict[str, Any], groups: dict[str, Group], axes: list[str]
) -> Cell:
    """Return the cell of a method that only evaluates.

    The cell drops seeds and other options of training, and the groups that set nothing else, so
    that a grid of them gives one cell.
    """
    options = {name: value for name, value in options.items() if name in EvalConfig.model_fields}
    groups = {
        axis: group
        for axis, group in groups.items()
        if not group.sets().isdisjoint({"method", *options})
    }
    calibration = CALIBRATIONS[method]
    given = options.get("calibration", calibration)
    if given != calibration:
        raise UserError(
            f"method {method} uses calibration {calibration}, not {given}: set calibration for a "
            f"method that trains, as in `- ABFT: {{method: ABFT, calibration: {given}}}`"
        )
    config = resolve(EvalConfig, {**options, "calibration": calibration})
    datasets.refuse_streams(config, "every cell")
    files = tuple(datasets.file_hashes(config).items())
    title = _title({**options, "method": method}, groups, axes)
    return Cell("eval", method, config, _labels(groups), title, files)


def _labels(groups: dict[str, Group]) -> dict[str, str]:
    return {axis: group.label for axis, group in groups.items() if group.label is not None}


def _title(options: dict[str, Any], groups: dict[str, Group], axes: list[str]) -> str:
    """Return one line for people, such as `big sst2 ABFT w/o PID seed=0`."""
    first = ("model", "dataset", "method")
    words: dict[str, Any] = {axis: options[axis] for axis in first if axis in options}
    words |= _labels(groups)
    words |= {a: f"{a}={options[a]}" for a in axes if a in options and a not in words}
    return " ".join(map(str, words.values())) or "its cell"
