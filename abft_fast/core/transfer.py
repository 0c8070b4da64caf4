"""Copy small tensors to a GPU without waiting for what the GPU still has to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; Triton compiles a kernel again for a pointer of another alignment


def on_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return tensors on a device; those on the CPU take one copy, and the host goes on at once.

    A copy out of memory that is not pinned makes the host wait for all earlier work of the GPU.
    """
    device = torch.device(device)
    if device.type == "cpu" or any(t.device.type != "cpu" for t in tensors):
        return [t.to(device) for t in tensors]
    return in_one_buffer(tensors, device)


def in_one_buffer(tensors: Sequence[Tensor], device: torch.device | str = "cpu") -> list[Tensor]:
    """Return CPU tensors as parts of one buffer on a device, each at a multiple of 16 bytes."""
    device = torch.device(device)
    sizes = [t.numel() * t.itemsize for t in tensors]
    starts = list(itertools.accumulate((size + -size % _ALIGNMENT for size in sizes), initial=0))
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")

    def parts(whole: Tensor) -> list[Tensor]:
        return [
            whole[start : start + size].view(t.dtype).view(t.shape)
            for t, start, size in zip(tensors, starts, sizes, strict=False)
        ]

    for part, tensor in zip(parts(buffer), tensors, strict=True):
        part.copy_(tensor)
    return parts(buffer.to(device, non_blocking=True))
