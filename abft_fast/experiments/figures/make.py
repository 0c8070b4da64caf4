"""Write a figure: `NAME.csv` and `NAME.svg`."""

from __future__ import annotations

from pathlib import Path

from abft_fast import plots
from abft_fast.experiments.figures.rows import make_rows
from abft_fast.experiments.own_data import check_data_unchanged
from abft_fast.experiments.records import read_records
from abft_fast.options import FigureConfig
from abft_fast.runtime.files import check_output_folder, write_csv, write_text


def make_figure(config: FigureConfig) -> list[Path]:
    """Write the rows and the picture that the options name; return the files.

    Raises:
        UserError: matplotlib is missing, a folder cannot be read or written, no run has what the
            figure shows, or runs contradict one another.
    """
    plots.check_installed("abft-fast figure")
    check_output_folder(config.output_dir)
    records = [record for folder in config.runs for record in read_records(folder)]
    check_data_unchanged(records)
    rows = make_rows(config.what, records, config.metric)
    from abft_fast.experiments.figures.pictures import PICTURES
    from abft_fast.plots import style

    with style.applied():
        picture = style.svg(PICTURES[config.what](rows, config.metric))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    table, image = (config.output_dir / f"{config.what}.{suffix}" for suffix in ("csv", "svg"))
    write_csv(table, rows)
    write_text(image, picture)
    return [table, image]
