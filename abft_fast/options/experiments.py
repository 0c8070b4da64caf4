"""Options of `abft-fast sweep` and `table`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from abft_fast.options.base import POSITIONAL, CommandOptions, Metric, flag


class SweepConfig(CommandOptions):
    """Options of `abft-fast sweep`."""

    file: Path = Field(
        description="YAML file: options of every cell, a grid of lists, named settings.",
        json_schema_extra=POSITIONAL,
    )
    model: str | None = Field(None, description="Model that replaces every model of the file.")
    device: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="Device that every cell runs on."
    )
    set: list[str] = Field(
        [],
        description="`name=value`, the value in YAML. It replaces everything that the file says "
        "about the option. A list makes an axis. May be repeated.",
    )
    output_dir: Path | None = Field(
        None, description="Folder of the sweep. Unset: runs/<name of the file>."
    )
    jobs: int | None = Field(
        None,
        ge=1,
        description="Cells to run at once. Unset: 1; with --engine ray, as many as the cluster "
        "holds.",
    )
    engine: Literal["local", "ray"] = Field(
        "local",
        description="What runs the cells. local: processes of this machine. ray: tasks of a Ray "
        "cluster.",
    )
    cell_cpus: int = Field(1, ge=1, description="CPUs of a cell, with --engine ray.")
    cell_gpus: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs of a cell, with --engine ray. Unset: 1 if the cluster has a GPU, else 0.",
    )
    dry_run: bool = Field(False, description="Only list the cells.")

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        given = [n for n in ("cell_cpus", "cell_gpus") if n in self.model_fields_set]
        if given and self.engine != "ray":
            raise ValueError(
                f"{flag(given[0])} works with --engine ray only: leave this option out"
            )
        return self


class TableConfig(CommandOptions):
    """Options of `abft-fast table`."""

    folder: Path = Field(
        description="Folder of a sweep or a run, or a folder above them.",
        json_schema_extra=POSITIONAL,
    )
    layout: Literal["1", "2", "3", "4", "labels"] = Field(
        "1",
        description="Table of the paper. 1: methods by dataset. 2: cost, and accuracy out of "
        "domain. 3: consistency. 4: settings. labels, which is not the paper's: accuracy when "
        "label words change, by --test-type LabelFollowing.",
    )
    metric: Metric = Field("accuracy", description="Metric to show in layouts 1, 2 and 4.")
    format: Literal["markdown", "latex"] = Field("markdown", description="Format of the table.")
    output: Path | None = Field(None, description="File to write. Unset: standard output.")

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        shown = {"3": "consistency", "labels": "its own metrics"}.get(self.layout)
        if shown and "metric" in self.model_fields_set:
            raise ValueError(
                f"--metric {self.metric}: layout {self.layout} always shows {shown}: leave "
                "--metric out"
            )
        return self
