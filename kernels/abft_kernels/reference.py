"""Specify the attention-behavior loss in plain torch, for any float dtype and any device.

Source: Cho et al. 2025, "Mechanistic Fine-tuning for In-context Learning", section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abft_kernels.types import SMALLEST_MASS, LastRowLoss


def last_row_loss(
    query: Tensor,
    key: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    *,
    penalty: float | Tensor,
    reward: float | Tensor,
    scale: float | None = None,
    head_filter: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    objective: str = "mass",
    hold: float | Tensor = 0.0,
) -> LastRowLoss:
    """Compute `abft_kernels.last_row_loss`, with the same arguments, one row and head at a time."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    rows = []
    for row in range(query.shape[0]):
        start, end = int(key_start[row]), int(key_end[row])
        owned = slice(int(label_offsets[row]), int(label_offsets[row + 1]))
        positions = label_positions[owned].long() - start
        correct = label_is_correct[owned]
        n, k = end - start, len(positions)
        threshold = k / (k + math.log(n)) if k else 0.0

        for head in range(query.shape[1]):
            keys = key[start:end, head // group].to(dtype)
            scores = keys @ query[row, head].to(dtype) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if window is not None and n > window:
                scores = scores.masked_fill(
                    torch.arange(n, device=scores.device) < n - window, -torch.inf
                )
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].to(dtype)])
            alpha = torch.softmax(scores, dim=0)[positions]

            label_mass = alpha.sum()
            is_induction = label_mass > threshold
            if objective == "mass":
                loss = penalty * alpha[~correct].sum() + reward * (1 - alpha[correct]).sum()
            else:
                seen = positions >= (0 if window is None else n - window)
                both_kinds = (seen & correct).any() and (seen & ~correct).any()
                loss = 0 * label_mass
                if both_kinds and label_mass >= SMALLEST_MASS:
                    loss = alpha[~correct].sum() / label_mass + hold * label_mass.log()
            if head_filter:
                loss = torch.where(is_induction, loss, loss.new_zeros(()))
            rows.append((loss, label_mass.detach(), alpha[correct].sum().detach(), is_induction))
    shape = query.shape[:2]
    return LastRowLoss(*(torch.stack(column).view(shape) for column in zip(*rows, strict=True)))
