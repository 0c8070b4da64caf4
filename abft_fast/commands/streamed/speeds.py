"""Measure a machine for `plan --stream`, and say what was measured."""

from __future__ import annotations

from pathlib import Path

import torch

from abft_fast.errors import UserError
from abft_fast.models.files import gguf_file
from abft_fast.models.loading import checkpoint_folder
from abft_fast.runtime.environment import multiplies_bfloat16, uses_cpu
from abft_fast.runtime.speeds import copy_speed, disk_speed, product_speed


def measure(where: str) -> tuple[list[tuple[str, str]], str]:
    """Measure the disk of a file, folder or model; the GPU's bus; and products of matrices.

    Returns:
        The findings as (what, found), and the options of `plan --stream` in one line.

    Raises:
        UserError: there is no such file, folder or model, or its largest file is too small.
    """
    on_cpu = uses_cpu("auto")
    device = torch.device("cpu" if on_cpu else "cuda")
    path = _largest_file(where)
    disk = disk_speed(path)
    source = "how much of it came from memory is not known here"
    if disk.from_disk is not None:
        source = f"{disk.from_disk:.0%} of it from the disk"
        if disk.from_disk < 0.9:
            source += ", the rest from memory: the disk is slower"
    speed = f"{disk.bytes_per_second / 1e9:.3g} GB/s"
    findings = [("disk", f"{speed} ({disk.read / 1e6:,.0f} MB of {path}, {source})")]
    options = {"--disk-bandwidth": disk.bytes_per_second / 1e9}
    if not on_cpu:
        pageable, pinned = (copy_speed(device, pinned) / 1e9 for pinned in (False, True))
        copies = f"{pageable:.3g} GB/s, as weights are copied; {pinned:.3g} GB/s from pinned memory"
        findings.append(("host to GPU", copies))
        options["--bus-bandwidth"] = pageable
    dtypes = [torch.bfloat16]
    if on_cpu:
        dtypes = [torch.float32, *(dtypes if multiplies_bfloat16() else [])]
    threads = f" on {torch.get_num_threads()} threads" if on_cpu else ""
    for dtype in dtypes:
        operations = product_speed(device, dtype) / 1e12
        name = str(dtype).removeprefix("torch.")
        found = f"{operations:.3g}e12 operations a second{threads}"
        if dtype is dtypes[0]:  # the arithmetic of a run that names none
            options["--operations"] = operations
        else:
            found += f": --operations {operations:.3g} with --mixed-precision bf16"
        findings.append((f"products in {name}", found))
    return findings, " ".join(f"{name} {value:.3g}" for name, value in options.items())


def _largest_file(where: str) -> Path:
    path = gguf_file(where) or Path(where)
    if path.is_file():
        return path
    folder = checkpoint_folder(where)
    files = [] if folder is None else [each for each in folder.rglob("*") if each.is_file()]
    if not files:
        raise UserError(
            f"--measure {where}: there is no such file, folder with files, or model on this machine"
        )
    return max(files, key=lambda each: each.stat().st_size)
