"""A cell of a sweep on disk: its folder, its process, and how the process ended.

The folder has `cell.yaml` (the options), `labels.json` (how the sweep file calls the cell),
`output.log` (the output of the process), `status.json` (how the process ended), and `run/` after
training or `metrics.json` after an evaluation.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from abft_fast.data.own import sha256
from abft_fast.errors import UserError
from abft_fast.experiments.cell import PLACEMENT, Cell
from abft_fast.options import flag
from abft_fast.options.resolve import read_yaml, write_yaml
from abft_fast.runtime.files import write_json
from abft_fast.training.run_folder import MOVABLE, RunFolder

POLL_SECONDS = 0.1
"""How long to sleep between two looks at a process."""

FINISHED, FAILED, UNFINISHED, WAITING = "finished", "failed", "unfinished", "waiting"

_STARTED = "started: "  # begins the line before each command's output in output.log


class Outcome(NamedTuple):
    """How far a cell is: `finished`, `failed`, `unfinished` or `waiting`, and why it failed."""

    status: str
    error: str = ""


CellEnded = Callable[[str, Outcome, float], None]
"""A function to call with a cell's name, outcome and seconds when the cell has ended."""


@dataclass(frozen=True)
class CellFolder:
    """The folder of a cell, which may not exist yet."""

    folder: Path

    @property
    def run(self) -> Path:
        """The run folder that training makes."""
        return self.folder / "run"

    @property
    def metrics(self) -> Path:
        """The file that an evaluation writes."""
        return self.folder / "metrics.json"

    @property
    def about(self) -> dict[str, Any]:
        """The content of labels.json: `command`, `method`, `title`, `labels` and `data`."""
        return json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the cell."""
        return read_yaml(self.folder / "cell.yaml")

    @property
    def outcome(self) -> Outcome:
        """How far the cell is."""
        path = self.folder / "status.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return Outcome(content["status"], content["line"])
        started = (self.folder / "output.log").exists()
        return Outcome(UNFINISHED if started else WAITING)

    def prepare(self, cell: Cell) -> None:
        """Make the folder, or check that the existing folder is this cell's.

        Raises:
            UserError: the cell was run with other options, as another version's defaults are.
        """
        options = cell.config.model_dump(mode="json")
        movable = {*PLACEMENT, *MOVABLE}  # a cell's name has the content of its files
        if (self.folder / "cell.yaml").is_file():
            for name, value in self.options.items():
                if name in options and name not in movable and options[name] != value:
                    raise UserError(
                        f"{self.folder} was run with {name} {value}, but this sweep asks for "
                        f"{options[name]}: choose another --output-dir"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        labels = {
            "command": cell.command,
            "method": cell.method,
            "data": dict(cell.data),
            "title": cell.title,
            "labels": cell.labels,
        }
        write_json(self.folder / "labels.json", labels)
        write_yaml(cell.config, self.folder / "cell.yaml")  # last: it makes the folder a cell

    def command(self) -> list[str]:
        """Return the command that starts the cell, or resumes it."""
        program = [sys.executable, "-m", "abft_fast"]
        options = ["--config", str(self.folder / "cell.yaml")]
        if self.about["command"] == "eval":
            return [*program, "eval", *options, "--output", str(self.metrics)]
        run = RunFolder(self.run)
        if run.is_begun:
            cell, before = self.options, run.options
            names = sorted(PLACEMENT) + [n for n in MOVABLE if cell[n] != before[n]]
            anew = [part for name in names for part in (flag(name), cell[name])]
            return [*program, "train", "--resume", str(self.run), *anew]
        return [*program, "train", *options, "--output-dir", str(self.run)]

    def start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the cell's process, which ends when this process does.

        Args:
            environment: variables to add to this process's own.

        Raises:
            UserError: a data file has changed since the sweep was planned.
        """
        self._check_data()
        if not RunFolder(self.run).is_begun:
            shutil.rmtree(self.run, ignore_errors=True)  # killed before it could be resumed
        command = self.command()
        (self.folder / "status.json").unlink(missing_ok=True)
        with (self.folder / "output.log").open("ab") as log:
            log.write(f"{_STARTED}{shlex.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C reaches only the sweep, which then ends its cells
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one call of the kernel, no lock
            )

    def finish(self, exit_code: int, seconds: float) -> Outcome:
        """Write status.json after the process ended, and return the outcome."""
        if exit_code != 0:
            return self._write_status(Outcome(FAILED, self._error(exit_code)), seconds)
        try:
            self._check_data_used()
        except UserError as error:
            self.metrics.unlink(missing_ok=True)
            shutil.rmtree(self.run, ignore_errors=True)  # it cannot go on with the right data
            return self._write_status(Outcome(FAILED, str(error)), seconds)
        return self._write_status(Outcome(FINISHED), seconds)

    def fail(self, error: UserError) -> Outcome:
        """Write status.json of a cell that could not start, and return the outcome."""
        return self._write_status(Outcome(FAILED, str(error)), 0)

    def _write_status(self, outcome: Outcome, seconds: float) -> Outcome:
        content = {"status": outcome.status, "line": outcome.error, "seconds": round(seconds, 1)}
        write_json(self.folder / "status.json", content)
        return outcome

    def _check_data(self) -> None:
        """Refuse data files whose content is not that of the cell's name."""
        for place, digest in self.about.get("data", {}).items():
            if sha256(Path(place)) != digest:
                raise UserError(f"{place} has changed since the sweep began: run the sweep again")

    def _check_data_used(self) -> None:
        """Refuse a result of other data: a file may change after `_check_data`, and back again."""
        if self.about["command"] == "eval":
            self._check_data()
        elif sorted(RunFolder(self.run).data.values()) != sorted(self.about["data"].values()):
            raise UserError("its data had changed when it began: run the sweep again")

    def _error(self, exit_code: int) -> str:
        """Return the line that says why the process failed.

        This is the program's own last message, else the last line of output since the start.
        """
        if exit_code < 0:
            name = f"killed by {signal.Signals(-exit_code).name}"
            return f"{name}, out of memory?" if exit_code == -signal.SIGKILL else name
        log = (self.folder / "output.log").read_text(encoding="utf-8", errors="replace")
        output = log.rpartition(_STARTED)[2].partition("\n")[2]
        lines = [line for line in output.splitlines() if line.strip()]
        messages = [line for line in lines if line.startswith("abft-fast: ")]
        last = (messages or lines or [f"exit code {exit_code}"])[-1]
        return last.removeprefix("abft-fast: ")


def end(processes: Sequence[subprocess.Popen[bytes]], patience: float = 10) -> None:
    """End the processes of cells and wait for them. A cell can be resumed wherever it was ended.

    Args:
        processes: the processes; all are asked to end at once.
        patience: seconds until those that still run are killed.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent is killed.

    Otherwise a second sweep could meet the cells of a sweep that was killed with SIGKILL.
    """
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
