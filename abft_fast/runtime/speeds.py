"""Measure how fast this machine reads a file, copies to its GPU, and multiplies matrices."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from abft_fast.errors import UserError
from abft_fast.runtime.float32_linear import fast_float32_linear

LEAST_BYTES = 2**26
"""A file with fewer bytes is read too fast to be timed."""

_AT_ONCE = 2**24  # bytes of one read
_MOST_SECONDS = 10.0  # a slow disk shows itself sooner
_COPIED = 2**28  # bytes of one copy to a GPU, as a large weight has
_TIMES = 5


class DiskSpeed(NamedTuple):
    """How fast a file was read from its beginning.

    Attributes:
        bytes_per_second: of all bytes that were read.
        read: bytes.
        from_disk: share of them that came from the disk and not from memory; None where the system
            does not tell.
    """

    bytes_per_second: float
    read: int
    from_disk: float | None


def disk_speed(path: Path) -> DiskSpeed:
    """Read a file in order for up to ten seconds, after the system was asked to forget it.

    The system may keep pages that it was asked to forget, as those that another process has mapped.
    So the share that came from the disk is measured too.

    Raises:
        UserError: the file cannot be read, or is too small.
    """
    buffer = memoryview(bytearray(_AT_ONCE))
    try:
        if path.stat().st_size < LEAST_BYTES:
            raise UserError(
                f"{path} has less than {LEAST_BYTES / 1e6:.0f} MB, which are read too fast to be "
                "timed: name a larger file, such as a model's"
            )
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            before, start = _bytes_from_disk(), time.perf_counter()
            read = 0
            while time.perf_counter() - start < _MOST_SECONDS and (count := file.readinto(buffer)):
                read += count
            seconds = time.perf_counter() - start
            after = _bytes_from_disk()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    share = None if before is None or after is None else min((after - before) / read, 1.0)
    return DiskSpeed(read / seconds, read, share)


def copy_speed(device: torch.device, pinned: bool) -> float:
    """Return the bytes a second that are copied from the host's memory to a GPU.

    Args:
        device: the GPU.
        pinned: whether the host's memory is pinned.
    """
    source = torch.ones(_COPIED, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    return _COPIED / _seconds(lambda: target.copy_(source), device)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a linear layer, 2 a weight and row, as a plan counts them.

    Args:
        device: where it runs.
        dtype: of the weight and of the rows.
    """
    size = 8192 if device.type == "cuda" else 2048
    rows = torch.randn(size, size, device=device, dtype=dtype)
    weight = torch.randn(size, size, device=device, dtype=dtype)
    with torch.no_grad(), fast_float32_linear():
        return 2 * size**3 / _seconds(lambda: F.linear(rows, weight), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of some runs, after a first one that is not counted."""
    times = []
    for _ in range(_TIMES + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _bytes_from_disk() -> int | None:
    """Return how many bytes this process has made the disk read; None where it is not known."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(each.split()[1]) for each in lines if each.startswith("read_bytes:")), None)
