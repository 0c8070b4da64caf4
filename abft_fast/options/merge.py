"""Options of `abft-fast merge`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from abft_fast.options.model import ModelOptions


def checked_adapters(value: Any) -> list[str]:
    """Return a value of `--adapter` as a list of texts.

    Raises:
        ValueError: as `parse_adapters`.
    """
    values = value if isinstance(value, list) else [value]
    values = [str(each) for each in values if each is not None]
    parse_adapters(values)
    return values


class MergeConfig(ModelOptions):
    """Options of `abft-fast merge`."""

    adapter: list[str] = Field(
        description="PEFT adapter folder, or the folder of a model that --trainable model trained "
        "from --model; FOLDER=NUMBER gives it a coefficient other than 1. May "
        "be repeated; folders without commas in their names may be separated by commas. The result "
        "is the model plus the sum of each coefficient times what its folder learnt (paper, Eq. "
        "2).",
        min_length=1,
    )
    output_dir: Path = Field(
        description="New folder for the merged model; plain transformers loads it."
    )

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """Return the adapter folders and their coefficients."""
        return parse_adapters(self.adapter)

    _check_adapter = field_validator("adapter", mode="before")(checked_adapters)


def parse_adapters(values: list[str]) -> list[tuple[Path, float]]:
    """Return the folders and coefficients that values name; a folder that exists is one.

    Raises:
        ValueError: a value is neither folders nor folders with numbers.
    """
    return [pair for value in values for pair in _parse(value)]


def _parse(value: str) -> list[tuple[Path, float]]:
    one = _folder_and_coefficient(value)
    if "," not in value or (one is not None and one[0].is_dir()):
        pairs = [one]
    else:
        pairs = [_folder_and_coefficient(part) for part in value.split(",")]
    if None in pairs:
        raise ValueError("use FOLDER or FOLDER=NUMBER, several by --adapter again or by commas")
    return [pair for pair in pairs if pair is not None]


def _folder_and_coefficient(text: str) -> tuple[Path, float] | None:
    """Split at the last `=`, unless a folder's name has it; return None for anything else."""
    folder, given, factor = text.rpartition("=")
    if not given or "/" in factor or Path(text).is_dir():
        return (Path(text), 1.0) if text else None
    try:
        coefficient = float(factor)
    except ValueError:
        return None
    return (Path(folder), coefficient) if folder and math.isfinite(coefficient) else None
