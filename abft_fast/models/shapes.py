"""Shapes of models that are not on this machine: enough for a plan, or for random weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

SYNTHETIC = "synthetic:"


def known_shape(name: str) -> PreTrainedConfig | None:
    """Return a model's config by its short name or hub id, such as `llama3-70b`; None if unknown.

    `llama3-70b:4` is a model of its first four layers.

    The shape of `llama3-56b` is inferred from the paper's Table 2, not read from the model: the 33M
    parameters of LoRA at r = 16 are those of all 80 layers of Llama 3 70B, 409,600 a layer; an MLP
    of width 21,056 then makes the 55.6B parameters. The layers, widths and heads of `llama3.1-405b`
    are those of the Llama 3 paper (arXiv 2407.21783, Table 3).
    """
    name, colon, layers = name.lower().partition(":")
    for short, options in _shapes().items():
        hub = options.pop("hub")
        if name not in (short, hub.lower()):
            continue
        shape = AutoConfig.for_model(**options)
        if not colon:
            return shape
        possible = map(str, range(1, shape.num_hidden_layers + 1))
        return with_layers(shape, int(layers)) if layers in possible else None
    return None


def known_names() -> list[str]:
    """Return the short names."""
    return list(_shapes())


def with_layers(shape: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the same config with its first layers only."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:layers]
    return shape


def _shapes() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
