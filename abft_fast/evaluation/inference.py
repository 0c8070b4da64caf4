"""Predict the labels of packed prompts, and observe attention heads meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core.label_logits import label_logits
from abft_fast.core.packing import EncodedPrompt
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.prompts import EncodedPrompts
from abft_fast.runtime import processes
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.float32_linear import fast_float32_linear
from abft_fast.runtime.token_budget import in_halves


def predict_labels(
    model: PreTrainedModel,
    encoded: EncodedPrompts,
    token_budget: int,
    on_batch: Callable[[int, int], None] = lambda prompts, tokens: None,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    attention: str = "auto",
    behavior: bool = True,
) -> tuple[Tensor, BehaviorMean]:
    """Predict every prompt's label; each process predicts its share, and all get all logits.

    Args:
        model: a decoder with LM head.
        encoded: prompts, and the tokens of the label words at their queries.
        token_budget: tokens a packed batch, at most.
        on_batch: called after each batch with the numbers of its prompts and tokens.
        autocast: context manager around each forward.
        attention: which attention runs; see `abft_kernels.choose_attention`.
        behavior: whether to observe heads too.

    Returns:
        Logits of what may answer, (prompts, answers), on the CPU in float32, and the heads'
        behavior, an empty mean without `behavior`.

    Raises:
        FloatingPointError: a label's logit is not finite.
    """
    lengths = [len(prompt) for prompt in encoded.prompts]
    own = processes.own_share(lengths)
    logits = torch.empty(len(encoded.prompts), len(encoded.label_ids))
    heads = BehaviorMean()

    def predict_part(prompts: Sequence[EncodedPrompt]) -> Tensor:
        rows, attention_behavior, packed = label_logits(
            model, prompts, encoded.label_ids, attention
        )
        if behavior:
            heads.add(attention_behavior, packed)
        return rows.float().cpu()

    model.eval()
    with processes.fail_together(), torch.no_grad():
        for micro in micro_batches([lengths[i] for i in own], token_budget):
            batch = [own[i] for i in micro]
            prompts = [encoded.prompts[i] for i in batch]
            if not behavior:  # then labels need not be looked at
                prompts = [EncodedPrompt(prompt.input_ids, [], []) for prompt in prompts]
            with fast_float32_linear(), autocast():
                logits[batch] = torch.cat(in_halves(predict_part, prompts))
            on_batch(len(batch), sum(lengths[i] for i in batch))
        if not logits[own].isfinite().all():
            raise FloatingPointError("the model's logits of the label words are not finite")
    all_heads = BehaviorMean()
    for indices, rows, process_heads in processes.gather((own, logits[own], heads)):
        logits[indices] = rows
        all_heads.join(process_heads)
    return encoded.of_answers(logits), all_heads
