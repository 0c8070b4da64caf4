"""One last check before a run: on this very model, packed attention equals its own eager one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from abft_fast import attention
from abft_fast.attention import PackedForward
from abft_fast.backbone import must_run_alone, prepare
from abft_fast.errors import UserError
from abft_fast.objective import run_packed
from abft_fast.packing import EncodedPrompt, pack

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_QUANTIZED_TOLERANCE = 3e-2  # their products depend on how many rows are multiplied at once
_LONGEST = 2048  # eager attention keeps n x n scores a head


def check_attention(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    autocast: Callable = contextlib.nullcontext,
    attention_backend: str = "auto",
) -> dict[tuple[str, str], str]:
    """Compare last hidden states of a short and a long prompt, packed and each by itself.

    Returns:
        What the packed attention ran on; see `PackedForward.attentions`.

    Raises:
        UserError: they differ: the family does something in its attention that the packed one
            does not know.
    """
    ordered = sorted(prompts, key=len)
    longest = next((p for p in reversed(ordered) if len(p) <= _LONGEST), ordered[0])
    inner = prepare(model)
    device = inner.get_input_embeddings().weight.device
    pair = [ordered[0], longest]
    batches = [[p] for p in pair] if must_run_alone(inner, len(longest)) else [pair]
    model.eval()
    with torch.no_grad(), autocast():
        packed, attentions = [], {}
        for batch in batches:
            forward = PackedForward(pack(batch), {"penalty": 0.0, "reward": 0.0}, attention_backend)
            packed.append(run_packed(inner, forward).last_hidden_state[0])
            attentions |= forward.attentions
        arithmetic = packed[0].dtype
        if torch.is_autocast_enabled(device.type):
            arithmetic = torch.get_autocast_dtype(device.type)
        inner.set_attn_implementation("eager")
        try:
            eager = [
                inner(torch.tensor([p.input_ids], device=device), use_cache=False) for p in pair
            ]
        finally:
            inner.set_attn_implementation(attention.NAME)
    expected = torch.cat([output.last_hidden_state[0] for output in eager]).float()
    error = ((torch.cat(packed).float() - expected).norm() / expected.norm()).item()
    tolerance = _TOLERANCE[arithmetic]
    if getattr(inner.config, "quantization_config", None) is not None:
        tolerance = max(tolerance, _QUANTIZED_TOLERANCE)
    if not error <= tolerance:
        raise UserError(
            f"{inner.config.model_type}: packed attention differs from the model's own by "
            f"{error:.1%}, so its loss would be wrong; this family is not supported"
        )
    return attentions
