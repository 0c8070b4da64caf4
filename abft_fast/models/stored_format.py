"""Decide whether a checkpoint that is stored quantized can be read and trained through.

transformers, and the packages it asks for, know the formats; there is no list of them here.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from abft_fast.errors import UserError

logger = logging.getLogger(__name__)


def stored_format(config: PreTrainedConfig) -> str | None:
    """Return how a checkpoint is quantized, in transformers' words; None if it is not."""
    stored = _stored(config)
    return None if stored is None else str(stored.get("quant_method", "bitsandbytes"))


def prepare_format(config: PreTrainedConfig, name: str, device: torch.device) -> None:
    """Refuse a format that cannot be read or trained through, before any weight is read.

    A format that has no gradient is dequantized as it is read, where transformers can do that: the
    config is told so, and a warning says it.

    Raises:
        UserError: the format is unknown, lacks a package or a device, or passes no gradient.
    """
    stored = _stored(config)
    if stored is None:
        return
    problem = f"model {name} is quantized by {stored_format(config)}"
    fix = "use the unquantized checkpoint with --quantized"
    try:
        known = AutoHfQuantizer.supports_quant_method(stored)
        if known:
            quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
            quantizer.validate_environment(device_map={"": device}, weights_only=True)
            trainable = quantizer.is_trainable
            dequantized = getattr(quantizer.quantization_config, "dequantize", None)
    except Exception as error:  # of whatever package the format is from
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise UserError(f"{problem}, which cannot be read here: {reason}; or {fix}") from error
    if not known:
        raise UserError(f"{problem}, a format transformers does not know: {fix}")
    if not trainable and dequantized is None:
        raise UserError(f"{problem}, through which no gradient passes: {fix}")
    if not trainable or dequantized:
        stored["dequantize"] = True
        logger.warning("%s: dequantized as it is read, to be trained here", problem)


def _stored(config: PreTrainedConfig) -> dict | None:
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            return part.quantization_config
    return None
