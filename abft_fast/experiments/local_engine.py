"""Run cells of a sweep in processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from abft_fast.errors import UserError
from abft_fast.experiments.cell_folder import POLL_SECONDS, CellEnded, CellFolder, end
from abft_fast.options import SweepConfig
from abft_fast.runtime.launch import signals_as_interrupt


def run_here(config: SweepConfig, folders: list[Path], on_end: CellEnded) -> None:
    """Run cells, `jobs` at once. Whether it returns or raises, it leaves no process behind.

    Args:
        config: options of the sweep.
        folders: the folders of the cells, in the order to start them.
        on_end: called when a cell has ended.
    """
    jobs = min(config.jobs or 1, max(1, len(folders)))
    gpus = _gpus()
    free_slots = [_environment(slot, jobs, gpus) for slot in range(jobs)]
    waiting = [CellFolder(folder) for folder in reversed(folders)]
    running: dict[subprocess.Popen[bytes], tuple[CellFolder, dict[str, str], float]] = {}
    with signals_as_interrupt():
        try:
            while waiting or running:
                while waiting and free_slots:
                    cell, environment = waiting.pop(), free_slots[0]
                    try:
                        process = cell.start(environment)
                    except UserError as error:
                        on_end(cell.folder.name, cell.fail(error), 0)
                        continue
                    free_slots.pop(0)
                    running[process] = cell, environment, time.monotonic()
                time.sleep(POLL_SECONDS)
                for process in list(running):
                    exit_code = process.poll()
                    if exit_code is None:
                        continue
                    cell, environment, started = running.pop(process)
                    free_slots.append(environment)
                    seconds = time.monotonic() - started
                    on_end(cell.folder.name, cell.finish(exit_code, seconds), seconds)
        finally:
            end(list(running))


def _environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Return variables that give one of several cells its share of cores and its GPU."""
    if jobs == 1:
        return {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _gpus() -> list[str]:
    """Return the GPUs that cells may use, as CUDA_VISIBLE_DEVICES names them, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return result.stdout.split() if result.returncode == 0 else []
