"""A base model and its tuned model: one with an adapter, one whose weights move, or two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core.backbone import attention_layers, backbone
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.errors import UserError


class ModelPair:
    """Two models of one shape.

    Args:
        base: the base, or a model of PEFT, whose adapter makes the tuned model.
        tuned: the tuned model; None where `base` has an adapter, or where there is no other model.
        changes: what the tuned model's weights have more than the base's, by name; give it instead
            of an adapter or `tuned`.

    Attributes:
        layers: the indices of the layers that have attention.
        heads: query heads of a layer.

    Raises:
        UserError: the two models have different shapes.
    """

    def __init__(
        self,
        base: PreTrainedModel | PeftModel,
        tuned: PreTrainedModel | None = None,
        changes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._base, self._tuned = base.eval(), base if tuned is None else tuned.eval()
        self._changes = changes or {}
        self.layers = list(attention_layers(base))
        self.heads = backbone(base).config.num_attention_heads
        if tuned is not None:
            check_same_shapes(base, tuned)

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """Yield the base; an adapter is off for the block."""
        if isinstance(self._base, PeftModel):
            with self._base.disable_adapter():
                yield self._base
        else:
            yield self._base

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """Yield the tuned model."""
        with moved(self._tuned, self._changes):
            yield self._tuned

    def keep_label_rows(self, label_ids: Sequence[int]) -> None:
        """Free the other rows of the LM head."""
        for model in {id(m): m for m in (self._base, self._tuned)}.values():
            keep_label_rows(model, label_ids)


def check_same_shapes(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    """Refuse two models whose weights differ in names or shapes.

    Raises:
        UserError: they do.
    """
    shapes = [
        {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        for model in (base, tuned)  # a head may be tied in one of them only
    ]
    if shapes[0] != shapes[1]:
        names = {n for n, s in shapes[0].items() if shapes[1].get(n) != s}
        raise UserError(
            "the tuned model and its base have different shapes: "
            f"{min(names or shapes[1].keys() - shapes[0].keys())} differs"
        )


@contextmanager
def moved(model: PreTrainedModel, change: Mapping[str, Tensor]) -> Iterator[None]:
    """Add changes to the model's weights for the block; the old weights come back to their bits."""
    before = {name: model.get_parameter(name).data for name in change}
    try:
        for name, delta in change.items():
            model.get_parameter(name).data = before[name] + delta.to(before[name])
        torch.clear_autocast_cache()  # it knows a weight by its parameter, not by its numbers
        yield
    finally:
        for name, weight in before.items():
            model.get_parameter(name).data = weight
        torch.clear_autocast_cache()
