"""Read options from flags and a YAML file, write them back, and report mistakes in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from abft_fast.errors import UserError, closest
from abft_fast.options.base import CommandOptions, expanded, flag
from abft_fast.runtime.files import write_text

Config = TypeVar("Config", bound=CommandOptions)


def resolve(kind: type[Config], flags: dict[str, Any]) -> Config:
    """Return options from defaults, the YAML file of `config`, and flags; a later source wins.

    Raises:
        UserError: a value is invalid, or the file is unreadable or holds an unknown option.
    """
    path = expanded(flags.get("config"))
    given = flags if path is None else {**read_yaml(Path(path)), **flags}
    try:
        return kind(**given)
    except ValidationError as error:
        lines = [_mistake_line(kind, mistake, path, flags) for mistake in error.errors()]
        raise UserError("; ".join(lines)) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice; the first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value} is given twice, line {line}")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError: the text is no YAML.
        ValueError: a value is none of its kind, such as the date 2024-13-01.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)  # a safe loader
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, LookupError, TypeError) as error:  # as for `!!timestamp x`
        raise ValueError(f"a value does not fit its tag: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the options of a YAML file.

    Raises:
        UserError: the file is missing, unreadable, or not a mapping of options.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", row {mark.line + 1}" if mark else ""
        raise UserError(f"config {path}{where}: {error.problem or error.context}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {path} cannot be read: {str(error).splitlines()[0]}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must be a mapping of options, such as `k: 4`")
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    if len(options) < len(content):
        names = [str(name).replace("-", "_") for name in content]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"config {path}: {twice} is given twice, with - and with _")
    if "config" in options:
        raise UserError(f"config {path}: config works on the command line only: leave it out")
    return options


def write_yaml(config: CommandOptions, path: Path) -> None:
    """Write a run's options to a file that `--config` can read."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _mistake_line(
    kind: type[CommandOptions],
    mistake: ErrorDetails,
    config_file: str | Path | None,
    flags: Mapping[str, Any],
) -> str:
    """Return one line that names the option, its value, and what is wrong with the value."""
    message = mistake["msg"].removeprefix("Value error, ")
    if not mistake["loc"]:  # about several options together; the message names them
        return message
    option = str(mistake["loc"][0])
    if mistake["type"] == "missing":
        return f"{flag(option)} is missing"
    in_file = config_file is not None and option not in flags
    place = f"config {config_file}: " if in_file else ""
    if mistake["type"] == "extra_forbidden":
        return f"{place}there is no option {option!r}{closest(option, kind.model_fields)}"
    hint = ""
    if mistake["type"] == "literal_error":
        annotation = kind.model_fields[option].annotation
        values = [value for part in (annotation, *get_args(annotation)) for value in get_args(part)]
        hint = closest(str(mistake["input"]), [value for value in values if isinstance(value, str)])
    given = mistake["input"]
    if isinstance(given, list) and get_origin(kind.model_fields[option].annotation) is list:
        given = " ".join(map(str, given))
    return f"{place}{flag(option)} {given}: {message[0].lower()}{message[1:]}{hint}"
