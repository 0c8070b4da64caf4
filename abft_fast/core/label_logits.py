"""The label words' rows of an LM head: evaluation reads no others, training reads none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from abft_fast.core.backbone import without_peft


def keep_label_rows(model: nn.Module, label_ids: Sequence[int]) -> None:
    """Free all other rows of the LM head, 2 GB of a 70B model's; logits are then the labels' alone.

    Scales and soft-caps of logits stay the model's own. Heads that share their weight with the
    input embedding, are quantized, adapted or offloaded, stay whole.
    """
    head = without_peft(model).get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.is_meta or hasattr(head, "label_ids"):
        return
    if head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        return
    for name, parameter in list(head.named_parameters()):
        rows = parameter.data[list(label_ids)]
        setattr(head, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    head.out_features = len(label_ids)
    head.label_ids = tuple(label_ids)


def label_columns(model: nn.Module, label_ids: Sequence[int]) -> list[int]:
    """Where the label words' logits are in the model's output.

    Raises:
        ValueError: only rows of other tokens were kept.
    """
    kept = getattr(without_peft(model).get_output_embeddings(), "label_ids", None)
    if kept is None:
        return list(label_ids)
    missing = set(label_ids) - set(kept)
    if missing:
        raise ValueError(f"token {min(missing)} is not one of the {len(kept)} the LM head has kept")
    return [kept.index(token) for token in label_ids]
