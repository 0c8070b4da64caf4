"""Run cells of a sweep as tasks of a Ray cluster whose machines share the sweep's folder."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.experiments.cell_folder import (
    FAILED,
    POLL_SECONDS,
    CellEnded,
    CellFolder,
    Outcome,
    end,
)
from abft_fast.options import SweepConfig
from abft_fast.runtime.launch import signals_as_interrupt


def require_ray() -> None:
    """Raise UserError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: `pip install 'abft-fast[ray]'`")


def run_on_ray(config: SweepConfig, folders: list[Path], on_end: CellEnded) -> None:
    """Run cells on the cluster that RAY_ADDRESS names, else on one that lives as long as the call.

    Args:
        config: options of the sweep.
        folders: the folders of the cells, in the order to start them.
        on_end: called when a cell has ended.

    Raises:
        UserError: no machine of the cluster has the CPUs or GPUs that a cell asks for.
    """
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        gpus = config.cell_gpus
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        _check_resources(ray.nodes(), config.cell_cpus, gpus)
        task = ray.remote(num_cpus=config.cell_cpus, num_gpus=gpus, max_retries=0)(_run_cell)
        waiting = list(reversed(folders))
        running: dict[Any, tuple[Path, float]] = {}
        with signals_as_interrupt():  # after ray.init, which sets a handler of its own
            try:
                while waiting or running:
                    while waiting and len(running) < (config.jobs or len(folders)):
                        folder = waiting.pop()
                        reference = task.remote(str(folder.resolve()), os.getcwd())
                        running[reference] = folder, time.monotonic()
                    for reference in ray.wait(list(running), num_returns=1)[0]:
                        folder, started = running.pop(reference)
                        try:
                            outcome = Outcome(*ray.get(reference))
                        except ray.exceptions.RayError as error:  # the worker or machine is gone
                            reason = getattr(error, "cause", None) or error
                            text = str(reason).strip() or repr(reason)
                            outcome = Outcome(FAILED, text.splitlines()[0])
                        on_end(folder.name, outcome, time.monotonic() - started)
            finally:
                for reference in running:
                    ray.cancel(reference)
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=20)
    finally:
        ray.shutdown()


def _check_resources(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> None:
    """Raise UserError if no machine has what a cell asks for; Ray would wait for such a machine."""
    for option, kind, asked in (("--cell-cpus", "CPU", cpus), ("--cell-gpus", "GPU", gpus)):
        most = max(node["Resources"].get(kind, 0) for node in nodes)
        if asked > most:
            raise UserError(f"{option} {asked}: no machine of the cluster has more than {most}")


def _run_cell(folder: str, working_directory: str) -> tuple[str, str]:
    """Run a cell to its end in a worker; return the fields of its outcome."""
    # ray.cancel sends SIGINT, which workers ignore if a shell started Ray in its background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(working_directory)
    cell, started = CellFolder(Path(folder)), time.monotonic()
    try:
        process = cell.start({})
    except UserError as error:
        return cell.fail(error)
    try:
        while (exit_code := process.poll()) is None:
            time.sleep(POLL_SECONDS)  # SIGINT would not interrupt process.wait()
    except BaseException:
        end([process])
        raise
    return cell.finish(exit_code, time.monotonic() - started)
