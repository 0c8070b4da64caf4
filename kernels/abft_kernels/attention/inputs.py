"""Prepare the inputs of flash attention, and say which inputs it refuses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from abft_kernels.types import Scores


def gpu_obstacle(q: Tensor) -> str | None:
    """Return why flash attention on a GPU cannot take these queries, or None."""
    if not q.is_cuda:
        return f"it runs on a GPU, not on the {q.device.type}"
    if torch.version.hip is not None:
        return "AMD GPUs are not supported: on ROCm its log-sum-exp has another shape"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"it takes head dimensions up to 256, not {q.shape[-1]}"
    return _obstacle_of(torch.cuda.get_device_capability(q.device), q.shape[-1])


def _obstacle_of(capability: tuple[int, int], head_dim: int) -> str | None:
    if capability < (8, 0):
        return "it needs compute capability 8.0"
    has_little_shared_memory = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if has_little_shared_memory and 192 < head_dim <= 224:
        return f"its backward on this GPU takes no head dimensions of 193 to 224, as {head_dim}"
    return None


def keys_before(scores: Scores, unlimited: int | None) -> int | None:
    """Return how many keys a row sees before its own, or `unlimited` without a window."""
    return unlimited if scores.window is None else scores.window - 1


def pad_head_dim(*tensors: Tensor) -> list[Tensor]:
    """Fill head dimensions up with zeros to a multiple of 8, which flash attention needs."""
    missing = -tensors[0].shape[-1] % 8
    if missing:
        return [F.pad(t, (0, missing)) for t in tensors]
    return unit_stride(*tensors)


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors with their last dimension contiguous, copied only if it is not."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
