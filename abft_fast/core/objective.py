"""The attention-behavior loss of a whole model on packed prompts, for any training loop.

Source: Cho et al. 2025, section 3.
"""

from __future__ import annotations

import torch
from abft_kernels import check_options
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core.backbone import (
    attention_layers,
    decoder_layers,
    must_run_alone,
    prepare,
    query_key_projections,
)
from abft_fast.core.behavior import AttentionBehavior, mean_over_batches
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import PackedPrompts, pack
from abft_fast.core.run_packed import run_packed

_NO_GRADIENT = (
    "the loss has no gradient though the model has trainable parameters: with gradient "
    'checkpointing pass gradient_checkpointing_kwargs={"use_reentrant": False}; '
    "otherwise train W_Q or W_K"
)


def attention_behavior_loss(
    model: PreTrainedModel,
    packed: PackedPrompts,
    *,
    penalty: float | Tensor = 0.5,
    reward: float | Tensor = 1.0,
    head_filter: bool = True,
    gradient: str | int = "full",
    attention: str = "auto",
    objective: str = "mass",
    hold: float | Tensor = 0.0,
) -> AttentionBehavior:
    """Run the decoder once, without its LM head, and return the loss of all its last rows.

    The first call routes the model's attention through this library; the model is otherwise
    unchanged and still generates. Autocast is the caller's: what `accelerator.prepare(model)` sets
    up does not reach the decoder, so with mixed precision call this under `accelerator.autocast()`.

    Args:
        model: a transformers decoder, with or without LM head, quantized or not, LoRA or not.
        packed: prompts from `abft_fast.pack`, on any device.
        penalty: A in the paper, on attention to wrong labels; a float >= 0 or a 0-d tensor.
        reward: B in the paper, on attention missing from right labels; a float >= 0 or a 0-d
            tensor.
        head_filter: count induction heads only (paper, section 3).
        gradient: `"full"` lets a layer's loss train every earlier layer; `"local"` trains that
            layer alone; an int N trains its own block of N consecutive layers. The last two train
            parameters of decoder layers only and need the memory of one block: a block's gradients
            are computed when its last attention is done (hooks on parameters run then, and again
            in the backward), unless layers are checkpointed.
        attention: which attention runs; see `abft_kernels.choose_attention`.
        objective: `"mass"`, the paper's equation 1, or `"share"` (ours): 1 - C / S of each head, C
            the attention on correct labels and S that on all labels, without penalty and reward. A
            prompt with labels of one kind alone has no such loss.
        hold: factor of ln S in `"share"`, above 0 against attention on all labels and below 0 for
            it; a float or a 0-d tensor.

    Returns:
        AttentionBehavior; its dimension `layers` has only layers with attention.

    Raises:
        ValueError: an option is malformed, a token id is outside the vocabulary (checked on a CPU
            only), the model's attention does not reach this library (`UnsupportedModel`), or the
            attention asked for cannot run.
        RuntimeError: a parameter is trained but its loss has no gradient, as under reentrant
            checkpointing of all layers or some.
    """
    check_options(penalty, reward, objective=objective, hold=hold)
    block = block_size(gradient)
    options = {
        "penalty": penalty,
        "reward": reward,
        "head_filter": head_filter,
        "objective": objective,
        "hold": hold,
    }
    inner = prepare(model)
    batches = [packed]
    if len(packed) > 1 and must_run_alone(inner, packed.longest):
        batches = [pack([prompt]) for prompt in packed.unpack()]
    last = max(attention_layers(inner))
    behaviors = []
    for batch in batches:
        forward = PackedForward(batch, options, attention, block, stop_after=last)
        run_packed(inner, forward)
        _check_checkpointed(model, inner, forward)
        behaviors.append(forward.behavior())
    behavior = mean_over_batches(behaviors)
    if (
        torch.is_grad_enabled()
        and not behavior.loss.requires_grad
        and any(p.requires_grad for p in model.parameters())
    ):
        raise RuntimeError(_NO_GRADIENT)
    return behavior


def _check_checkpointed(
    model: PreTrainedModel, inner: PreTrainedModel, forward: PackedForward
) -> None:
    """Refuse layers that train W_Q or W_K, but whose reentrant checkpoint loses their loss's graph.

    Raises:
        RuntimeError: there is such a layer.
    """
    if not torch.is_grad_enabled():
        return
    with_graph = forward.results.with_graph()
    without = [
        index
        for index, layer in enumerate(decoder_layers(inner))
        if layer.training and getattr(layer, "gradient_checkpointing", False)
        if index in forward.results and index not in with_graph
    ]
    if without and any(
        parameter.requires_grad
        for projection in query_key_projections(model)
        if projection.layer in without
        for parameter in projection.module.parameters()
    ):
        raise RuntimeError(_NO_GRADIENT)


def block_size(gradient: str | int) -> int | None:
    """Return how many layers a gradient may cross; None for all of them.

    Raises:
        ValueError: the gradient mode is malformed.
    """
    if gradient == "full":
        return None
    if gradient == "local":
        return 1
    if isinstance(gradient, int) and not isinstance(gradient, bool) and gradient >= 1:
        return gradient
    raise ValueError(f'gradient must be "full", "local" or a number of layers, not {gradient!r}')
