"""Say what each method of `--method` trains: on which prompts, by which loss.

`options.methods` has the facts about a method that need no torch. To add a method, add an entry to
both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel

from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.language_model_loss import (
    TargetedPrompt,
    every_token,
    label_target,
    language_model_loss,
)
from abft_fast.core.objective import attention_behavior_loss
from abft_fast.core.packing import EncodedPrompt, PackedPrompts
from abft_fast.data import Dataset
from abft_fast.options import TrainConfig
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.training import method_prompts

MakePrompts = Callable[[TrainConfig, Dataset, PromptEncoder], EncodedPrompts]
Loss = Callable[
    [PreTrainedModel, Sequence[EncodedPrompt], PackedPrompts, TrainConfig, float], AttentionBehavior
]


@dataclass(frozen=True)
class TrainingMethod:
    """What a method trains.

    Attributes:
        prompts: makes the training prompts of a run.
        loss: computes the loss of packed prompts.
        add_targets: turns a prompt into one that the loss takes, with made-up targets.
        shortened: says what is done to a training prompt beyond the model's context.
    """

    prompts: MakePrompts
    loss: Loss
    add_targets: Callable[[EncodedPrompt], EncodedPrompt]
    shortened: str = "with fewer demonstrations"


def training_prompts(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder
) -> EncodedPrompts:
    """Return the training prompts of a run.

    Args:
        config: the run's options.
        dataset: the dataset that the run tests on.
        encoder: that dataset's encoder.

    Raises:
        UserError: the data do not allow it.
    """
    return TRAINING_METHODS[config.method].prompts(config, dataset, encoder)


def method_loss(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    packed: PackedPrompts,
    config: TrainConfig,
    penalty: float,
) -> AttentionBehavior:
    """Return a method's mean loss over prompts, and what the heads do.

    Args:
        model: the model to train.
        prompts: some of those from `training_prompts`.
        packed: the same prompts on the model's device.
        config: the run's options.
        penalty: the current A, for the methods that use one; the current factor of ln S with
            `--objective share`.
    """
    return TRAINING_METHODS[config.method].loss(model, prompts, packed, config, penalty)


def example_prompt(config: TrainConfig, length: int) -> EncodedPrompt:
    """Return a training prompt of `length` tokens 0, with the labels and targets of a real one."""
    spacing = length // (config.k + 1)
    labels = list(range(spacing - 1, length - 1, spacing))[: config.k] if spacing else []
    prompt = EncodedPrompt([0] * length, labels, [True] * len(labels))
    return TRAINING_METHODS[config.method].add_targets(prompt)


def _attention_loss(
    model: PreTrainedModel,
    _: Sequence[EncodedPrompt],
    packed: PackedPrompts,
    config: TrainConfig,
    penalty: float,
) -> AttentionBehavior:
    return attention_behavior_loss(
        model,
        packed,
        **loss_options(config, penalty),
        gradient=config.gradient,
        attention=config.attention_backend,
    )


def loss_options(config: TrainConfig, penalty: float) -> dict[str, Any]:
    """Return the options of ABFT's loss at a step; `penalty` is as for `method_loss`."""
    factors = {"penalty": penalty, "reward": config.reward}
    if config.objective == "share":
        factors = {"penalty": config.penalty, "reward": config.reward, "hold": penalty}
    return {**factors, "head_filter": config.head_filter, "objective": config.objective}


def _output_loss(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    _: PackedPrompts,
    config: TrainConfig,
    __: float,
) -> AttentionBehavior:
    targeted = cast(Sequence[TargetedPrompt], prompts)  # as this method's `prompts` makes them
    return language_model_loss(model, targeted, attention=config.attention_backend)


def _label_0(prompt: EncodedPrompt) -> EncodedPrompt:
    return label_target(prompt, 0)


TRAINING_METHODS = {
    "ABFT": TrainingMethod(method_prompts.without_targets, _attention_loss, lambda prompt: prompt),
    "E2E": TrainingMethod(method_prompts.with_label_targets, _output_loss, _label_0),
    "MetaICL": TrainingMethod(method_prompts.with_label_targets, _output_loss, _label_0),
    "PICL": TrainingMethod(
        method_prompts.plain_text,
        _output_loss,
        lambda prompt: every_token(prompt.input_ids),
        shortened="cut to their end",
    ),
}
"""Every method, by its name."""
