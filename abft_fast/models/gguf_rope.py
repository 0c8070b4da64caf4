"""Find a GGUF's RoPE scaling, which transformers reads for gpt-oss alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from gguf import GGUFReader

FACTORS = "rope_freqs.weight"
"""llama.cpp's tensor of what each frequency of Llama 3 is divided by, (head_dim / 2,)."""

_OF_LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_TOLERANCE = 1e-4  # relative; llama.cpp computes the factors in float32


def rope_parameters(
    reader: GGUFReader, architecture: str, config: PreTrainedConfig
) -> dict[str, Any] | None:
    """Return a model's `rope_parameters` with the scaling of its file; None where it has none.

    Linear scaling (Gemma 3) and Llama 3's are read. llama.cpp keeps Llama 3's only as factors of
    frequencies, so the numbers of its releases are taken if they give these factors.

    Args:
        reader: the file.
        architecture: llama.cpp's name of the model's.
        config: as transformers reads it from the file.

    Raises:
        ValueError: the file scales in another way.
    """
    known = getattr(config, "rope_parameters", None)
    if known is None or any(
        each.get("rope_type", "default") != "default" for each in _by_layer_type(known)
    ):
        return None  # no RoPE, or a scaling that transformers has read or that its class has
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    kind = _field(reader, f"{architecture}.rope.scaling.type", "none")
    factor = _field(reader, f"{architecture}.rope.scaling.factor")
    of_old_files = _field(reader, f"{architecture}.rope.scale_linear", 1.0)
    if kind == "none" and of_old_files != 1:
        kind, factor = "linear", of_old_files
    scaled = copy.deepcopy(known)
    # Gemma 3 scales its layers of global attention only.
    own = scaled.get("full_attention", scaled)
    if factors:
        if [tensor.name for tensor in factors] != [FACTORS] or own is not scaled:
            raise ValueError(f"RoPE is scaled by the tensor {factors[0].name}")
        expected = torch.from_numpy(factors[0].data.copy()).float().flatten()
        own.update(rope_type="llama3", factor=expected.max().item(), **_OF_LLAMA_3)
        if not _gives(config, scaled, expected):
            raise ValueError(f"the factors of RoPE in {FACTORS} are none of Llama 3's")
    elif kind == "linear" and factor:
        own.update(rope_type="linear", factor=float(factor))
    elif kind != "none":
        raise ValueError(f"RoPE is scaled by {kind}")
    else:
        return None
    return scaled


def _by_layer_type(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return RoPE's parameters of each kind of layer; most models have one kind."""
    return [parameters] if "rope_theta" in parameters else list(parameters.values())


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()


def _gives(config: PreTrainedConfig, scaled: dict[str, Any], factors: torch.Tensor) -> bool:
    """Return whether scaled frequencies are the unscaled ones over these factors."""
    config = copy.deepcopy(config)
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(frequencies)
    unscaled = scaled["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    return len(frequencies) == len(factors) and torch.allclose(
        unscaled / frequencies, factors, rtol=_TOLERANCE, atol=0
    )
