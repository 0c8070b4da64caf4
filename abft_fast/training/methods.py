"""The methods of `--method`: each its loss, in one and the same loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.language_model_loss import every_token, label_target, language_model_loss
from abft_fast.core.objective import attention_behavior_loss
from abft_fast.core.packing import EncodedPrompt, PackedPrompts
from abft_fast.options import TrainConfig


def method_loss(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    packed: PackedPrompts,
    config: TrainConfig,
    penalty: float,
) -> AttentionBehavior:
    """A method's loss, mean over prompts, and what the heads do on the way.

    Args:
        prompts: from `training_prompts`.
        packed: the same, on the model's device.
        penalty: A of ABFT, now.
    """
    if config.method != "ABFT":
        return language_model_loss(model, prompts, attention=config.attention_backend)
    return attention_behavior_loss(
        model,
        packed,
        penalty=penalty,
        reward=config.reward,
        head_filter=config.head_filter,
        gradient=config.gradient,
        attention=config.attention_backend,
    )


def example_prompt(config: TrainConfig, length: int) -> EncodedPrompt:
    """A training prompt of `length` tokens 0, with labels and targets where a method has them."""
    every = length // (config.k + 1)
    labels = list(range(every - 1, length - 1, every))[: config.k] if every else []
    prompt = EncodedPrompt([0] * length, labels, [True] * len(labels))
    match config.method:
        case "ABFT":
            return prompt
        case "PICL":
            return every_token(prompt.input_ids)
    return label_target(prompt, 0)
