"""Options of `abft-fast report`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from abft_fast.options.base import POSITIONAL, CommandOptions


class ReportConfig(CommandOptions):
    """Options of `abft-fast report`."""

    runs: list[Path] = Field(
        description="Folders of runs, one or several.", json_schema_extra=POSITIONAL, min_length=1
    )
    output: Path = Field(Path("report.html"), description="HTML file to write.")
