"""Options of `abft-fast merge`."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, field_validator

from abft_fast.options.model import ModelOptions


class MergeConfig(ModelOptions):
    """Options of `abft-fast merge`."""

    adapter: str = Field(
        description="PEFT adapter folders, separated by commas. FOLDER=NUMBER gives an adapter "
        "a coefficient other than 1. The result is the model plus the sum of each coefficient "
        "times what its adapter learnt (paper, Eq. 2)."
    )
    output_dir: Path = Field(
        description="New folder for the merged model; plain transformers loads it."
    )

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """Return the adapter folders and their coefficients."""
        return self._parse(self.adapter)

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, value: str) -> str:
        cls._parse(value)
        return value

    @staticmethod
    def _parse(value: str) -> list[tuple[Path, float]]:
        adapters = []
        for part in value.split(","):
            folder, given, factor = part.partition("=")
            try:
                coefficient = float(factor) if given else 1.0
            except ValueError:
                coefficient = math.nan
            if not folder or not math.isfinite(coefficient):
                raise ValueError("use FOLDER or FOLDER=NUMBER, several separated by commas")
            adapters.append((Path(folder), coefficient))
        return adapters
