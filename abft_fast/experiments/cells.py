"""A cell of a sweep on disk: its folder, its process, how it ended.

`cell.yaml` holds its options, `labels.json` what the sweep file calls it, `output.log` what its
process said, `status.json` how that ended; what it leaves is in `run/`, or in `metrics.json` where
it only evaluates.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.experiments.grid import WHERE, Cell
from abft_fast.options import flag
from abft_fast.options.resolve import read_yaml, write_yaml
from abft_fast.runtime.files import write_json

POLL = 0.1  # seconds between looks at processes
_STARTED = "started: "  # before each command in output.log

FINISHED, FAILED, UNFINISHED, WAITING = "finished", "failed", "unfinished", "waiting"


@dataclass(frozen=True)
class CellFolder:
    """Where a cell is, or will be."""

    folder: Path

    @property
    def run(self) -> Path:
        """What training leaves."""
        return self.folder / "run"

    @property
    def metrics(self) -> Path:
        """What an evaluation leaves."""
        return self.folder / "metrics.json"

    @property
    def labels(self) -> dict[str, Any]:
        """`command`, `method`, `title`, `labels` and `data`."""
        return json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the cell."""
        return read_yaml(self.folder / "cell.yaml")

    @property
    def status(self) -> tuple[str, str]:
        """How far it is, and the line it failed with."""
        path = self.folder / "status.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["status"], found["line"]
        started = (self.folder / "output.log").exists()
        return (UNFINISHED if started else WAITING), ""

    def prepare(self, cell: Cell) -> None:
        """Make the folder, or see that what is in it is this cell.

        Raises:
            UserError: it was run with other options, as by another version's defaults.
        """
        options = cell.config.model_dump(mode="json")
        if (self.folder / "cell.yaml").is_file():
            for name, value in self.options.items():
                if name in options and name not in WHERE and options[name] != value:
                    raise UserError(
                        f"{self.folder} was run with {name} {value}, and is now to be run with "
                        f"{options[name]}: choose another --output-dir"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"command": cell.command, "method": cell.method, "data": dict(cell.data)}
        write_json(
            self.folder / "labels.json", {**about, "title": cell.title, "labels": cell.labels}
        )
        write_yaml(cell.config, self.folder / "cell.yaml")  # what makes the folder a cell

    def command(self) -> list[str]:
        """The command that starts the cell, or goes on with it."""
        program = [sys.executable, "-m", "abft_fast"]
        options = ["--config", str(self.folder / "cell.yaml")]
        if self.labels["command"] == "eval":
            return [*program, "eval", *options, "--output", str(self.metrics)]
        if (self.run / "config.yaml").is_file():
            here = [part for name in sorted(WHERE) for part in (flag(name), self.options[name])]
            return [*program, "train", "--resume", str(self.run), *here]
        shutil.rmtree(self.run, ignore_errors=True)  # killed before it held anything
        return [*program, "train", *options, "--output-dir", str(self.run)]

    def start(self, environment: dict[str, str]) -> subprocess.Popen:
        """The cell's process, which ends when this one does."""
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
                start_new_session=True,  # Ctrl-C is for the sweep, which then ends its cells
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one call of the kernel, no lock
            )

    def finish(self, code: int, seconds: float) -> tuple[str, str]:
        """Record how the process ended; its status and line."""
        status, line = (FINISHED, "") if code == 0 else (FAILED, self._last_line(code))
        content = {"status": status, "line": line, "seconds": round(seconds, 1)}
        write_json(self.folder / "status.json", content)
        return status, line

    def _last_line(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}" + ", out of memory?" * (code == -9)
        text = (self.folder / "output.log").read_text(encoding="utf-8", errors="replace")
        this_time = text.rpartition(_STARTED)[2].partition("\n")[2]
        lines = [line for line in this_time.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("abft-fast: ")]
        last = (said or lines or [f"exit code {code}"])[-1]
        return last.removeprefix("abft-fast: ")


def end(processes: list[subprocess.Popen], patience: float = 10) -> None:
    """End processes and wait for them; each can be killed at any moment and goes on later."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + patience
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        process.kill()
        process.wait()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within it a SIGTERM ends things in the order that Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """A sweep killed with SIGKILL leaves no cell behind that a second sweep would meet."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
