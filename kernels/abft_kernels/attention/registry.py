"""Choose an implementation of attention over packed prompts, and run it.

A flash attention returns its output and each row's log-sum-exp, and takes both in its backward.
Sinks need no kernel of their own: they only add to the log-sum-exp, which rescales the output, and
the formula of the backward is already right for a softmax with sinks.

Shapes: q is (T, Hq, D), k and v are (T, Hkv, D), the log-sum-exp is (Hq, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from abft_kernels.attention import cpu, flash_attn, torch_flash
from abft_kernels.types import Prompts, Scores


class FlashAttention(NamedTuple):
    """One implementation of flash attention over packed prompts.

    Attributes:
        forward: (q, k, v, prompts, scores) -> (out, log-sum-exp), without sinks.
        backward: (grad_out, q, k, v, out, log-sum-exp, prompts, scores) -> (dq, dk, dv).
        obstacle: (q, softcap) -> the reason why it cannot run, or None.
    """

    forward: Callable
    backward: Callable
    obstacle: Callable[[Tensor, float | None], str | None]


# In the order in which "auto" tries them.
FLASH_ATTENTIONS = {
    "flash-attn": FlashAttention(flash_attn.forward, flash_attn.backward, flash_attn.obstacle),
    "varlen": FlashAttention(
        torch_flash.varlen_forward, torch_flash.varlen_backward, torch_flash.varlen_obstacle
    ),
    "sdpa": FlashAttention(cpu.forward, cpu.backward, cpu.obstacle),
    # Last: nobody has run it yet, so "auto" must not reach it.
    "flash-attn-3": FlashAttention(
        torch_flash.flash_attn_3_forward,
        torch_flash.flash_attn_3_backward,
        torch_flash.flash_attn_3_obstacle,
    ),
}
ATTENTIONS = ("auto", *FLASH_ATTENTIONS, "separate")


def choose_attention(
    query: Tensor, *, softcap: float | None = None, dropout: float = 0.0, requested: str = "auto"
) -> tuple[str, str]:
    """Choose the attention for queries like these, and say why not a faster one.

    `"flash-attn"`, `"varlen"` (inside torch) and `"sdpa"` (torch's flash attention on the CPU, a
    prompt at a time) share their log-sum-exp with the loss. So does `"flash-attn-3"`, which needs a
    Hopper GPU and replaces torch's own flash attention in the whole process; it runs only on
    request. `"separate"` attends one prompt at a time and returns no log-sum-exp, so the loss reads
    all keys itself.

    Returns:
        The name, and the reason for each one passed over, in order.

    Raises:
        ValueError: the requested one is unknown or cannot run here.
    """
    if requested not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, not {requested!r}")
    reasons: list[str] = []
    for name, implementation in FLASH_ATTENTIONS.items():
        if requested not in ("auto", name):
            continue
        reason = implementation.obstacle(query, softcap)
        if reason is None and dropout:
            reason = "it has no dropout here"
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    if requested in ("auto", "separate"):
        return "separate", "; ".join(reasons)
    raise ValueError(f"attention backend {reasons[0]}")


def attention_forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    prompts: Prompts,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, Hq, D) and the log-sum-exp (Hq, T), both with sinks."""
    out, lse = FLASH_ATTENTIONS[name].forward(q, k, v, prompts, scores)
    if sinks is not None:
        without = lse
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_(torch.exp(without - lse).T[..., None])  # in place: no copy of it in float32
    return out, lse


def attention_backward(
    name: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    prompts: Prompts,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v, and of the sinks if there are any that learn."""
    dq, dk, dv = FLASH_ATTENTIONS[name].backward(grad_out, q, k, v, out, lse, prompts, scores)
    if sinks is None:
        return dq, dk, dv, None
    alpha = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    delta = (grad_out.to(lse.dtype) * out).sum(dim=-1).T
    return dq, dk, dv, -(alpha * delta).sum(dim=1).to(sinks.dtype)
