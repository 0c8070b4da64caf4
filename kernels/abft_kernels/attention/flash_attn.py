"""Call the package flash-attn (version 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from abft_kernels.attention.inputs import gpu_obstacle, keys_before, pad_head_dim
from abft_kernels.types import Prompts, Scores

try:
    from flash_attn.flash_attn_interface import (
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )
except ImportError:
    _INSTALLED = False
else:
    _INSTALLED = True


def obstacle(q: Tensor, softcap: float | None) -> str | None:
    """Return why flash-attn cannot take these queries, or None."""
    if not _INSTALLED:
        return "the package flash-attn 2 cannot be imported"
    return gpu_obstacle(q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp."""
    out, lse, *_ = _flash_attn_varlen_forward(
        *pad_head_dim(q, k, v),
        *prompts.bounds_and_lengths,
        **_options(scores, prompts.causal),
    )
    return out[..., : q.shape[-1]], lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prompts: Prompts,
    scores: Scores,
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    grad_out, padded_q, padded_k, padded_v, out = pad_head_dim(grad_out, q, k, v, out)
    grads = [torch.empty_like(t) for t in (padded_q, padded_k, padded_v)]
    _flash_attn_varlen_backward(
        grad_out,
        padded_q,
        padded_k,
        padded_v,
        out,
        lse,
        *grads,
        *prompts.bounds_and_lengths,
        **_options(scores, prompts.causal),
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return [grad[..., : q.shape[-1]] for grad in grads]


def _options(scores: Scores, causal: bool) -> dict[str, float | int | bool | None]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scores.scale,
        "causal": causal,
        "window_size_left": keys_before(scores, unlimited=-1),
        "window_size_right": 0 if causal else -1,
        "softcap": scores.softcap or 0.0,
    }
