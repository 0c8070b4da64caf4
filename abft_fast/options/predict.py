"""Options of `abft-fast predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from abft_fast.options.data import ColumnOptions
from abft_fast.options.model import PromptOptions


class PredictConfig(PromptOptions, ColumnOptions):
    """Options of `abft-fast predict`."""

    on_long_prompt: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What to do with a query whose prompt is longer than the model's context. "
        "drop: leave its predictions empty.",
    )
    adapter: Path | None = Field(None, description="PEFT adapter folder to load on the model.")
    demonstrations: Path = Field(
        description="File of texts and labels. Every prompt begins with all of them, in the "
        "order of the file."
    )
    input: Path = Field(description="File of the texts to label.")
    output: Path | None = Field(
        None,
        description="File to write, .csv or .jsonl. It gets the input's columns, `prediction`, "
        "and `p_WORD` for each label word. Unset or `-`: CSV to standard output.",
    )

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the adapters that the options name."""
        return [] if self.adapter is None else [self.adapter]

    @field_validator("output")
    @classmethod
    def _check_output(cls, value: Path | None) -> Path | None:
        if value is None or str(value) == "-":
            return None
        if value.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError("use a name that ends in .csv or .jsonl")
        return value
