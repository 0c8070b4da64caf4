"""The grammar of a sweep file: YAML with `options`, `grid` and `settings`.

    options: {k: 4}
    grid:
      model:
        - builtin
        - Qwen2.5: {model: Qwen/Qwen2.5-32B, quantized: true, seed: [0, 1]}
      seed: [0, 1, 2, 3]
    settings:
      w/o PID: {adaptation: none}

`model` and `seed` are axes. Every entry of an axis, and every setting, is a group of options:
`builtin` is the group `{model: builtin}` without a name, and `Qwen2.5` is a named group, which has
an axis of its own for `seed`.

An option that takes several values at once (`SEVERAL`) may have a list as one value: a list in
`options`, or a list in an axis. Everywhere else a list is an axis, for these options too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from abft_fast.errors import UserError, closest
from abft_fast.options import EvalConfig, TrainConfig
from abft_fast.options.resolve import parse_yaml

OPTIONS = tuple(
    name
    for kind in (TrainConfig, EvalConfig)
    for name, field_info in kind.model_fields.items()
    if not field_info.exclude and name != "adapter"  # an adapter is no method
)
"""The options that a sweep may set."""

SEVERAL = ("test_type",)
"""Options of which one value may be a list."""

PARTS = ("options", "grid", "settings")


@dataclass(frozen=True)
class Group:
    """An entry of an axis, or a setting.

    Attributes:
        options: options with one value.
        label: the group's name in the file; None for a plain value.
        axes: options with several values.
    """

    options: dict[str, Any]
    label: str | None = None
    axes: Axes = field(default_factory=dict)

    def sets(self) -> set[str]:
        """Return the names of the options that the group sets, to one value or to several."""
        return {*self.options, *self.axes}

    def without(self, names: Iterable[str]) -> Group:
        """Return the group less some options."""
        return Group(_without(self.options, names), self.label, _without(self.axes, names))


Axes = dict[str, list[Group]]
"""The groups to choose from, by option."""


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file says.

    Attributes:
        options: options of every cell.
        axes: what to combine.
        settings: named groups, the last axis.
    """

    options: dict[str, Any]
    axes: Axes
    settings: list[Group]

    def override(self, overrides: dict[str, Any]) -> SweepFile:
        """Return the file with some options set to a value, or to a list of values.

        An override replaces whatever the file says of the option, in every part and group.
        """
        values = {name: value for name, value in overrides.items() if not isinstance(value, list)}
        lists = {name: _axis(name, overrides[name]) for name in overrides if name not in values}
        axes = {
            axis: [group.without(overrides) for group in groups]
            for axis, groups in _without(self.axes, overrides).items()
        }
        return SweepFile(
            _without(self.options, overrides) | values,
            axes | lists,
            [group.without(overrides) for group in self.settings],
        )

    def check(self) -> None:
        """Check that the groups do not contradict one another.

        Reject groups of an axis that have the same name. Reject groups that set an option another
        axis defines by name: either group could win, and the other options of the loser would be
        lost with it.

        Raises:
            UserError: there are such groups.
        """
        named = named_axes(self.axes)
        for axis, groups in {**self.axes, "settings": self.settings}.items():
            labels = [group.label for group in groups if group.label is not None]
            for group in groups:
                if group.label is None:
                    continue
                if labels.count(group.label) > 1:
                    raise UserError(f"{axis}: two entries are called {group.label}: rename one")
                both = [o for o in (*group.options, *group.axes) if o in named and o != axis]
                if both:
                    raise UserError(
                        f"{axis}: {group.label} sets {both[0]}, and the named entries of grid: "
                        f"{both[0]} set it too: set it in one of the two places"
                    )


def parse_sweep(content: dict[str, Any]) -> SweepFile:
    """Parse the content of a sweep file.

    Raises:
        UserError: a part has another form, or names an option that does not exist.
    """
    for part in content:
        require_known(part, PARTS, "part", "the file")
    options = _options(content.get("options"), "options")
    axes = {
        _option(axis, "grid"): _axis(axis, entries)
        for axis, entries in _mapping(content.get("grid"), "grid").items()
    }
    settings = [
        _group(name, _options(given, f"settings: {name}", lists=True), f"settings: {name}")
        for name, given in _mapping(content.get("settings"), "settings").items()
    ]
    return SweepFile(options, axes, settings)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `name=value` pairs; the value is YAML.

    Example: `["seed=[0, 1]", "train-samples=8"]` gives `{"seed": [0, 1], "train_samples": 8}`.

    Raises:
        UserError: a text is no such pair, or names no option, or two of them name the same one.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: use NAME=VALUE, such as seed=1 or 'seed=[0, 1]'")
        option = _option(name.strip(), "--set")
        if option in overrides:
            raise UserError(f"--set {option} is given twice: give a list, as '{option}=[0, 1]'")
        try:
            overrides[option] = parse_yaml(value)
        except (ValueError, yaml.YAMLError):
            raise UserError(f"--set {pair}: the value is not YAML") from None
    return overrides


def named_axes(axes: Axes) -> Axes:
    """Return the axes of which at least one group has a name."""
    return {axis: groups for axis, groups in axes.items() if any(g.label for g in groups)}


def require_known(name: str, names: Iterable[str], kind: str, where: str) -> None:
    """Raise UserError, with the closest name as a hint, unless a name is one of `names`."""
    if name in names:
        return
    hint = closest(name, names) or f"; use one of {', '.join(names)}"
    raise UserError(f"{where}: there is no {kind} {name}{hint}")


def _axis(axis: str, entries: Any, where: str = "grid") -> list[Group]:
    """Return the groups of an axis: plain values, or one name and its options each."""
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{where}: {axis} must be a list of one value or more, such as [{_example(axis)}]"
        )
    groups = []
    for entry in entries:
        if not isinstance(entry, dict):
            groups.append(Group({axis: _value(axis, entry, f"{where}: {axis}")}))
            continue
        if len(entry) != 1:
            raise UserError(
                f"{where}: {axis}: an entry must be a value, or one name and its options: "
                f"`- name: {{{axis}: {_example(axis)}, ...}}`"
            )
        ((name, given),) = entry.items()
        place = f"{where}: {axis}: {name}"
        group = _group(str(name), _options(given, place, lists=True), place)
        if axis not in group.options:
            raise UserError(f"{place} does not set {axis}")
        groups.append(group)
    return groups


def _group(label: str, given: dict[str, Any], where: str) -> Group:
    values = {name: value for name, value in given.items() if not isinstance(value, list)}
    axes = {name: _axis(name, value, where) for name, value in given.items() if name not in values}
    return Group(values, label, axes)


def _options(given: Any, where: str, *, lists: bool = False) -> dict[str, Any]:
    options = {}
    for name, value in _mapping(given, where).items():
        option = _option(name, where)
        is_list = isinstance(value, list)
        if is_list and not lists and option not in SEVERAL:
            raise UserError(f"{where}: {name} is a list: put several values under `grid`")
        options[option] = value if is_list and lists else _value(option, value, where)
    return options


def _value(option: str, value: Any, where: str) -> Any:
    """Return one value of an option; several at once as a command line has them, by commas."""
    if option in SEVERAL and isinstance(value, list) and value:
        return ",".join(str(_value("", part, where)) for part in value)
    if isinstance(value, dict | list):
        raise UserError(f"{where}: an option cannot have the value {value}")
    return value


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"{where} must be a mapping, such as `k: 4`")
    return {str(name): value for name, value in given.items()}


def _option(name: str, where: str) -> str:
    """Return an option's name with underscores."""
    name = name.replace("-", "_")
    require_known(name, OPTIONS, "option", where)
    return name


def _example(axis: str) -> str:
    field_info = TrainConfig.model_fields.get(axis) or EvalConfig.model_fields[axis]
    return str(field_info.default)


def _without(mapping: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}
