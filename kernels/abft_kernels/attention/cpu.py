"""Call torch's flash attention for CPUs, one prompt at a time.

`scaled_dot_product_attention` calls the same op on a CPU.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from abft_kernels.attention.inputs import unit_stride
from abft_kernels.attention.separate import one_prompt, visible_keys
from abft_kernels.types import Prompts, Scores


def obstacle(q: Tensor, softcap: float | None) -> str | None:
    """Return why the CPU's flash attention cannot take these queries, or None."""
    if q.device.type != "cpu":
        return "it runs on the CPU"
    return None if softcap is None else "it has no soft-cap"


def forward(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp."""
    outs, lses = [], []
    q, k, v = unit_stride(q, k, v)
    bounds = (itertools.pairwise(t.tolist()) for t in (prompts.cu_seqlens, prompts.key_bounds))
    for (a, b), (c, d) in zip(*bounds, strict=True):
        query, (key, value) = one_prompt(a, b, q), one_prompt(c, d, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *query, key, value, **_mask(b - a, q, scores, prompts.causal)
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


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
    """Return the gradients of q, k and v, for prompts that attend to their own keys."""
    grads = []
    tensors = unit_stride(grad_out, q, k, v, out)
    for a, b in itertools.pairwise(prompts.cu_seqlens.tolist()):
        grads.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *one_prompt(a, b, *tensors),
                lse[None, :, a:b],
                dropout_p=0.0,
                **_mask(b - a, q, scores, causal=True),
            )
        )
    return [torch.cat([t[0].transpose(0, 1) for t in each]) for each in zip(*grads, strict=True)]


def _mask(length: int, q: Tensor, scores: Scores, causal: bool) -> dict:
    """Return the op's options that say which keys a row sees."""
    if not causal or scores.window is None or length <= scores.window:
        return {"is_causal": causal, "attn_mask": None, "scale": scores.scale}
    mask = torch.zeros(length, length, dtype=q.dtype)
    mask.masked_fill_(~visible_keys(length, scores.window, q.device), -torch.inf)
    return {"is_causal": False, "attn_mask": mask, "scale": scores.scale}
