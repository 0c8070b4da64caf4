"""Options of every command, and how option names look on the command line."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

POSITIONAL: JsonDict = {"positional": True}


def flag(name: str) -> str:
    """Return an option's name on the command line, such as `--test-file`."""
    return "--" + name.replace("_", "-")


def is_positional(field: FieldInfo) -> bool:
    """Return whether an option is given without its name."""
    return field.json_schema_extra == POSITIONAL


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


class CommandOptions(BaseModel):
    """Options of every command; a field with exclude=True belongs to one call and is not saved."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    debug: bool = Field(False, exclude=True, description="Show tracebacks.")
