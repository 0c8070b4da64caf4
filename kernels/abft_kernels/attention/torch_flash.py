"""Call the flash attention inside torch: its own (FA2), or flash-attn 3 (FA3) in its place.

`torch.nn.attention.varlen` is built on the same ops. torch keeps its choice between FA2 and FA3 for
the whole process. The package of flash-attn 3 changes its signatures from version to version, and
torch follows them; so FA3 is called through torch. FA3 has never been run here: its calls are
written by torch's signatures.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.attention
from torch import Tensor

from abft_kernels.attention.inputs import gpu_obstacle, keys_before, pad_head_dim
from abft_kernels.types import Prompts, Scores

_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
_FLASH_ATTN_3 = importlib.util.find_spec("flash_attn_interface") is not None


def varlen_obstacle(q: Tensor, softcap: float | None) -> str | None:
    """Return why torch's own flash attention cannot take these queries, or None."""
    if softcap is not None:
        return "it has no soft-cap"
    if not _VARLEN:
        return "it needs torch 2.10, which brought torch.nn.attention.varlen"
    return gpu_obstacle(q)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Return FA2's output and log-sum-exp."""
    _select_implementation("FA2")
    return _forward(q, k, v, prompts, scores)


def varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prompts: Prompts,
    scores: Scores,
) -> list[Tensor]:
    """Return FA2's gradients of q, k and v."""
    _select_implementation("FA2")
    return _backward(grad_out, q, k, v, out, lse, prompts, scores)


def flash_attn_3_obstacle(q: Tensor, softcap: float | None) -> str | None:
    """Return why flash-attn 3 cannot take these queries, or None."""
    if not _FLASH_ATTN_3:
        return "its package, flash_attn_interface, cannot be imported"
    if torch.__version__ < "2.13":
        return "it needs torch 2.13"
    if softcap is not None:
        return "it has no soft-cap inside torch"
    reason = gpu_obstacle(q)
    hopper = reason is None and torch.cuda.get_device_capability(q.device)[0] == 9
    return reason or (None if hopper else "it needs a Hopper GPU")


def flash_attn_3_forward(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Return FA3's output and log-sum-exp."""
    _select_implementation("FA3")
    return _forward(q, k, v, prompts, scores)


def flash_attn_3_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prompts: Prompts,
    scores: Scores,
) -> list[Tensor]:
    """Return FA3's gradients of q, k and v."""
    _select_implementation("FA3")
    return _backward(grad_out, q, k, v, out, lse, prompts, scores)


def _select_implementation(wanted: str) -> None:
    """Switch torch's process-wide FA2/FA3 choice; leave any other implementation alone."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if wanted == "FA3" and current != "FA3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif wanted == "FA2" and current == "FA3":
        torch.nn.attention.restore_flash_attention_impl()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *pad_head_dim(q, k, v),
        *prompts.bounds_and_lengths,
        0.0,
        prompts.causal and scores.window is None,  # a window implies the causal mask
        False,
        scale=scores.scale,
        window_size_left=keys_before(scores, unlimited=None),
        window_size_right=None if scores.window is None else 0,
    )
    return out[..., : q.shape[-1]], lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prompts: Prompts,
    scores: Scores,
) -> list[Tensor]:
    grads = torch.ops.aten._flash_attention_backward(
        *pad_head_dim(grad_out, q, k, v, out),
        lse,
        *prompts.bounds_and_lengths,
        0.0,
        prompts.causal and scores.window is None,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # random state: there is no dropout
        torch.empty(0, device=q.device),
        scale=scores.scale,
        window_size_left=keys_before(scores, unlimited=None),
        window_size_right=None if scores.window is None else 0,
    )
    return [grad[..., : q.shape[-1]] for grad in grads]
