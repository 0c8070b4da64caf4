"""One last check before a run: on this very model, packed attention equals its own eager one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from abft_fast import attention
from abft_fast.attention import PackedForward
from abft_fast.backbone import prepare
from abft_fast.errors import UserError
from abft_fast.objective import run_packed
from abft_fast.packing import EncodedPrompt, pack

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check_attention(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    autocast: Callable = contextlib.nullcontext,
) -> None:
    """Compare the last hidden states of the two shortest prompts, packed and one by one.

    Raises:
        UserError: they differ: the family does something in its attention that the packed one
            does not know.
    """
    shortest = sorted(prompts, key=len)[:2]
    inner = prepare(model)
    device = inner.get_input_embeddings().weight.device
    forward = PackedForward(pack(shortest), {"penalty": 0.0, "reward": 0.0})
    model.eval()
    with torch.no_grad(), autocast():
        packed = run_packed(inner, forward).last_hidden_state[0]
        inner.set_attn_implementation("eager")
        try:
            alone = [
                inner(torch.tensor([p.input_ids], device=device), use_cache=False) for p in shortest
            ]
        finally:
            inner.set_attn_implementation(attention.NAME)
    eager = torch.cat([output.last_hidden_state[0] for output in alone])
    error = ((packed - eager).float().norm() / eager.float().norm()).item()
    if not error <= _TOLERANCE[eager.dtype]:
        raise UserError(
            f"{inner.config.model_type}: packed attention differs from the model's own by "
            f"{error:.1%}, so its loss would be wrong; this family is not supported"
        )
