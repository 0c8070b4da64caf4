"""Runs the cells of a sweep, each in a process of its own: here, or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from abft_fast.errors import Interrupted, RunError, UserError
from abft_fast.experiments import cells, ray_engine
from abft_fast.experiments.cells import FAILED, FINISHED, CellFolder
from abft_fast.experiments.grid import Cell, parse_overrides, read_cells
from abft_fast.experiments.records import read_cell
from abft_fast.experiments.results import write_results
from abft_fast.options import SweepConfig
from abft_fast.runtime import launch
from abft_fast.runtime.files import check_output_folder
from abft_fast.runtime.progress import Progress


def plan_sweep(config: SweepConfig) -> list[Cell]:
    """The cells of a sweep, after its overrides.

    Raises:
        UserError: the file, an override or an option of any cell is invalid.
    """
    overrides = parse_overrides(config.set)
    for name in ("model", "device"):
        if (value := getattr(config, name)) is not None:
            overrides[name] = value
    return read_cells(config.file, overrides)


def run_sweep(config: SweepConfig, planned: list[Cell], progress: Progress) -> Path:
    """Run what is not finished yet; the folder, whose results.csv has all that is there.

    Raises:
        UserError: the folder is in use, or was made with other options.
        RunError: cells failed; the others are finished.
        Interrupted: by Ctrl-C or SIGTERM; the cells' processes are ended.
    """
    if launch.process_count() > 1:
        raise UserError("sweep starts processes of its own: run it without a launcher")
    folder = config.output_dir or Path("runs") / config.file.stem
    if config.engine == "ray":
        ray_engine.require()
    with _held(folder):
        folders = [CellFolder(folder / "cells" / cell.name) for cell in planned]
        for cell, place in zip(planned, folders, strict=True):
            place.prepare(cell)
        every = sorted(path.parent for path in folder.glob("cells/*/cell.yaml"))
        records = {place.name: read_cell(place) for place in every}
        write_results(folder / "results.csv", records.values())
        left = {
            place.folder.name: cell.title
            for cell, place in zip(planned, folders, strict=True)
            if place.status[0] != FINISHED
        }
        progress.say(f"{folder}: {len(planned) - len(left)} of {len(planned)} cells are finished")
        failed = {}

        def ended(name: str, status: str, line: str, seconds: float) -> None:
            place = folder / "cells" / name
            records[name] = read_cell(place)
            write_results(folder / "results.csv", records.values())
            done = sum(records[cell.name].status == FINISHED for cell in planned)
            if status == FAILED:
                failed[name] = line
            progress.say(
                f"{left[name]}: {status} after {seconds:.0f} s"
                + (f", {line}" if line else "")
                + f" ({done} of {len(planned)} finished)"
            )

        run = ray_engine.run_on_ray if config.engine == "ray" else _run_here
        try:
            run(config, [folder / "cells" / name for name in left], ended)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted, its cells ended; the same command goes on: "
                f"abft-fast sweep {config.file}"
            ) from None
    if failed:
        raise RunError(
            f"{len(failed)} of {len(planned)} cells failed, the same command tries them again: "
            + "; ".join(f"{left[name]}: {line}" for name, line in failed.items())
        )
    return folder


Ended = Callable[[str, str, str, float], None]
"""Told a cell's name, status, line and seconds when it has ended."""


def _run_here(config: SweepConfig, folders: list[Path], ended: Ended) -> None:
    """Processes of this machine, `jobs` at once; none is left when this returns."""
    jobs = min(config.jobs or 1, max(1, len(folders)))
    free = [_environment(slot, jobs, _gpus()) for slot in range(jobs)]
    waiting, running = list(reversed(folders)), {}
    with cells.sigterm_as_interrupt():
        try:
            while waiting or running:
                while waiting and free:
                    environment, place = free.pop(0), CellFolder(waiting.pop())
                    running[place.start(environment)] = place, environment, time.monotonic()
                time.sleep(cells.POLL)
                for process in [process for process in running if process.poll() is not None]:
                    place, environment, started = running.pop(process)
                    seconds = time.monotonic() - started
                    ended(place.folder.name, *place.finish(process.returncode, seconds), seconds)
                    free.append(environment)
        finally:
            cells.end(list(running))


def _environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """A part of this machine for one of several cells at once."""
    if jobs == 1:
        return {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _gpus() -> list[str]:
    """GPUs that cells may use, by index, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A sweep's folder, for this process alone.

    Raises:
        UserError: another sweep runs in it, or it is no folder.
    """
    check_output_folder(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another sweep runs in {folder}: choose another --output-dir"
            ) from None
        yield
