"""Describe what a run runs on: versions, devices and memory."""

from __future__ import annotations

import platform
import re
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from abft_fast.errors import UserError
from abft_fast.runtime.launch import process_count

PACKAGES = (
    "abft-fast",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "StaICC",
    "datasets",
    "pyarrow",
    "gguf",
    "flash-attn",
    "flash-attn-3",
)


def versions() -> dict[str, str | None]:
    """Return the installed version of every package that matters, None for a missing one."""
    installed: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def describe() -> dict[str, Any]:
    """Return the content of environment.json: versions, processor, threads, processes, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def uses_cpu(requested: str) -> bool:
    """Return whether a value of `--device` means the CPU; `auto` does where there is no GPU.

    Raises:
        UserError: `cuda` is requested and there is no usable GPU.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; see `abft-fast doctor`")
    return requested == "cpu" or not torch.cuda.is_available()


def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16 matrices (AVX-512 or AMX)."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def free_memory(device: torch.device) -> int:
    """Return the bytes that a run may still allocate: on a GPU within its share, or in RAM."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = total * torch.cuda.get_per_process_memory_fraction(device.index)
        return int(min(free + torch.cuda.memory_reserved(device), share))
    return min(psutil.virtual_memory().available, *_left_in_control_groups(Path("/sys/fs/cgroup")))


def _left_in_control_groups(root: Path) -> list[int]:
    """Return the bytes that each container limit leaves; cached files count as free."""
    left = []
    for folder, most, used in (
        (root, "memory.max", "memory.current"),  # version 2
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            held = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = int(stat["inactive_file"]) + int(stat["active_file"])
            left.append(int((folder / most).read_text()) - held + files)
        except (OSError, ValueError, KeyError):  # there is no such file, or its limit is `max`
            continue
    return left


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: allocated on the fullest GPU, or resident on a CPU."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    # On Linux ru_maxrss begins with the memory of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists() and (mark := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(mark[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
