"""A language model's loss on packed prompts, at chosen tokens only.

The baselines train it: end-to-end fine-tuning, MetaICL, PICL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from abft_fast.core.backbone import must_run_alone, prepare
from abft_fast.core.behavior import AttentionBehavior, mean_over_batches
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, pack
from abft_fast.core.run_packed import run_packed
from abft_fast.core.transfer import on_device


@dataclass(frozen=True)
class TargetedPrompt(EncodedPrompt):
    """A prompt and the tokens that the model is to predict in it.

    Attributes:
        target_positions: the tokens after which it predicts, below n.
        targets: the token each prediction should be.
    """

    target_positions: list[int]
    targets: list[int]


def label_target(prompt: EncodedPrompt, label_id: int) -> TargetedPrompt:
    """Return the prompt with one target: the query's label, after the prompt's last token."""
    return TargetedPrompt(**vars(prompt), target_positions=[len(prompt) - 1], targets=[label_id])


def every_token(input_ids: list[int]) -> TargetedPrompt:
    """Return a prompt whose targets are all its tokens but the first."""
    return TargetedPrompt(input_ids, [], [], list(range(len(input_ids) - 1)), input_ids[1:])


def language_model_loss(
    model: PreTrainedModel, prompts: Sequence[TargetedPrompt], *, attention: str = "auto"
) -> AttentionBehavior:
    """Run one packed forward and return the cross-entropy at the prompts' targets.

    Only the targets' rows get logits, over the whole vocabulary.

    Args:
        model: a transformers decoder with LM head, quantized or not, LoRA or not.
        prompts: each with at least one target.
        attention: which attention runs; see `abft_kernels.choose_attention`.

    Returns:
        AttentionBehavior whose loss is the cross-entropy in nats, mean over a prompt's targets,
        then over prompts.

    Raises:
        ValueError: the LM head has kept some rows only, or as `run_packed`.
    """
    if hasattr(model.get_output_embeddings(), "label_ids"):
        raise ValueError("the LM head has kept the label words' rows only; load the model again")
    inner = prepare(model)
    batches = [prompts]
    if len(prompts) > 1 and must_run_alone(inner, max(map(len, prompts))):
        batches = [[prompt] for prompt in prompts]
    return mean_over_batches([_packed_loss(model, batch, attention) for batch in batches])


def _packed_loss(
    model: PreTrainedModel, prompts: Sequence[TargetedPrompt], attention: str
) -> AttentionBehavior:
    packed = pack(prompts)
    forward = PackedForward(packed, attention=attention)
    device = model.get_input_embeddings().weight.device
    positions = [
        start + position
        for start, prompt in zip(packed.bounds, prompts, strict=False)
        for position in prompt.target_positions
    ]
    counts = [len(p.targets) for p in prompts]
    kept, targets, weights = on_device(
        [
            torch.tensor(positions),
            torch.tensor([t for p in prompts for t in p.targets]),
            torch.tensor([1 / (n * len(prompts)) for n in counts for _ in range(n)]),
        ],
        device,
    )
    logits = run_packed(model, forward, logits_to_keep=kept).logits[0].float()
    targets, weights = targets.to(logits.device), weights.to(logits.device)
    # No product `@`: autocast would round its operands.
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    return forward.behavior()._replace(loss=loss)
