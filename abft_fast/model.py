"""Loading a decoder and choosing what of it is trained: W_Q and W_K, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from abft_fast.backbone import (
    Projection,
    attention_layers,
    decoder_layers,
    prepare,
    query_key_projections,
)
from abft_fast.builtin import builtin_model_path
from abft_fast.device_map import does_not_fit
from abft_fast.errors import UserError


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None = None,
    placement: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: `builtin`, a local folder or a hub id.
        device: where its weights go; quantized ones are quantized there as they arrive.
        dtype: of its weights, and of the arithmetic with quantized ones.
        bits: quantize with bitsandbytes to 4 (NF4, double quantization) or 8; None as it is stored.
        placement: what else `from_pretrained` is told of devices; None puts all on `device`.

    Raises:
        UserError: there is no such model, it is not on this machine and the hub is out of reach,
            it cannot be quantized, or its attention is out of this library's reach.
    """
    path = str(builtin_model_path()) if name == "builtin" else name
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"model folder {path} holds no config.json")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise UserError(f"model folder {path} does not exist")
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        quantization = _quantization(AutoConfig.from_pretrained(path), name, dtype, bits)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, **(placement or {"device_map": {"": device}}), **quantization
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(_why_not_loaded(name, error)) from error
    try:
        prepare(model)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    return model, tokenizer


def _quantization(
    config: PreTrainedConfig, name: str, dtype: torch.dtype, bits: int | None
) -> dict[str, BitsAndBytesConfig]:
    """What `from_pretrained` is told of it; nothing where the checkpoint is quantized itself."""
    if bits is None:
        return {}
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored
        raise UserError(f"model {name} is quantized already ({method}): leave out --quantized")
    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def context_length(model: nn.Module) -> int | None:
    """Tokens a prompt may have at most; None where the config does not say."""
    return getattr(prepare(model).config, "max_position_embeddings", None)


def train_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Add LoRA to W_Q and W_K of every layer, in float32; of a fused projection to Q and K only.

    Raises:
        UserError: PEFT would touch other modules than W_Q and W_K.
    """
    projections = _projections(model)
    names = {p.name.rsplit(".", 1)[-1] for p in projections}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(names),
        fan_in_fan_out=_is_transposed(projections[0].module),
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, config)
    except (ImportError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"LoRA cannot be added to {model.config.model_type}: {line}") from error
    adapted = [m for m in peft_model.modules() if hasattr(m, "lora_B")]
    if len(adapted) != len(projections):
        raise UserError(
            f"{model.config.model_type}: modules named {', '.join(sorted(names))} are not all "
            "query and key projections; this family is not supported by --trainable lora"
        )
    for projection in query_key_projections(peft_model):
        _train_rows(projection, projection.module.lora_B["default"].weight, dim=0)
    return peft_model


def train_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Train W_Q and W_K themselves, as float32; of a fused projection Q's and K's rows only.

    Raises:
        UserError: the weights are quantized.
    """
    model.requires_grad_(False)
    for projection in _projections(model):
        weight = projection.module.weight
        if not weight.is_floating_point():
            raise UserError(
                f"{projection.name} is quantized: --trainable full needs float weights, "
                "use --trainable lora"
            )
        # bfloat16 would round updates of 2e-5 to no change.
        projection.module.weight = nn.Parameter(weight.data.float())
        _train_rows(
            projection, projection.module.weight, dim=1 if _is_transposed(projection.module) else 0
        )
    return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute each decoder layer in the backward, with dropout off.

    transformers checkpoints in training mode only, so every rate of dropout is set to 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # The loss leaves the forward in the last attention, which a checkpoint could not replay.
    inner = prepare(model)
    decoder_layers(inner)[max(attention_layers(inner))].gradient_checkpointing = False
    model.train()


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a trained adapter on its model.

    Raises:
        UserError: the folder holds no adapter, or one of another model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"adapter {folder} holds no adapter_config.json")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        saved = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"adapter {folder} does not fit the model: {line}") from error
    # PEFT only warns of layers that one of the two lacks.
    if set(saved) != set(get_peft_model_state_dict(adapted)):
        raise UserError(f"adapter {folder} does not fit the model: it adapts other layers")
    return adapted


def _projections(model: PreTrainedModel) -> list[Projection]:
    try:
        return query_key_projections(model)
    except ValueError as error:
        raise UserError(str(error)) from error


def _train_rows(projection: Projection, weight: nn.Parameter, dim: int) -> None:
    """Zero the gradient of V's part of a fused projection, so that Adam never moves it."""
    if projection.rows is None:
        return
    shape = [1, 1]
    shape[dim] = -1
    mask = projection.rows.to(weight.device, weight.dtype).view(shape)
    weight.register_hook(lambda gradient: gradient * mask)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)


def _why_not_loaded(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "dispatched on the cpu or the disk" in lowered:  # a quantized one
        return does_not_fit(name)
    if Path(name).is_dir() or name == "builtin":
        return f"model {name} cannot be loaded: {text[:300]}"
    unreachable = any(word in lowered for word in ("offline", "connect", "network"))
    if isinstance(error, OSError) and (HF_HUB_OFFLINE or unreachable):
        return (
            f"offline: {name} is not in the local cache; download it where there is a network, "
            "or pass a local folder"
        )
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return f"model {name}: the hub wants a token with access to it (`hf auth login`)"
    if "not a valid model identifier" in lowered or "not a local folder" in lowered:
        return f"model {name} is neither a local folder nor a model on the hub"
    return f"model {name} cannot be loaded: {text[:300]}"
