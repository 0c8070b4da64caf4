"""Attention of packed prompts by whatever flash attention there is, with its log-sum-exp.

Each backend is a pair of functions: forward yields the output and every row's log-sum-exp, backward
takes both back. Sinks need no kernel of their own: they only add to the log-sum-exp, which scales
the output, and the backward's formula is that of the softmax that has them.

Shapes: q (T, Hq, D), k and v (T, Hkv, D), log-sum-exp (Hq, T).
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.attention
from torch import Tensor
from torch.nn import functional as F

from abft_kernels.problem import Scores
from abft_kernels.separate_attention import one_prompt, visible_keys

try:
    from flash_attn.flash_attn_interface import (
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )
except ImportError:
    _FLASH_ATTN = False
else:
    _FLASH_ATTN = True
_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
_FLASH_ATTN_3 = importlib.util.find_spec("flash_attn_interface") is not None


class Prompts(NamedTuple):
    """R prompts laid end to end: prompt r is `cu_seqlens[r]:cu_seqlens[r + 1]`.

    With `prefix` there are other keys in place of their own, that many, and all rows see all of
    them.
    """

    cu_seqlens: Tensor
    longest: int
    prefix: int | None = None

    @property
    def causal(self) -> bool:
        """Whether the keys are the prompts' own."""
        return self.prefix is None

    @property
    def both(self) -> tuple[Tensor, Tensor, int, int]:
        """Bounds of queries and keys, and the longest of each, as flash attention takes them."""
        return self.cu_seqlens, self.key_bounds, self.longest, self.prefix or self.longest

    @property
    def key_bounds(self) -> Tensor:
        """Bounds of the keys; a prefix is that of one prompt that all tokens together make."""
        if self.prefix is None:
            return self.cu_seqlens
        return self.cu_seqlens.new_tensor([0, self.prefix])


class FlashAttention(NamedTuple):
    """One implementation of attention over packed prompts.

    Attributes:
        forward: (q, k, v, prompts, scores) -> (out, log-sum-exp), no sinks.
        backward: (grad_out, q, k, v, out, log-sum-exp, prompts, scores) -> (dq, dk, dv).
        unable: (q, softcap) -> why it cannot run here, or None.
    """

    forward: Callable
    backward: Callable
    unable: Callable[[Tensor, float | None], str | None]


def _left(scores: Scores, none: int | None) -> int | None:
    """How many keys before its own a row sees."""
    return none if scores.window is None else scores.window - 1


# flash-attn, the package


def _flash_attn_unable(q: Tensor, softcap: float | None) -> str | None:
    if not _FLASH_ATTN:
        return "the package flash-attn 2 cannot be imported"
    return _needs_recent_gpu(q)


def _needs_recent_gpu(q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"it runs on a GPU, not on the {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"it takes head dimensions up to 256, not {q.shape[-1]}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _flash_attn_options(scores: Scores, causal: bool = True) -> dict:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scores.scale,
        "causal": causal,
        "window_size_left": _left(scores, none=-1),
        "window_size_right": 0 if causal else -1,
        "softcap": scores.softcap or 0.0,
    }


def _flash_attn_forward(q, k, v, prompts: Prompts, scores: Scores) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _flash_attn_varlen_forward(
        *_padded(q, k, v),
        *prompts.both,
        **_flash_attn_options(scores, prompts.causal),
    )
    return out[..., : q.shape[-1]], lse


def _flash_attn_backward(grad_out, q, k, v, out, lse, prompts: Prompts, scores: Scores):
    grad_out, padded_q, padded_k, padded_v, out = _padded(grad_out, q, k, v, out)
    grads = [torch.empty_like(t) for t in (padded_q, padded_k, padded_v)]
    _flash_attn_varlen_backward(
        grad_out,
        padded_q,
        padded_k,
        padded_v,
        out,
        lse,
        *grads,
        *prompts.both,
        **_flash_attn_options(scores),
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return [grad[..., : q.shape[-1]] for grad in grads]


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Head dimensions filled up with zeros to the multiple of 8 flash attention takes."""
    missing = -tensors[0].shape[-1] % 8
    if missing:
        return [F.pad(t, (0, missing)) for t in tensors]
    return _unit_stride(*tensors)


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


# Flash attention inside torch, which `torch.nn.attention.varlen` is made of


def _varlen_unable(q: Tensor, softcap: float | None) -> str | None:
    if softcap is not None:
        return "it has no soft-cap"
    if not _VARLEN:
        return "torch.nn.attention.varlen came with torch 2.10"
    return _needs_recent_gpu(q)


def _varlen_forward(q, k, v, prompts: Prompts, scores: Scores) -> tuple[Tensor, Tensor]:
    _switch_inside_torch(flash_attn_3=False)
    return _torch_forward(q, k, v, prompts, scores)


def _varlen_backward(grad_out, q, k, v, out, lse, prompts: Prompts, scores: Scores):
    _switch_inside_torch(flash_attn_3=False)
    return _torch_backward(grad_out, q, k, v, out, lse, prompts, scores)


def _torch_forward(q, k, v, prompts: Prompts, scores: Scores) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_padded(q, k, v),
        *prompts.both,
        0.0,
        prompts.causal and scores.window is None,  # a window says so itself
        False,
        scale=scores.scale,
        window_size_left=_left(scores, none=None),
        window_size_right=None if scores.window is None else 0,
    )
    return out[..., : q.shape[-1]], lse


def _torch_backward(grad_out, q, k, v, out, lse, prompts: Prompts, scores: Scores):
    grads = torch.ops.aten._flash_attention_backward(
        *_padded(grad_out, q, k, v, out),
        lse,
        *prompts.both,
        0.0,
        scores.window is None,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # random state: there is no dropout
        torch.empty(0, device=q.device),
        scale=scores.scale,
        window_size_left=_left(scores, none=None),
        window_size_right=None if scores.window is None else 0,
    )
    return [grad[..., : q.shape[-1]] for grad in grads]


# flash-attn 3, which torch puts in the place of its own: the package changes its signatures from
# version to version, and torch follows them. Written by torch's signatures, never run so far.


def _flash_attn_3_unable(q: Tensor, softcap: float | None) -> str | None:
    if not _FLASH_ATTN_3:
        return "its package, flash_attn_interface, cannot be imported"
    if torch.__version__ < (2, 13):
        return "it needs torch 2.13"
    if softcap is not None:
        return "it has no soft-cap inside torch"
    reason = _needs_recent_gpu(q)
    hopper = reason is None and torch.cuda.get_device_capability(q.device)[0] == 9
    return reason or (None if hopper and torch.version.hip is None else "it needs a Hopper GPU")


def _switch_inside_torch(flash_attn_3: bool) -> None:
    """For the whole process, where it is not so yet; another implementation of the user's stays."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if flash_attn_3 and current != "FA3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif not flash_attn_3 and current == "FA3":
        torch.nn.attention.restore_flash_attention_impl()


def _flash_attn_3_forward(q, k, v, prompts: Prompts, scores: Scores) -> tuple[Tensor, Tensor]:
    _switch_inside_torch(flash_attn_3=True)
    return _torch_forward(q, k, v, prompts, scores)


def _flash_attn_3_backward(grad_out, q, k, v, out, lse, prompts: Prompts, scores: Scores):
    _switch_inside_torch(flash_attn_3=True)
    return _torch_backward(grad_out, q, k, v, out, lse, prompts, scores)


# The CPU's flash attention, which `scaled_dot_product_attention` calls there, a prompt at a time


def _cpu_unable(q: Tensor, softcap: float | None) -> str | None:
    if q.device.type != "cpu":
        return "it runs on the CPU"
    return None if softcap is None else "it has no soft-cap"


def _cpu_forward(q, k, v, prompts: Prompts, scores: Scores) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    q, k, v = _unit_stride(q, k, v)
    bounds = (itertools.pairwise(t.tolist()) for t in (prompts.cu_seqlens, prompts.key_bounds))
    for (a, b), (c, d) in zip(*bounds, strict=True):
        query, (key, value) = one_prompt(a, b, q), one_prompt(c, d, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *query, key, value, **_cpu_mask(b - a, q, scores, prompts.causal)
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _cpu_backward(grad_out, q, k, v, out, lse, prompts: Prompts, scores: Scores):
    grads = []
    tensors = _unit_stride(grad_out, q, k, v, out)
    for a, b in itertools.pairwise(prompts.cu_seqlens.tolist()):
        grads.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *one_prompt(a, b, *tensors),
                lse[None, :, a:b],
                dropout_p=0.0,
                **_cpu_mask(b - a, q, scores),
            )
        )
    return [torch.cat([t[0].transpose(0, 1) for t in each]) for each in zip(*grads, strict=True)]


def _cpu_mask(length: int, q: Tensor, scores: Scores, causal: bool = True) -> dict:
    if not causal or scores.window is None or length <= scores.window:
        return {"is_causal": causal, "attn_mask": None, "scale": scores.scale}
    mask = torch.zeros(length, length, dtype=q.dtype)
    mask.masked_fill_(~visible_keys(length, scores.window, q.device), -torch.inf)
    return {"is_causal": False, "attn_mask": mask, "scale": scores.scale}


FLASH_ATTENTIONS = {
    "flash-attn": FlashAttention(_flash_attn_forward, _flash_attn_backward, _flash_attn_unable),
    "varlen": FlashAttention(_varlen_forward, _varlen_backward, _varlen_unable),
    "sdpa": FlashAttention(_cpu_forward, _cpu_backward, _cpu_unable),
    # Last, so that only who asks for it gets what nobody has run yet.
    "flash-attn-3": FlashAttention(
        _flash_attn_3_forward, _flash_attn_3_backward, _flash_attn_3_unable
    ),
}


def attention_forward(
    name: str, q, k, v, sinks: Tensor | None, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, D) and log-sum-exp (Hq, T), sinks included."""
    out, lse = FLASH_ATTENTIONS[name].forward(q, k, v, prompts, scores)
    if sinks is not None:
        without = lse
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = (out * torch.exp(without - lse).T[..., None]).to(out.dtype)
    return out, lse


def attention_backward(
    name: str, grad_out, q, k, v, sinks: Tensor | None, out, lse, prompts: Prompts, scores: Scores
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the sinks."""
    dq, dk, dv = FLASH_ATTENTIONS[name].backward(grad_out, q, k, v, out, lse, prompts, scores)
    if sinks is None:
        return dq, dk, dv, None
    alpha = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    delta = (grad_out.to(lse.dtype) * out).sum(dim=-1).T
    return dq, dk, dv, -(alpha * delta).sum(dim=1).to(sinks.dtype)
