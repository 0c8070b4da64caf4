"""Write the report of runs: by its own verb, and at the end of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from abft_fast import plots
from abft_fast.reporting.run_data import read_run
from abft_fast.runtime.files import write_text


def report(folders: Sequence[Path], output: Path) -> None:
    """Write one page about runs.

    Args:
        folders: the folders of the runs.
        output: the HTML file.

    Raises:
        UserError: a package is missing, or a folder holds no run or is damaged.
    """
    plots.check_installed("abft-fast report")
    from abft_fast.reporting.page import render

    write_text(output, render([test for folder in folders for test in read_run(folder)]))


def report_of_training(folder: Path, say: Callable[[str], None]) -> None:
    """Write `report.html` into the folder of a finished run; say why where there is none.

    The run is whole without its report, so no error of it may end the run.
    """
    if lacking := plots.missing():
        say(f"no report.html, which needs {' and '.join(lacking)}: {plots.INSTALL}")
        return
    try:
        report([folder], folder / "report.html")
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else ""
        say(f"no report.html ({type(error).__name__}: {line}): the run itself is complete")
