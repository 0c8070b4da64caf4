"""A sweep file: options, a grid and settings in YAML, expanded into cells and validated."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from abft_fast.data import own
from abft_fast.errors import UserError
from abft_fast.options import EvalConfig, TrainConfig
from abft_fast.options.resolve import read_yaml, resolve

EVALUATED = {"vanilla": "none", "contextual": "contextual", "domain": "domain", "batch": "batch"}
"""Methods that train nothing, and the calibration each is."""

_METHODS = (*get_args(TrainConfig.model_fields["method"].annotation), *EVALUATED)

WHERE = frozenset({"device", "device_map"})
"""Options that say where a cell runs, which is no part of what it is."""

_PARTS = ("options", "grid", "settings")


@dataclass(frozen=True)
class Cell:
    """One process of a sweep.

    Attributes:
        command: `train` or `eval`.
        method: an option of `train`, or a key of `EVALUATED`.
        config: its options.
        labels: names of the groups it is of, by axis; `setting` for those under `settings`.
        title: what it is, in the words of the file.
        data: path and SHA-256 of each file, of the user's own data.
    """

    command: str
    method: str
    config: TrainConfig | EvalConfig
    labels: dict[str, str]
    title: str
    data: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """A folder's name, from options and data alone: the same wherever this cell is."""
        given = self.config.model_dump(mode="json", exclude_defaults=True, exclude=set(WHERE))
        digests = [digest for _, digest in self.data]
        identity = json.dumps([self.command, self.method, given, digests], sort_keys=True)
        parts = [_last_part(self.config.model), _last_part(self.config.dataset_name), self.method]
        if self.command == "train":
            parts.append(f"seed{self.config.seed}")
        return "-".join([*parts, hashlib.sha256(identity.encode()).hexdigest()[:10]])


@dataclass(frozen=True)
class _Group:
    """An entry of an axis: options, and a name where the file gives one."""

    options: dict[str, Any]
    label: str | None = None
    axes: dict[str, list[_Group]] = field(default_factory=dict)  # lists among its options


def read_cells(path: Path, overrides: dict[str, Any]) -> list[Cell]:
    """The cells of a sweep file, in its order; cells with the same options are one.

    Args:
        overrides: option to value, or to a list of values; each takes the place of what the file
            says of it anywhere.

    Raises:
        UserError: the file or an option of any cell is invalid.
    """
    content = read_yaml(path)
    if not content:
        raise UserError(f"sweep {path} is empty: it needs {', '.join(_PARTS)}, or one of them")
    try:
        for part in content:
            _known(part, _PARTS, "part", "the file")
        options = _options(content.get("options"), "options")
        grid = _mapping(content.get("grid"), "grid")
        axes = {_option(axis, "grid"): _axis(axis, listed) for axis, listed in grid.items()}
        settings = [
            _group(str(name), _options(given, f"settings: {name}", lists=True))
            for name, given in _mapping(content.get("settings"), "settings").items()
        ]
        options, axes, settings = _override(options, axes, settings, overrides)
        _check_groups(axes, settings)
    except UserError as error:
        raise UserError(f"sweep {path}: {error}") from None
    cells: dict[str, Cell] = {}
    for chosen, groups in _expand(axes, settings):
        try:
            cell = _cell({**options, **chosen}, groups, list(axes))
        except UserError as error:
            title = _title({**options, **chosen}, groups, list(axes))
            raise UserError(f"sweep {path}: {title}: {error}") from None
        cells.setdefault(cell.name, cell)
    return list(cells.values())


def parse_overrides(given: Iterable[str]) -> dict[str, Any]:
    """`name=value` pairs, the value in YAML.

    Raises:
        UserError: it is no such pair, or no such option.
    """
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: use NAME=VALUE, such as seed=1 or 'seed=[0, 1]'")
        try:
            found[_option(name.strip().replace("-", "_"), "--set")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {pair}: the value is no YAML") from None
    return found


def _expand(
    axes: dict[str, list[_Group]], settings: list[_Group]
) -> Iterator[tuple[dict[str, Any], dict[str, _Group]]]:
    """Options of every combination, and the named groups they are of, by axis.

    Named groups choose first, settings after those of the grid, as what they say of an option
    takes the place of its axis.
    """
    named = {axis: groups for axis, groups in axes.items() if any(g.label for g in groups)}
    plain = {axis: groups for axis, groups in axes.items() if axis not in named}
    levels = [*named.items(), *([("setting", settings)] if settings else [])]
    for combination in itertools.product(*(groups for _, groups in levels)):
        said: dict[str, Any] = {}
        left = dict(plain)
        for group in combination:
            for name in {**group.options, **group.axes}:
                left.pop(name, None)
                said.pop(name, None)
            said.update(group.options)
            left.update(group.axes)
        groups = {
            axis: group
            for (axis, _), group in zip(levels, combination, strict=True)
            if group.label is not None
        }
        for values in itertools.product(*left.values()):
            options = dict(said)
            for value in values:
                options.update(value.options)
            yield options, groups


def _check_groups(axes: dict[str, list[_Group]], settings: list[_Group]) -> None:
    """No two groups of an axis have one name, and none says what other groups are there for.

    Either could choose, and what the other says besides would go with it.
    """
    named = {axis for axis, groups in axes.items() if any(g.label for g in groups)}
    for axis, groups in {**axes, "settings": settings}.items():
        names = [group.label for group in groups if group.label is not None]
        for group in groups:
            if names.count(group.label) > 1:
                raise UserError(f"{axis}: two entries are called {group.label}: rename one")
            others = [o for o in (*group.options, *group.axes) if o in named and o != axis]
            if others and group.label is not None:
                raise UserError(
                    f"{axis}: {group.label} says {others[0]}, and so do the named entries of "
                    f"grid: {others[0]}: say it in one of the two places"
                )


def _cell(options: dict[str, Any], groups: dict[str, _Group], axes: list[str]) -> Cell:
    method = str(options.get("method", "ABFT"))
    if method.lower() not in map(str.lower, _METHODS):
        _known(method, _METHODS, "method", "--method")
    if method.lower() in EVALUATED:
        # Seeds, and whatever else is of training alone, would only repeat the cell.
        options = {
            name: value for name, value in options.items() if name in EvalConfig.model_fields
        }
        groups = {
            axis: group
            for axis, group in groups.items()
            if not {"method", *options}.isdisjoint([*group.options, *group.axes])
        }
        method = method.lower()
        if options.get("calibration", EVALUATED[method]) != EVALUATED[method]:
            raise UserError(
                f"method {method} is calibration {EVALUATED[method]}, not "
                f"{options['calibration']}: name calibration where a method trains, as in "
                f"`- ABFT: {{method: ABFT, calibration: {options['calibration']}}}`"
            )
        config = resolve(EvalConfig, {**options, "calibration": EVALUATED[method]})
        title = _title({**options, "method": method}, groups, axes)
        command = "eval"
    else:
        config = resolve(TrainConfig, options)
        title, method, command = _title(options, groups, axes), config.method, "train"
    labels = {axis: group.label for axis, group in groups.items()}
    files = tuple(own.file_hashes(config).items())
    return Cell(command, method, config, labels, title, files)


def _title(options: dict[str, Any], groups: dict[str, _Group], axes: list[str]) -> str:
    words = {axis: options[axis] for axis in ("model", "dataset", "method") if axis in options}
    words |= {axis: group.label for axis, group in groups.items()}
    words |= {a: f"{a}={options[a]}" for a in axes if a in options and a not in words}
    return " ".join(map(str, words.values())) or "its cell"


def _override(
    options: dict[str, Any],
    axes: dict[str, list[_Group]],
    settings: list[_Group],
    overrides: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, list[_Group]], list[_Group]]:
    """Each override out of everything, then in its one place."""

    def without(groups: list[_Group]) -> list[_Group]:
        return [
            _Group(
                {n: v for n, v in group.options.items() if n not in overrides},
                group.label,
                {n: v for n, v in group.axes.items() if n not in overrides},
            )
            for group in groups
        ]

    axes = {axis: without(groups) for axis, groups in axes.items() if axis not in overrides}
    options = {name: value for name, value in options.items() if name not in overrides}
    for name, value in overrides.items():
        if isinstance(value, list):
            axes[name] = _axis(name, value)
        else:
            options[name] = value
    return options, axes, without(settings)


def _axis(axis: str, listed: Any) -> list[_Group]:
    if not isinstance(listed, list) or not listed:
        raise UserError(f"grid: {axis} must be a list, such as [{_example(axis)}]")
    groups = []
    for entry in listed:
        if not isinstance(entry, dict):
            groups.append(_Group({axis: _scalar(entry, f"grid: {axis}")}))
            continue
        if len(entry) != 1:
            raise UserError(
                f"grid: {axis}: an entry is a value, or one name and its options: "
                f"`- name: {{{axis}: {_example(axis)}, ...}}`"
            )
        ((name, given),) = entry.items()
        where = f"grid: {axis}: {name}"
        group = _group(str(name), _options(given, where, lists=True))
        if axis not in group.options:
            raise UserError(f"{where} does not say which {axis} it is")
        groups.append(group)
    return groups


def _group(label: str, given: dict[str, Any]) -> _Group:
    scalars = {name: value for name, value in given.items() if not isinstance(value, list)}
    lists = {name: _axis(name, value) for name, value in given.items() if name not in scalars}
    return _Group(scalars, label, lists)


def _options(given: Any, where: str, *, lists: bool = False) -> dict[str, Any]:
    found = {}
    for name, value in _mapping(given, where).items():
        if isinstance(value, list) and not lists:
            raise UserError(f"{where}: {name} is a list: several values go under `grid`")
        found[_option(name, where)] = value if isinstance(value, list) else _scalar(value, where)
    return found


def _scalar(value: Any, where: str) -> Any:
    if isinstance(value, dict | list):
        raise UserError(f"{where}: {value} is no value of an option")
    return value


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping, such as `k: 4`")
    return {str(name): value for name, value in given.items()}


def _option(name: str, where: str) -> str:
    return _known(name.replace("-", "_"), OPTIONS, "option", where)


def _known(name: str, names: Iterable[str], kind: str, where: str) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, list(names), 1) or difflib.get_close_matches(
        name.lower(), list(names), 1
    )
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise UserError(f"{where}: no {kind} {name}; {hint}")


def _example(axis: str) -> str:
    field = TrainConfig.model_fields.get(axis) or EvalConfig.model_fields[axis]
    return str(field.default)


def _last_part(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", str(name).rstrip("/").split("/")[-1])


OPTIONS = tuple(
    name
    for kind in (TrainConfig, EvalConfig)
    for name, field in kind.model_fields.items()
    if not field.exclude and name != "adapter"  # an adapter is no method
)
"""Options that a sweep may set."""
