"""The attention-behavior loss of a whole model on packed prompts.

Source: Cho et al. 2025, section 3. This is the piece for a training loop of one's own.
"""

from __future__ import annotations

import torch
from abft_kernels import check_options
from torch import Tensor, nn

from abft_fast.core.attention import AttentionBehavior, LossComplete, PackedForward
from abft_fast.core.backbone import attention_layers, must_run_alone, prepare, without_peft
from abft_fast.core.packing import PackedPrompts, pack


def attention_behavior_loss(
    model: nn.Module,
    packed: PackedPrompts,
    *,
    penalty: float | Tensor = 0.5,
    reward: float | Tensor = 1.0,
    head_filter: bool = True,
    gradient: str | int = "full",
    attention: str = "auto",
) -> AttentionBehavior:
    """One forward of the decoder, without its LM head, and the loss of all its last rows.

    The first call routes the model's attention through this library; the model is otherwise
    unchanged and still generates.

    Args:
        model: a transformers decoder, with or without LM head, quantized or not, LoRA or not.
        packed: prompts from `abft_fast.pack`, on any device.
        penalty: A in the paper, on attention to wrong labels; a float >= 0 or a 0-d tensor.
        reward: B in the paper, on attention missing from right labels; the same.
        head_filter: count induction heads only (paper, section 3).
        gradient: `"full"` lets a layer's loss train every earlier layer; `"local"` trains that
            layer alone; an int N trains its own block of N consecutive layers. The last two train
            parameters of decoder layers only and need the memory of a block: its gradients are
            found when its last attention is done (hooks on parameters run then, and again in the
            backward), unless layers are checkpointed.
        attention: what computes attention, by `abft_kernels.choose_attention`.

    Returns:
        AttentionBehavior; `layers` counts the layers that have attention.

    Raises:
        ValueError: an option is malformed, a token id is outside the vocabulary (told on a CPU
            alone), the model's attention does not reach this library, or the attention asked for
            cannot run.
        RuntimeError: a parameter is trained but the loss has no gradient, as under reentrant
            checkpointing.
    """
    check_options(penalty, reward, None, None, None)
    block = _block_size(gradient)
    options = {"penalty": penalty, "reward": reward, "head_filter": head_filter}
    inner = prepare(model)
    batches = [packed]
    if len(packed) > 1 and must_run_alone(inner, int(packed.cu_seqlens.diff().max())):
        batches = [pack([prompt]) for prompt in packed.unpack()]
    found = []
    last = max(attention_layers(inner))
    for batch in batches:
        forward = PackedForward(batch, options, attention, block, stop_after=last)
        run_packed(inner, forward)
        found.append(forward.behavior())
    behavior = join(found)
    if (
        torch.is_grad_enabled()
        and not behavior.loss.requires_grad
        and any(p.requires_grad for p in model.parameters())
    ):
        raise RuntimeError(
            "the loss has no gradient though the model has trainable parameters: with gradient "
            'checkpointing pass gradient_checkpointing_kwargs={"use_reentrant": False}; '
            "otherwise train W_Q or W_K"
        )
    return behavior


def join(parts: list[AttentionBehavior]) -> AttentionBehavior:
    """The behavior on all prompts from that on equal parts of them."""
    fields = (torch.cat(parts, dim=1) for parts in list(zip(*parts, strict=True))[1:])
    return AttentionBehavior(torch.stack([part.loss for part in parts]).mean(), *fields)


def run_packed(model: nn.Module, forward: PackedForward, **kwargs):
    """Run a backbone, or a model with its LM head, on packed prompts.

    Returns:
        transformers' own output; None where `forward.stop_after` ended it.

    Raises:
        ValueError: a token id is outside the vocabulary (told on a CPU alone), a layer's attention
            did not reach this library, or the model cannot keep these prompts apart.
    """
    inner = prepare(model)
    alone = len(forward.packed) == 1 and forward.prefix is None
    if not alone and must_run_alone(inner, forward.context):
        raise ValueError(f"{inner.config.model_type}: prompts must be run one at a time")
    embedding = inner.get_input_embeddings().weight
    packed = forward.on(embedding.device)
    if embedding.device.type == "cpu":
        outside = (packed.input_ids < 0) | (packed.input_ids >= len(embedding))
        if outside.any():
            raise ValueError(
                f"input_ids holds {int(packed.input_ids[outside][0])}, "
                f"the model's vocabulary is 0 to {len(embedding) - 1}"
            )
    output = None
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # blocks switch it off and on
            output = without_peft(model)(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                # Passed through as it is: no mask is built, prompts are kept apart by `abft`.
                attention_mask=packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
                use_cache=False,
                abft=forward,
                **kwargs,
            )
    except LossComplete:
        pass
    except BaseException:
        forward.layers.clear()  # they would keep the failed attempt's tensors
        raise
    missing = set(attention_layers(inner)) - set(forward.layers)
    if missing:
        raise ValueError(
            f"{inner.config.model_type}: attention of layers {sorted(missing)} does not reach "
            "the loss (no keyword arrives through AttentionInterface); not supported"
        )
    return output


def _block_size(gradient: str | int) -> int | None:
    if gradient == "full":
        return None
    if gradient == "local":
        return 1
    if isinstance(gradient, int) and not isinstance(gradient, bool) and gradient >= 1:
        return gradient
    raise ValueError(f'gradient must be "full", "local" or a number of layers, not {gradient!r}')
