"""Count the memory that an operation takes inside itself, beside its inputs and results.

Fake tensors do not show it. The sizes are read from the source of the operations, and nobody has
measured those of a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

_ROW_BLOCK = 128  # flash attention keeps that many rows of room between prompts


def bytes_inside(function: Any, args: tuple, kwargs: dict[str, Any], device_type: str) -> int:
    """Return the bytes that one call on `device_type` takes inside itself; 0 where not known."""
    count = _INSIDE.get(str(function))
    if count is None:
        return 0
    given = dict(zip((a.name for a in function._schema.arguments), args, strict=False))
    return count({**given, **kwargs}, device_type)


def _dequantized_weight(call: dict[str, Any], device_type: str) -> int:
    """Count the weight that bitsandbytes' product in 4 bits dequantizes to multiply with it.

    Source: bitsandbytes 0.50.2, `_dequant_linear_fallback` in backends/cuda/ops.py and
    `_gemm_4bit_default_impl` in backends/default/ops.py. It takes the weight in the input's dtype;
    with nested statistics also a float32 factor a block, on a GPU twice. A GPU dequantizes wherever
    the input has more than 1,536 rows. With fewer rows some GPUs do not; the plan counts the weight
    there too, because its memory has to grow linearly with tokens.
    """
    numel = math.prod(call["shapeB"])
    statistics = 0
    if call.get("absmax_8bit") is not None:
        statistics = call["absmax_8bit"].numel() * torch.float32.itemsize
        statistics *= 2 if device_type == "cuda" else 1
    return numel * call["A"].element_size() + statistics


def _flash_attention_workspace(call: dict[str, Any], device_type: str) -> int:
    """Count the workspace of flash attention's backward on a GPU.

    Source: `mha_varlen_bwd` in PyTorch's flash_attn/flash_api.cpp, as in flash-attn 2, without
    `deterministic`. With T tokens of R prompts it takes two float32 tensors, the accumulator of dq
    of (T + 128 R, Hq, D) and softmax_d of (Hq, T + 128 R). D is rounded to a multiple of 32, above
    128 to one of 64. If query heads share key heads, it takes dk and dv once a query head, too.
    """
    if device_type != "cuda" or call["grad_out"] is None:
        return 0
    query, key = call["query"], call["key"]
    tokens, heads, head_dim = query.shape
    unit = 32 if head_dim <= 128 else 64
    rounded = -(-head_dim // unit) * unit
    rows = tokens + _ROW_BLOCK * (len(call["cu_seqlens"]) - 1)
    accumulated = rows * heads * (rounded + 1) * torch.float32.itemsize
    shared = heads != key.shape[1]
    return accumulated + 2 * shared * tokens * heads * head_dim * query.element_size()


_INSIDE: dict[str, Callable[[dict[str, Any], str], int]] = {
    "bitsandbytes.gemm_4bit.default": _dequantized_weight,
    "abft.flash_attention_with_last_row_loss_backward.default": _flash_attention_workspace,
}
