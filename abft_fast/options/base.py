"""Options of every command, and how option names look on the command line."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

_NAMES_OR_PATHS = (
    "model", "dataset", "meta_datasets", "training_datasets", "adapter", "mauve_model", "tuned",
    "measure",
)  # fmt: skip
"""Options of type `str` that may name files or folders."""

_TILDE = re.compile(r"(^|,\s*)(~[^,]*)")

POSITIONAL: JsonDict = {"positional": True}


def flag(name: str) -> str:
    """Return an option's name on the command line, such as `--test-file`."""
    return "--" + name.replace("_", "-")


def shell_command(verb: str, *arguments: object) -> str:
    """Return a command as a user gives it to a shell, such as `abft-fast table 'my sweep'`."""
    return shlex.join(["abft-fast", verb, *map(str, arguments)])


def is_positional(field: FieldInfo) -> bool:
    """Return whether an option is given without its name."""
    return field.json_schema_extra == POSITIONAL


def expanded(value: Any) -> Any:
    """Expand the `~` that begins a path, in one path or in several separated by commas.

    A shell expands no `~` in YAML and in `--option=~/file`.

    Raises:
        ValueError: no file can have the name.
    """
    if not isinstance(value, str):
        return value
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError("no file can have this name: it holds half a character") from None
    if "\0" in value:
        raise ValueError("no file can have this name: it holds a NUL character")
    return _TILDE.sub(lambda found: found[1] + os.path.expanduser(found[2]), value)


def name_or_count(value: Any, names: tuple[str, ...], allowed: str) -> str | int:
    """Return one of the names or a whole number from 1.

    Raises:
        ValueError: the value is neither; `allowed` says in words what may be given.
    """
    if value in names:
        return value
    if not isinstance(value, bool) and str(value).isdecimal() and int(value) >= 1:
        return int(value)
    raise ValueError(f"use {allowed}")


def layer_numbers(text: str) -> list[int]:
    """Return the numbers that a text such as `10-20,3` names, each once, in its order.

    Raises:
        ValueError: the text names none.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        if not dash:
            last = first
        is_range = first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10_000
        if not is_range:
            raise ValueError("use a layer, a range such as 10-20, or several by commas")
        layers += range(int(first), int(last) + 1)
    return list(dict.fromkeys(layers))


def _layers(value: Any) -> str | None:
    if value is None:
        return None
    layer_numbers(str(value))
    return str(value)


Layers = Annotated[str | None, BeforeValidator(_layers)]
"""Layers as `layer_numbers` reads them."""

Metric = Literal["accuracy", "macro_f1", "true_label_likelihood", "expected_calibration_error"]
"""Metrics that tables and figures of the paper show."""


class CommandOptions(BaseModel):
    """Options of every command; a field with exclude=True belongs to one call and is not saved."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    debug: bool = Field(False, exclude=True, description="Show tracebacks.")

    @field_validator("*", mode="before")
    @classmethod
    def _expand_home(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        annotation = cls.model_fields[name].annotation
        if name in _NAMES_OR_PATHS or Path in (annotation, *get_args(annotation)):
            if isinstance(value, list):
                return [expanded(part) for part in value]
            return expanded(value)
        return value

    def as_arguments(self, names: Collection[str] | None = None) -> list[str]:
        """Return some options, or those that were given, as a command line has them."""
        wanted = self.model_fields_set if names is None else names
        arguments = []
        for name in filter(wanted.__contains__, type(self).model_fields):
            value = getattr(self, name)
            if is_positional(type(self).model_fields[name]):
                arguments.append(str(value))
            elif isinstance(value, bool):
                arguments.append(flag(name) if value else f"--no-{flag(name)[2:]}")
            else:
                values = value if isinstance(value, list) else [value]
                arguments += [part for each in values for part in (flag(name), str(each))]
        return arguments
