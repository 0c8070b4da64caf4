"""Attention of packed prompts one by one, under autograd: for what flash attention cannot do."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from abft_kernels.problem import Scores


def attend_separately(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scores: Scores,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention, (T, Hq, D), of q (T, Hq, D) and k, v (T, Hkv, D)."""
    out = []
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        prompt = one_prompt(a, b, q, k, v)
        out.append(_attend(*prompt, scores, sinks, dropout)[0].transpose(0, 1))
    return torch.cat(out)


def one_prompt(a: int, b: int, *tensors: Tensor) -> list[Tensor]:
    """Tokens a to b of each (T, H, D), as (1, H, n, D)."""
    return [t[a:b].transpose(0, 1)[None] for t in tensors]


def _attend(query, key, value, scores: Scores, sinks: Tensor | None, dropout: float) -> Tensor:
    n = query.shape[2]
    windowed = scores.window is not None and n > scores.window
    if scores.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible_keys(n, scores.window, query.device) if windowed else None,
            is_causal=not windowed,
            dropout_p=dropout,
            scale=scores.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    mask = visible_keys(n, scores.window, query.device)
    return explicit_attention(query, key, value, mask, scores, sinks, dropout)[0]


def visible_keys(length: int, window: int | None, device: torch.device) -> Tensor:
    """(n, n) bool, which keys each row of one prompt sees."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scores: Scores,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention with its matrix written out, and the matrix, of (B, H, n, D); True is visible."""
    group = query.shape[1] // key.shape[1]
    products = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scores.scale
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    if sinks is not None:
        column = sinks.to(products.dtype).view(1, -1, 1, 1).expand(*products.shape[:-1], 1)
        products = torch.cat([products, column], dim=-1)
    alpha = torch.softmax(products, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    alpha = alpha.to(query.dtype)
    if sinks is not None:
        alpha = alpha[..., :-1]
    dropped = F.dropout(alpha, p=dropout, training=dropout > 0)
    return dropped @ value.repeat_interleave(group, dim=1), alpha
