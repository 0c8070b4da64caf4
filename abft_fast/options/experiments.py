"""Options of `abft-fast sweep` and `table`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from abft_fast.options.base import POSITIONAL, CommandOptions, flag


class SweepConfig(CommandOptions):
    """Options of `abft-fast sweep`."""

    file: Path = Field(
        description="YAML: options of every cell, a grid of lists, named settings.",
        json_schema_extra=POSITIONAL,
    )
    model: str | None = Field(None, description="In place of every model of the file.")
    device: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="Where every cell runs."
    )
    set: list[str] = Field(
        [],
        description="`name=value`, the value in YAML, in place of all that the file says of an "
        "option; a list is an axis; may be repeated.",
    )
    output_dir: Path | None = Field(
        None, description="Folder of the sweep. Unset: runs/<name of the file>."
    )
    jobs: int | None = Field(
        None, ge=1, description="Cells at once. Unset: 1, or with ray all that the cluster holds."
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="Processes of this machine, or tasks of a Ray cluster."
    )
    cell_cpus: int = Field(1, ge=1, description="With ray: CPUs of a cell.")
    cell_gpus: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="With ray: GPUs of a cell. Unset: 1, if any."
    )
    dry_run: bool = Field(False, description="Only say which cells there are.")

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        given = [n for n in ("cell_cpus", "cell_gpus") if n in self.model_fields_set]
        if given and self.engine != "ray":
            raise ValueError(f"{flag(given[0])} is for --engine ray: leave it out")
        return self


class TableConfig(CommandOptions):
    """Options of `abft-fast table`."""

    folder: Path = Field(
        description="A sweep's folder, a run's, or one above them.", json_schema_extra=POSITIONAL
    )
    layout: Literal["1", "2", "3", "4"] = Field(
        "1",
        description="The paper's table: 1 methods by dataset, 2 cost and out of domain, "
        "3 consistency, 4 settings.",
    )
    metric: Literal[
        "accuracy", "macro_f1", "true_label_likelihood", "expected_calibration_error"
    ] = Field("accuracy", description="What is shown, but in layout 3.")
    format: Literal["markdown", "latex"] = Field("markdown", description="How it is written.")
    output: Path | None = Field(None, description="File to write. Unset: standard output.")

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.layout == "3" and "metric" in self.model_fields_set:
            raise ValueError(f"--metric {self.metric}: layout 3 shows consistency: leave it out")
        return self
