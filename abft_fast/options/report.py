"""Options of `abft-fast report` and `figure`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from abft_fast.options.base import POSITIONAL, CommandOptions, Metric


class ReportConfig(CommandOptions):
    """Options of `abft-fast report`."""

    runs: list[Path] = Field(
        description="Folders of runs, one or several.", json_schema_extra=POSITIONAL, min_length=1
    )
    output: Path = Field(Path("report.html"), description="HTML file to write.")


class FigureConfig(CommandOptions):
    """Options of `abft-fast figure`."""

    what: Literal["heads", "factors", "data", "unseen", "demonstrations", "losses"] = Field(
        description="Figure of the paper. heads: induction heads over training (Figs 5, 20-28). "
        "factors: score by A and B, with and without control (Fig. 6). data: score by the number "
        "of training prompts (Figs 3, 15). unseen: score where no demonstration has the query's "
        "label (Fig. 2). demonstrations: score by --k. losses: ABFT's loss and the correct share "
        "of every method's batches (section 6).",
        json_schema_extra=POSITIONAL,
    )
    runs: list[Path] = Field(
        description="Folders of runs or sweeps, or folders above them.",
        json_schema_extra=POSITIONAL,
        min_length=1,
    )
    metric: Metric = Field("accuracy", description="Metric of figures that show scores.")
    output_dir: Path = Field(
        Path("analysis"), description="Folder for the CSV and the SVG, both by the figure's name."
    )
