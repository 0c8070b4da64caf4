"""Set which weights of a decoder are trained: W_Q and W_K, or, for some methods, all of them."""

from __future__ import annotations

from pathlib import Path

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from abft_fast.core.backbone import (
    Projection,
    attention_layers,
    decoder_layers,
    prepare,
    query_key_projections,
)
from abft_fast.errors import UserError
from abft_fast.models.files import check_adapter


def set_trained(model: PreTrainedModel, trainable: str, rank: int) -> PreTrainedModel | PeftModel:
    """Train LoRA on W_Q and W_K (`lora`), W_Q and W_K (`full`), or every weight (`model`).

    Args:
        model: a decoder of transformers.
        trainable: `lora`, `full` or `model`.
        rank: of LoRA.

    Raises:
        UserError: the model does not allow it.
    """
    match trainable:
        case "lora":
            return train_lora(model, rank)
        case "full":
            return train_weights(model)
        case "model":
            return train_model(model)
    raise ValueError(f"trainable must be lora, full or model, not {trainable!r}")


def train_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Add LoRA to W_Q and W_K of every layer, in float32; of a fused projection to Q and K only.

    Raises:
        UserError: PEFT would touch other modules than W_Q and W_K.
    """
    projections = query_key_projections(model)
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
        line = " ".join(str(error).split())[:200]
        kind = type(projections[0].module).__name__
        raise UserError(
            f"{model.config.model_type}: PEFT cannot add LoRA to its {kind} layers ({line}); "
            "use an unquantized checkpoint"
        ) from error
    adapted = [m for m in peft_model.modules() if hasattr(m, "lora_B")]
    if len(adapted) != len(projections):
        raise UserError(
            f"{model.config.model_type}: modules named {', '.join(sorted(names))} are not all "
            "query and key projections; this family is not supported by --trainable lora"
        )
    for projection in query_key_projections(peft_model):
        _train_rows(projection, projection.module.get_parameter("lora_B.default.weight"), dim=0)
    return peft_model


def train_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Train W_Q and W_K themselves, as float32; of a fused projection Q's and K's rows only.

    Raises:
        UserError: the weights are quantized.
    """
    projections = query_key_projections(model)
    _refuse_quantized(model, "full")
    model.requires_grad_(False)
    for projection in projections:
        # bfloat16 would round updates of 2e-5 to no change.
        weight = nn.Parameter(projection.module.get_parameter("weight").data.float())
        projection.module.weight = weight
        _train_rows(projection, weight, dim=1 if _is_transposed(projection.module) else 0)
    return model


def train_model(model: PreTrainedModel) -> PreTrainedModel:
    """Train every weight, as float32.

    Raises:
        UserError: the weights are quantized.
    """
    _refuse_quantized(model, "model")
    return model.float().requires_grad_(True)


def trained_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def enable_checkpointing(model: PreTrainedModel) -> None:
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
    last: GradientCheckpointingLayer = decoder_layers(inner)[max(attention_layers(inner))]
    last.gradient_checkpointing = False
    model.train()


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write LoRA, or W_Q and W_K themselves, as an adapter that plain PEFT loads.

    W_Q and W_K are PEFT's `modules_to_save`: copies of modules that take the base's place. The
    adapter has no LoRA at all, which PEFT spells by a target of its own.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    projections = query_key_projections(model)
    config = LoraConfig(
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=sorted({p.name.rsplit(".", 1)[-1] for p in projections}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    names = {id(module): name for name, module in model.named_modules()}
    tensors = {
        f"base_model.model.{names[id(p.module)]}.{key}": tensor.contiguous()
        for p in projections
        for key, tensor in p.module.state_dict().items()
    }
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a trained adapter on its model.

    Raises:
        UserError: the folder holds no adapter, or an adapter of another model.
    """
    check_adapter(folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        saved = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines()
        line = next((each.strip() for each in lines if "size mismatch" in each), lines[0])
        raise UserError(f"adapter {folder} does not fit the model: {line}") from error
    # PEFT only warns of layers that one of the two lacks.
    if set(saved) != set(get_peft_model_state_dict(adapted)):
        raise UserError(
            f"adapter {folder} does not fit the model: the adapter changes other layers"
        )
    return adapted


def _refuse_quantized(model: PreTrainedModel, trainable: str) -> None:
    # FP8 and torchao weights call themselves floating point.
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"{model.config.model_type}'s weights are quantized: --trainable {trainable} needs "
            "float weights, use --trainable lora"
        )


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
