"""Attend within packed prompts one by one, under autograd, where flash attention cannot run."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from abft_kernels.types import Scores


def attend_separately(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[int],
    scores: Scores,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute causal attention, (T, Hq, D), of q (T, Hq, D) and k, v (T, Hkv, D).

    Prompt r is `bounds[r]:bounds[r + 1]`. Each prompt also sees all of `prefix`, keys and values of
    (P, Hkv, D), before its own.
    """
    before = None if prefix is None else _last_seen(*prefix, scores.window)
    out = []
    for a, b in itertools.pairwise(bounds):
        query, key, value = one_prompt(a, b, q, k, v)
        if before is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        out.append(_attend(query, key, value, scores, sinks, dropout)[0].transpose(0, 1))
    return torch.cat(out)


def _last_seen(key: Tensor, value: Tensor, window: int | None) -> list[Tensor]:
    """Return the part of a prefix inside some row's window, as (1, H, n, D)."""
    first = 0 if window is None else max(len(key) - window + 1, 0)
    return one_prompt(first, len(key), key, value)


def one_prompt(a: int, b: int, *tensors: Tensor) -> list[Tensor]:
    """Return tokens a to b of each (T, H, D) as (1, H, n, D)."""
    return [t[a:b].transpose(0, 1)[None] for t in tensors]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    rows, keys = query.shape[2], key.shape[2]
    windowed = scores.window is not None and keys > scores.window
    if scores.softcap is None and sinks is None:
        plain = rows == keys and not windowed  # torch's causal mask is for a square
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if plain else visible_keys(keys, scores.window, query.device, rows),
            is_causal=plain,
            dropout_p=dropout,
            scale=scores.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    mask = visible_keys(keys, scores.window, query.device, rows)
    return explicit_attention(query, key, value, mask, scores, sinks, dropout)[0]


def visible_keys(
    length: int, window: int | None, device: torch.device, rows: int | None = None
) -> Tensor:
    """Return which of one prompt's n keys its last `rows` rows see, (rows, n) bool; None is all."""
    position = torch.arange(length, device=device)
    distance = position[length - (length if rows is None else rows) :, None] - position
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
    """Compute attention over (B, H, n, D), and its matrix; True in `mask` marks a visible key."""
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
