"""What every command has, and the names of options on the command line."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

POSITIONAL = {"positional": True}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def is_positional(field: FieldInfo) -> bool:
    """Whether an option is given without its name."""
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
    """What every command has; a field with exclude=True is of one call only."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    debug: bool = Field(False, exclude=True, description="Show tracebacks.")
