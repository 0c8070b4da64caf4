"""Options from flags and a YAML file, and back; mistakes in them as one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from abft_fast.data import tables
from abft_fast.errors import UserError
from abft_fast.options.base import CommandOptions, flag
from abft_fast.runtime.files import write_text

C = TypeVar("C", bound=CommandOptions)


def resolve(kind: type[C], flags: dict[str, Any]) -> C:
    """Options from defaults, the YAML file named by `config`, and flags, each over the last.

    Raises:
        UserError: a value is invalid, or the file is unreadable or holds an unknown option.
    """
    merged, path = dict(flags), flags.get("config")
    if path is not None:
        merged = {**read_yaml(Path(path)), **flags}
    try:
        return kind(**merged)
    except ValidationError as error:
        lines = [_one_line(kind, e, path, flags) for e in error.errors()]
        raise UserError("; ".join(lines)) from None


class _EachOnce(yaml.SafeLoader):
    """YAML of which no key is given twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value} is given twice, line {line}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file.

    Raises:
        UserError: it is missing or no mapping of options.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _EachOnce)  # a safe loader
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", row {mark.line + 1}" if mark else ""
        raise UserError(f"config {path}{where}: {error.problem or error.context}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config {path} cannot be read: {str(error).splitlines()[0]}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must be a mapping of options, such as `k: 4`")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def write_yaml(config: CommandOptions, path: Path) -> None:
    """Write a run's options, readable by `--config`."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _one_line(kind: type[CommandOptions], error: dict, path: Any, flags: dict[str, Any]) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several options together, and they are in it
        return message
    option = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{flag(option)} is missing"
    where = f"config {path}: " if path is not None and option not in flags else ""
    if error["type"] == "extra_forbidden":
        return f"{where}no option {option!r}{tables.closest(option, kind.model_fields)}"
    hint = ""
    if error["type"] == "literal_error":
        annotation = kind.model_fields[option].annotation
        allowed = [x for part in (annotation, *get_args(annotation)) for x in get_args(part)]
        hint = tables.closest(str(error["input"]), [x for x in allowed if isinstance(x, str)])
    return f"{where}{flag(option)} {error['input']}: {message[0].lower()}{message[1:]}{hint}"
