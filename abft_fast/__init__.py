"""Attention Behavior Fine-Tuning: packed, fused, on GPUs or a laptop's CPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abft_fast.builtin import builtin_model_path
    from abft_fast.core.behavior import AttentionBehavior
    from abft_fast.core.objective import attention_behavior_loss
    from abft_fast.core.packing import EncodedPrompt, PackedPrompts, pack
    from abft_fast.models.preflight import check_attention

__version__ = "0.1.0"  # pyproject.toml reads it here

_MODULES = {
    "AttentionBehavior": "core.behavior",
    "EncodedPrompt": "core.packing",
    "PackedPrompts": "core.packing",
    "attention_behavior_loss": "core.objective",
    "builtin_model_path": "builtin",
    "check_attention": "models.preflight",
    "pack": "core.packing",
}

__all__ = [
    "AttentionBehavior",
    "EncodedPrompt",
    "PackedPrompts",
    "attention_behavior_loss",
    "builtin_model_path",
    "check_attention",
    "pack",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command line answers a typo without loading torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'abft_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"abft_fast.{_MODULES[name]}"), name)
