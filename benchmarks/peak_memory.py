"""Most memory that something takes: a GPU's own counter, or a fresh process's high-water mark."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from benchmarks.record import DEVICE, GPU

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args) -> T:
    """What a module's function returns, called in a process of its own.

    Raises:
        Exception: what it raised.
        BrokenProcessPool: it was ended by the system, as where memory ran out.
    """
    # Freed tensors go back to the system at once, so that later ones count again.
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *args).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        if before is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes at once beyond those there were; on a CPU to be asked in a fresh process."""
    reset_high_water_mark()
    before = high_water_mark()
    run()
    return high_water_mark() - before


def memory_held() -> int:
    """Bytes there are now: allocated on a GPU, resident in the process on a CPU."""
    return torch.cuda.memory_allocated() if GPU else psutil.Process().memory_info().rss


def reset_high_water_mark(device: str = DEVICE) -> None:
    """Begin to count the most memory held from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def high_water_mark(device: str = DEVICE) -> int:
    """Most bytes held since: allocated on a GPU, resident in the process on a CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
