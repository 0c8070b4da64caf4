"""Models made from a config alone: without memory, for a plan, or with random weights."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes' config: NF4, double quantization, arithmetic in `dtype`; or 8 bits."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, bits: int | None) -> PreTrainedModel:
    """Return the model on the meta device, with the layers that loading with `bits` would make."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits is not None:
        quantizer = AutoHfQuantizer.from_config(quantization(bits, dtype))
        quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=dtype)
    for module in model.modules():
        if is_quantized(module) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)  # as loading does
    return model.eval().requires_grad_(False)


def is_quantized(module: nn.Module) -> bool:
    """Return whether bitsandbytes quantizes a layer's weight."""
    bnb = sys.modules.get("bitsandbytes")  # optional; whoever made such a layer has imported it
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, bits: int | None
) -> PreTrainedModel:
    """Return a model with its family's random initial weights, each quantized as it is made.

    Beside the result it needs the memory of one float weight; on a CPU bitsandbytes takes 3.5
    float32 copies of a weight to quantize it.
    """
    model = skeleton(config, dtype, bits)
    tied = {model.get_submodule(name.rpartition(".")[0]) for name in model.all_tied_weights_keys}
    for module in model.modules():
        if module in tied:
            continue
        quantized = module.weight if is_quantized(module) else None
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            kept = dtype if tensor is quantized else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kept, device=device)
            is_buffer = name in module._buffers
            setattr(module, name, empty if is_buffer else nn.Parameter(empty, requires_grad=False))
        if own:
            model._init_weights(module)
        if quantized is not None:
            import bitsandbytes as bnb

            weight = module.weight.data
            if isinstance(module, bnb.nn.Linear8bitLt):
                weight = weight.cpu()  # it quantizes on the way from there
            options = quantized.__dict__
            module.weight = type(quantized)(weight, requires_grad=False, **options).to(device)
    model.tie_weights()
    return model
