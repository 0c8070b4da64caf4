"""Attention Behavior Fine-Tuning: packed, fused, on GPUs or a laptop's CPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abft_fast.attention import AttentionBehavior
    from abft_fast.builtin import builtin_model_path
    from abft_fast.objective import attention_behavior_loss
    from abft_fast.packing import EncodedPrompt, PackedPrompts, pack

__all__ = [
    "AttentionBehavior",
    "EncodedPrompt",
    "PackedPrompts",
    "attention_behavior_loss",
    "builtin_model_path",
    "pack",
]

_MODULES = {
    "AttentionBehavior": "attention",
    "attention_behavior_loss": "objective",
    "builtin_model_path": "builtin",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers a typo without loading torch."""
    if name not in __all__:
        raise AttributeError(f"module 'abft_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"abft_fast.{_MODULES.get(name, 'packing')}"), name)
