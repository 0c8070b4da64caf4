"""A decoder of transformers: its layers, its Q and K projections, and how it is prepared."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from abft_fast.core import attention
from abft_fast.core.blocks import BlockBoundary
from abft_fast.errors import UnsupportedModel

logger = logging.getLogger(__name__)

# Attention modules by the names of their projections; every fused one also holds V.
_SEPARATE = ("q_proj", "k_proj")
_FUSED = ("c_attn", "qkv_proj", "query_key_value")
_OUTPUT = ("o_proj", "c_proj", "dense")


@dataclass(frozen=True)
class Projection:
    """A linear map that yields Q, K, or a fused one that yields V too.

    Attributes:
        name: the module's full name inside the model.
        module: an nn.Linear, a GPT-2 Conv1D, or a quantized or LoRA layer in its place.
        layer: index of its decoder layer.
        rows: (out_features,) bool, which outputs are Q or K; None where all are.
    """

    name: str
    module: nn.Module
    layer: int
    rows: Tensor | None


def without_peft(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside PEFT's wrapper, adapters in place, or any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder without its LM head, out of a bare, headed or PEFT-wrapped model.

    Raises:
        UnsupportedModel: the model is none of transformers.
    """
    model = without_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"model must be a transformers model, not {type(model).__name__}")
    return model.base_model


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return attention modules by layer index; layers without Q and K projections are left out.

    Raises:
        UnsupportedModel: the model is no plain decoder.
    """
    modules: dict[Any, nn.Module] = {}
    for layer in decoder_layers(backbone(model)):
        # This runs every forward, so the search ends where attention is found, early in the layer.
        found = next(filter(_is_attention, layer.modules()), None)
        if found is not None:
            modules[found.layer_idx] = found
    return {index: modules[index] for index in sorted(modules)}


def _is_attention(module: nn.Module) -> bool:
    if getattr(module, "layer_idx", None) is None:
        return False
    separate = all(hasattr(module, name) for name in _SEPARATE)
    return separate or any(hasattr(module, name) for name in _FUSED)


def query_key_projections(model: PreTrainedModel) -> list[Projection]:
    """Return the Q and K projections of every attention layer, in order.

    Raises:
        UnsupportedModel: the family keeps them under unknown names, or fused in an unknown way.
    """
    names = {module: name for name, module in model.named_modules()}
    projections = []
    for layer, module in attention_layers(model).items():
        if all(hasattr(module, name) for name in _SEPARATE):
            children, rows = list(_SEPARATE), None
        else:
            children = [name for name in _FUSED if hasattr(module, name)]
            rows = _query_key_rows(backbone(model).config)
        for child in children:
            projection = getattr(module, child)
            projections.append(Projection(names[projection], projection, layer, rows))
    if not projections:
        raise UnsupportedModel(
            f"{backbone(model).config.model_type}: no query and key projections found "
            f"(looked for {'+'.join(_SEPARATE)}, {', '.join(_FUSED)})"
        )
    return projections


def output_projections(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the projection of each layer whose input is the outputs of its heads, side by side.

    Raises:
        UnsupportedModel: the family keeps it under an unknown name.
    """
    found = {}
    for layer, module in attention_layers(model).items():
        name = next((name for name in _OUTPUT if hasattr(module, name)), None)
        if name is None:
            raise UnsupportedModel(
                f"{backbone(model).config.model_type}: no output projection of attention found "
                f"(looked for {', '.join(_OUTPUT)})"
            )
        found[layer] = getattr(module, name)
    return found


def _query_key_rows(config: PreTrainedConfig) -> Tensor:
    """Return which outputs of a family's fused projection are Q or K.

    Raises:
        UnsupportedModel: the layout of this family's projection is not known.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    match config.model_type:
        case "gpt2":  # all Q, all K, all V
            return torch.arange(3 * heads * head_dim) < 2 * heads * head_dim
        case "phi3":  # the same with fewer K and V heads
            kv_heads = config.num_key_value_heads
            return torch.arange((heads + 2 * kv_heads) * head_dim) < (heads + kv_heads) * head_dim
        case "gpt_neox":  # Q, K, V of head 0, then of head 1, ...
            return torch.arange(heads * 3 * head_dim) % (3 * head_dim) < 2 * head_dim
    raise UnsupportedModel(
        f"{config.model_type}: this library does not know where Q and K are in the fused "
        "projection, so it cannot train the model"
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Route the model's attention through this library, once, and return its backbone.

    The model still works as before: without packed prompts its attention is an ordinary one.

    Raises:
        UnsupportedModel: the family does not call attention through transformers'
            AttentionInterface, or has no attention at all.
    """
    inner = backbone(model)
    layers = decoder_layers(inner)
    prepared = any(isinstance(h, BlockBoundary) for h in layers[0]._forward_pre_hooks.values())
    if prepared and inner.config._attn_implementation == attention.NAME:
        return inner
    family = inner.config.model_type
    with_attention = attention_layers(model)
    if not with_attention:
        raise UnsupportedModel(
            f"{family}: no layer has Q and K projections; this family is not supported"
        )
    if not inner._can_set_attn_implementation():
        raise UnsupportedModel(
            f"{family}: attention does not go through transformers' AttentionInterface, "
            "so the loss cannot see it; this family is not supported"
        )
    inner.set_attn_implementation(attention.NAME)
    _keep_gradients_through_nf4(inner)
    if not prepared:
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(BlockBoundary(index), with_kwargs=True)
            if index not in with_attention:
                logger.warning("%s: layer %d has no attention, so no loss", family, index)
    return inner


def _keep_gradients_through_nf4(inner: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking NF4 weights on a CPU, as forwards without gradients do.

    Products with repacked weights silently have no gradient, in later forwards too.
    """
    for module in inner.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if weight.is_meta:  # it is quantized when it comes
            continue
        if getattr(weight, "quant_state", None) is None:
            raise UnsupportedModel(
                "config.json says 4 bits, but the files hold no quantization state"
            )
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                weight.data, weight.quant_state
            )


def must_run_alone(inner: PreTrainedModel, longest: int) -> bool:
    """Return whether prompts of up to `longest` tokens would leak into each other when packed.

    Layers without attention carry state along the whole batch, and RoPE that depends on length
    (longrope, dynamic NTK) takes the batch's longest prompt for every prompt's.
    """
    config = inner.config
    if len(attention_layers(inner)) < config.num_hidden_layers:
        return True
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)]
    limits = [
        part.get("original_max_position_embeddings", config.max_position_embeddings)
        for part in by_layer_type or [rope]
        if part.get("rope_type") in ("longrope", "dynamic")
    ]
    return bool(limits) and longest > min(limits)


def decoder_layers(inner: PreTrainedModel) -> nn.ModuleList:
    """Return the list of decoder layers of a backbone.

    Raises:
        UnsupportedModel: the model is no plain decoder.
    """
    count = getattr(inner.config, "num_hidden_layers", None)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedModel(
        f"{inner.config.model_type}: the model is not a text decoder with a list of layers"
    )
