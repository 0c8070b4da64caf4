"""Options of `abft-fast predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from abft_fast.options.data import ColumnOptions
from abft_fast.options.model import PromptOptions, check_stream_placement


class PredictConfig(PromptOptions, ColumnOptions):
    """Options of `abft-fast predict`."""

    on_long_prompt: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What to do with a query whose prompt is longer than the model's context. "
        "drop: leave its predictions empty.",
    )
    adapter: Path | None = Field(None, description="PEFT adapter folder to load on the model.")
    stream: bool = Field(
        False,
        description="Read the model layer by layer, and keep one layer's weights in memory. The "
        "model is read once for about 1,024 rows.",
    )
    stream_states: Literal["memory", "disk"] = Field(
        "memory",
        description="Where --stream keeps the hidden states of the texts between layers. disk: in "
        "files without names on the disk of --output; on a CPU freed memory then goes back to the "
        "system at once, which takes less memory and more time.",
    )
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
            raise ValueError("use a name that ends in .csv or .jsonl, or `-` for standard output")
        return value

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream:
            check_stream_placement(self)
        if self.stream_states == "disk":
            if not self.stream:
                raise ValueError("--stream-states disk needs --stream")
            if self.output is None:
                raise ValueError("--stream-states disk keeps files beside --output: name a file")
        return self
