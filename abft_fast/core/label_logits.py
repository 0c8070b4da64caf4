"""Logits of the label words alone: evaluation needs no other row of the LM head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft_fast.core.backbone import must_run_alone, prepare, without_peft
from abft_fast.core.behavior import AttentionBehavior, mean_over_batches
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, PackedPrompts, pack
from abft_fast.core.run_packed import run_packed


def keep_label_rows(model: PreTrainedModel, label_ids: Sequence[int]) -> None:
    """Free all rows of the LM head but the label words': 2 GB of a 70B model.

    Afterwards the model's logits are the label words' alone; its scale and soft-cap of logits stay.
    A head stays whole if it shares its weight with the input embedding, or is quantized, adapted or
    offloaded.

    Args:
        model: a decoder with LM head.
        label_ids: the label words' tokens.
    """
    head = without_peft(model).get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.is_meta or hasattr(head, "label_ids"):
        return
    if head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        return
    rows = {name: parameter.data[list(label_ids)] for name, parameter in head.named_parameters()}
    set_label_rows(model, label_ids, rows)


def set_label_rows(
    model: PreTrainedModel, label_ids: Sequence[int], rows: Mapping[str, Tensor]
) -> None:
    """Give the LM head the label words' rows alone.

    Args:
        model: a decoder whose head is a float linear layer.
        label_ids: tokens of the label words.
        rows: of the head's weight and bias, by name, in the order of `label_ids`.
    """
    head = without_peft(model).get_output_embeddings()
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(rows[name], requires_grad=parameter.requires_grad))
    head.out_features = len(label_ids)
    head.label_ids = tuple(label_ids)


def label_columns(model: PreTrainedModel, label_ids: Sequence[int]) -> list[int]:
    """Return the columns of the label words' logits in the model's output.

    Raises:
        ValueError: the LM head has kept no row of a label word.
    """
    kept = getattr(without_peft(model).get_output_embeddings(), "label_ids", None)
    if kept is None:
        return list(label_ids)
    missing = set(label_ids) - set(kept)
    if missing:
        raise ValueError(
            f"token {min(missing)} is not one of the {len(kept)} tokens that the LM head has kept"
        )
    return [kept.index(token) for token in label_ids]


@contextmanager
def only_label_logits(model: PreTrainedModel, label_ids: Sequence[int]) -> Iterator[list[int]]:
    """Let the LM head compute the label words' logits alone, and in float32.

    In bfloat16 two logits between 16 and 32 that differ by less than 0.12 may become one number.
    A head that is quantized, has LoRA or is offloaded stays as it is.

    Yields:
        The columns of the label words' logits in the model's output.

    Raises:
        ValueError: as `label_columns`.
    """
    head, columns = without_peft(model).get_output_embeddings(), label_columns(model, label_ids)
    maps = [head]
    if hasattr(head, "modules_to_save"):  # PEFT's wrapper of a head that was trained
        maps = [head.original_module, *head.modules_to_save.values()]
    if any(type(m) is not nn.Linear or m.weight.is_meta or "forward" in vars(m) for m in maps):
        yield columns
        return
    for linear in maps:
        linear.forward = partial(_some_rows_in_float32, linear, columns)
    try:
        yield list(range(len(columns)))
    finally:
        for linear in maps:
            del linear.forward


def _some_rows_in_float32(linear: nn.Linear, rows: list[int], hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight = linear.weight[rows].to(dtype)
    bias = None if linear.bias is None else linear.bias[rows].to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), weight, bias)


def label_logits(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    label_ids: Sequence[int],
    attention: str = "auto",
) -> tuple[Tensor, AttentionBehavior, PackedPrompts]:
    """Return the label words' logits after each of R prompts, and what attention did meanwhile.

    Returns:
        Logits (R, labels), the attention behavior, and the packed prompts.

    Raises:
        ValueError: the LM head has kept no row of a label word, or as `run_packed`.
    """
    packed = pack(prompts)
    forward = PackedForward(packed, attention=attention)
    if len(prompts) > 1 and must_run_alone(prepare(model), forward.longest):
        alone = [label_logits(model, [prompt], label_ids, attention) for prompt in prompts]
        behaviors = [behavior for _, behavior, _ in alone]
        return torch.cat([rows for rows, _, _ in alone]), mean_over_batches(behaviors), packed
    return label_logits_of(model, forward, label_ids), forward.behavior(), packed


def label_logits_of(
    model: PreTrainedModel, forward: PackedForward, label_ids: Sequence[int]
) -> Tensor:
    """Return the label words' logits after each of R prompts, (R, labels), of one forward.

    Raises:
        ValueError: as `label_logits`.
    """
    last = forward.packed.cu_seqlens[1:].long() - 1
    with only_label_logits(model, label_ids) as columns:
        return run_packed(model, forward, logits_to_keep=last).logits[0][:, columns]
