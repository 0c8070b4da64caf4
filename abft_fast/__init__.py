"""Attention Behavior Fine-Tuning: packed, fused, on one GPU or a laptop's CPU."""

from abft_fast.builtin import builtin_model_path
from abft_fast.objective import AttentionBehavior, attention_behavior_loss
from abft_fast.packing import EncodedPrompt, PackedPrompts, pack

__all__ = [
    "AttentionBehavior",
    "EncodedPrompt",
    "PackedPrompts",
    "attention_behavior_loss",
    "builtin_model_path",
    "pack",
]
