"""Cells of a sweep as tasks of a Ray cluster; its machines share the sweep's folder."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from abft_fast.errors import UserError
from abft_fast.experiments.cells import FAILED, POLL, CellFolder, end, sigterm_as_interrupt
from abft_fast.options import SweepConfig


def require() -> None:
    """Raises UserError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray: not installed; `pip install 'abft-fast[ray]'`")


def run_on_ray(
    config: SweepConfig, folders: list[Path], ended: Callable[[str, str, str, float], None]
) -> None:
    """Tasks on the cluster that RAY_ADDRESS names, or on one started here and ended after."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        gpus = config.cell_gpus
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        for option, kind, asked in (
            ("--cell-cpus", "CPU", config.cell_cpus),
            ("--cell-gpus", "GPU", gpus),
        ):
            most = max(node["Resources"].get(kind, 0) for node in ray.nodes())
            if asked > most:  # Ray would wait for such a machine
                raise UserError(f"{option} {asked}: no machine of the cluster has more than {most}")
        task = ray.remote(num_cpus=config.cell_cpus, num_gpus=gpus, max_retries=0)(_run_cell)
        waiting, running = list(reversed(folders)), {}
        with sigterm_as_interrupt():  # ray.init has set a handler of its own
            try:
                while waiting or running:
                    while waiting and len(running) < (config.jobs or len(folders)):
                        folder = waiting.pop()
                        reference = task.remote(str(folder.resolve()), os.getcwd())
                        running[reference] = folder, time.monotonic()
                    for reference in ray.wait(list(running), num_returns=1)[0]:
                        folder, started = running.pop(reference)
                        try:
                            status, line = ray.get(reference)
                        except ray.exceptions.RayError as error:  # the worker or machine is gone
                            reason = getattr(error, "cause", None) or error
                            status, line = FAILED, str(reason).strip().splitlines()[0]
                        ended(folder.name, status, line, time.monotonic() - started)
            finally:
                for reference in running:
                    ray.cancel(reference)
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=20)
    finally:
        ray.shutdown()


def _run_cell(folder: str, cwd: str) -> tuple[str, str]:
    """Run a cell to its end in a worker: its status and line."""
    # ray.cancel is a SIGINT, which workers ignore where a shell started Ray in its background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    cell, started = CellFolder(Path(folder)), time.monotonic()
    process = cell.start({})
    try:
        while process.poll() is None:
            time.sleep(POLL)  # not wait(), which it would not interrupt
    except BaseException:
        end([process])
        raise
    return cell.finish(process.returncode, time.monotonic() - started)
