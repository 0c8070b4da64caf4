"""Run a sweep: plan its cells, run those that are not finished, and keep results.csv up to date."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from abft_fast.errors import Interrupted, RunError, UserError
from abft_fast.experiments import local_engine, ray_engine
from abft_fast.experiments.cell import Cell
from abft_fast.experiments.cell_folder import FAILED, FINISHED, CellFolder, Outcome
from abft_fast.experiments.grid import read_cells
from abft_fast.experiments.records import read_cell
from abft_fast.experiments.results import write_results
from abft_fast.experiments.sweep_file import parse_overrides
from abft_fast.options import SweepConfig
from abft_fast.options.base import shell_command
from abft_fast.runtime import launch
from abft_fast.runtime.files import check_output_folder
from abft_fast.runtime.lock import FolderLock
from abft_fast.runtime.progress import Progress


def plan_sweep(config: SweepConfig) -> list[Cell]:
    """Return the cells of a sweep, after its overrides.

    Raises:
        UserError: the file, an override or an option of any cell is invalid.
    """
    overrides = parse_overrides(config.set)
    for name in ("model", "device"):
        if (value := getattr(config, name)) is not None:
            if name in overrides:
                raise UserError(f"--{name} and --set {name} set the same option: leave one out")
            overrides[name] = value
    return read_cells(config.file, overrides)


def run_sweep(config: SweepConfig, cells: list[Cell], progress: Progress) -> Path:
    """Run the cells that are not finished, and return the sweep's folder.

    Args:
        config: options of the sweep.
        cells: what `plan_sweep` returned.
        progress: where to report the cells that have ended.

    Raises:
        UserError: the folder is in use, or its cells were run with other options.
        RunError: cells failed; the others are finished.
        Interrupted: by Ctrl-C or SIGTERM; the cells' processes have ended.
    """
    if launch.process_count() > 1:
        raise UserError("sweep starts processes of its own: run it without a launcher")
    if config.engine == "ray":
        ray_engine.require_ray()
    folder = config.output_dir or Path("runs") / config.file.stem
    run_cells = ray_engine.run_on_ray if config.engine == "ray" else local_engine.run_here
    with closing(_locked(folder, progress)):
        sweep = _RunningSweep(folder, cells, progress)
        try:
            run_cells(config, sweep.unfinished(), sweep.cell_ended)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted, and the cells were ended; continue with the same command: "
                f"{shell_command('sweep', *config.as_arguments())}"
            ) from None
    if sweep.errors:
        raise RunError(
            f"{len(sweep.errors)} of {len(cells)} cells failed; the same command tries them again: "
            + "; ".join(f"{title}: {error}" for title, error in sweep.errors)
        )
    return folder


class _RunningSweep:
    """The cells in a sweep's folder, the results so far, and the errors of this run.

    Attributes:
        errors: title and error of the cells that failed.
    """

    def __init__(self, folder: Path, cells: list[Cell], progress: Progress) -> None:
        for cell in cells:
            CellFolder(folder / "cells" / cell.name).prepare(cell)
        # The folder may have more cells than the sweep file has now.
        paths = sorted(path.parent for path in folder.glob("cells/*/cell.yaml"))
        self._folder = folder
        self._progress = progress
        self._titles = {cell.name: cell.title for cell in cells}
        self._records = {path.name: read_cell(path) for path in paths}
        self.errors: list[tuple[str, str]] = []
        self._write_results()
        progress.say(f"{folder}: {self._finished()} of {len(cells)} cells are finished")

    def unfinished(self) -> list[Path]:
        """Return the folders of the cells that are not finished, in the order of the file."""
        return [
            self._folder / "cells" / name
            for name in self._titles
            if self._records[name].status != FINISHED
        ]

    def cell_ended(self, name: str, outcome: Outcome, seconds: float) -> None:
        """Add a cell to the results, and report it."""
        self._records[name] = read_cell(self._folder / "cells" / name)
        self._write_results()
        if outcome.status == FAILED:
            self.errors.append((self._titles[name], outcome.error))
        report = f"{self._titles[name]}: {outcome.status} after {seconds:.0f} s"
        if outcome.error:
            report += f", {outcome.error}"
        self._progress.say(f"{report} ({self._finished()} of {len(self._titles)} finished)")

    def _finished(self) -> int:
        return sum(self._records[name].status == FINISHED for name in self._titles)

    def _write_results(self) -> None:
        write_results(self._folder / "results.csv", self._records.values())


def _locked(folder: Path, progress: Progress) -> FolderLock:
    """Make a sweep's folder and hold it for this process alone.

    Raises:
        UserError: another sweep runs in the folder, or the path is no folder.
    """
    check_output_folder(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    busy = f"another sweep runs in {folder}: choose another --output-dir"
    return FolderLock(folder, busy, progress.say)
