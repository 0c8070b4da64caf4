"""Run a model of transformers on packed prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from abft_fast.core.backbone import attention_layers, must_run_alone, prepare, without_peft
from abft_fast.core.packed_forward import LossComplete, PackedForward
from abft_fast.errors import UnsupportedModel


def run_packed(model: PreTrainedModel, forward: PackedForward, **kwargs: Any) -> ModelOutput:
    """Run a backbone, or a model with its LM head, on packed prompts.

    Args:
        model: a transformers decoder, wrapped by PEFT or not.
        forward: the batch and what is asked of it; it receives each layer's results.
        **kwargs: further arguments of the model's forward, such as `logits_to_keep`.

    Returns:
        transformers' own output; an empty one where `forward.stop_after` ended it.

    Raises:
        ValueError: a token id is outside the vocabulary (checked on a CPU only), or the model
            cannot keep these prompts apart.
        UnsupportedModel: a layer's attention did not reach this library, or weights are offloaded.
    """
    inner = prepare(model)
    alone = len(forward.packed) == 1 and forward.prefix is None
    if not alone and must_run_alone(inner, forward.context):
        raise ValueError(f"{inner.config.model_type}: prompts must be run one at a time")
    embedding = inner.get_input_embeddings().weight
    if embedding.is_meta and forward.entering is None:
        raise UnsupportedModel(
            f"{inner.config.model_type}: weights are offloaded, and packed prompts need them on a "
            "device: load the model without offloading"
        )
    packed = forward.on(embedding.device if forward.entering is None else forward.entering.device)
    inputs = {"input_ids": packed.input_ids[None]}
    if forward.entering is not None:  # the embedding may be away, too
        inputs = {"inputs_embeds": forward.entering}
    elif embedding.device.type == "cpu":
        outside = (packed.input_ids < 0) | (packed.input_ids >= len(embedding))
        if outside.any():
            raise ValueError(
                f"input_ids holds {int(packed.input_ids[outside][0])}, "
                f"the model's vocabulary is 0 to {len(embedding) - 1}"
            )
    output = ModelOutput()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # blocks switch it off and on
            output = without_peft(model)(
                **inputs,
                position_ids=packed.position_ids[None],
                # transformers passes this mask through and builds none; `abft` keeps prompts apart.
                attention_mask=packed.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
                use_cache=False,
                abft=forward,
                **kwargs,
            )
    except LossComplete:
        pass
    except BaseException:
        forward.results.clear()
        raise
    expected = attention_layers(inner)
    if forward.layers_to_run is not None:
        expected = {index: expected[index] for index in forward.layers_to_run if index in expected}
    missing = forward.results.missing(expected)
    if missing:
        raise UnsupportedModel(
            f"{inner.config.model_type}: attention of layers {missing} does not reach "
            "the loss (no keyword arrives through AttentionInterface); this family is not supported"
        )
    return output
