"""Attend within packed prompts that all continue one prefix, whose keys and values are kept.

All rows attend to the prefix, and each prompt attends to itself. These are two parts of one
softmax, and their log-sum-exps give each part its weight. No prompt gets a copy of the prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abft_kernels.attention.registry import attention_forward, choose_attention
from abft_kernels.attention.separate import attend_separately
from abft_kernels.checks import bounds_on_host
from abft_kernels.types import Prompts, Scores, one_prompt_bounds


def attention_after_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    cu_seqlens: Tensor,
    *,
    longest: int,
    bounds: list[int] | None = None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    attention: str = "auto",
) -> Tensor:
    """Compute causal attention of packed prompts, each after the prefix.

    Args:
        q: (T, Hq, D), R prompts laid end to end, without the prefix.
        k: (T, Hkv, D), the prompts' own keys; Hq is a multiple of Hkv.
        v: (T, Hkv, D), the prompts' own values.
        prefix_k: (P, Hkv, D), the prefix's keys; P is at least 1.
        prefix_v: (P, Hkv, D), the prefix's values.
        cu_seqlens: (R + 1,) int32, from 0 to T.
        longest: tokens of the longest prompt, without the prefix.
        bounds: `cu_seqlens` as numbers. Without them, prompts that attend one at a time wait for
            the device.
        scale: as in `last_row_loss`.
        softcap: as in `last_row_loss`.
        window: a row sees its last `window` keys only; keys of the prefix count.
        sinks: as in `last_row_loss`.
        attention: see `choose_attention`. Prompts attend one at a time if a window ends inside the
            prefix, a gradient is asked for, or no flash attention can run.

    Returns:
        (T, Hq, D).

    Raises:
        ValueError: the attention asked for cannot run here, or `bounds` has another length than
            `cu_seqlens`.
    """
    name, _ = choose_attention(q, softcap=softcap, requested=attention)
    length = len(prefix_k)
    if window is not None and length + longest <= window:
        window = None
    scores = Scores(scale, softcap, window)
    # The parts of the softmax are joined by log-sum-exps, which have no gradient.
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, prefix_k, prefix_v))
    if name == "separate" or window is not None or learns:
        prefix = prefix_k, prefix_v
        own_bounds = bounds_on_host(cu_seqlens, bounds)
        return attend_separately(q, k, v, own_bounds, scores, sinks, prefix=prefix)
    own, own_lse = attention_forward(name, q, k, v, sinks, Prompts(cu_seqlens, longest), scores)
    all_rows = Prompts(one_prompt_bounds(len(q), q.device), len(q), prefix=length)
    seen, seen_lse = attention_forward(name, q, prefix_k, prefix_v, None, all_rows, scores)
    weight = torch.sigmoid(seen_lse - own_lse).T[..., None]
    return torch.lerp(own.to(weight.dtype), seen.to(weight.dtype), weight).to(q.dtype)
