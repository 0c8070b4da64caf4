"""Set which weights of a decoder are trained: W_Q and W_K, or, for some methods, all of them."""

from __future__ import annotations

import copy
import json
import logging
import textwrap
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from abft_fast.core.backbone import (
    Projection,
    attention_layers,
    decoder_layers,
    prepare,
    query_key_projections,
    without_peft,
)
from abft_fast.errors import UserError
from abft_fast.models.base_identity import BASE
from abft_fast.models.files import ADAPTER_WEIGHTS, check_adapter
from abft_fast.runtime.tensor_file import write_tensors

logger = logging.getLogger(__name__)


def set_trained(
    model: PreTrainedModel,
    trainable: str,
    rank: int,
    head: bool = False,
    layers: Collection[int] | None = None,
) -> PreTrainedModel | PeftModel:
    """Train LoRA on W_Q and W_K (`lora`), W_Q and W_K (`full`), or every weight (`model`).

    Args:
        model: a decoder of transformers.
        trainable: `lora`, `full` or `model`.
        rank: of LoRA.
        head: train the LM head too; with `model` it is trained anyway.
        layers: layers whose W_Q and W_K are trained, of `lora` and `full`. Unset: all.

    Raises:
        UserError: the model does not allow it, or does not have such layers.
    """
    match trainable:
        case "lora":
            trained = add_lora(model, rank, layers)
        case "full":
            trained = unfreeze_query_key(model, layers)
        case "model":
            return unfreeze_all(model)
        case _:
            raise ValueError(f"trainable must be lora, full or model, not {trainable!r}")
    if head:
        train_head(model)
    return trained


def add_lora(model: PreTrainedModel, rank: int, layers: Collection[int] | None = None) -> PeftModel:
    """Add LoRA to W_Q and W_K of layers, in float32; of a fused projection to Q and K only.

    Raises:
        UserError: PEFT would touch other modules than W_Q and W_K.
    """
    projections = _of_layers(query_key_projections(model), layers)
    names = {p.name.rsplit(".", 1)[-1] for p in projections}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(names),
        layers_to_transform=None if layers is None else sorted(layers),
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
    for projection in _of_layers(query_key_projections(peft_model), layers):
        _mask_gradient(projection, projection.module.get_parameter("lora_B.default.weight"), dim=0)
    return peft_model


def unfreeze_query_key(
    model: PreTrainedModel, layers: Collection[int] | None = None
) -> PreTrainedModel:
    """Train W_Q and W_K of layers, as float32; of a fused projection Q's and K's rows only.

    Raises:
        UserError: the weights are quantized.
    """
    projections = _of_layers(query_key_projections(model), layers)
    _refuse_quantized(model, "full")
    model.requires_grad_(False)
    for projection in projections:
        unfreeze_projection(projection)
    return model


def unfreeze_projection(projection: Projection) -> None:
    """Train a projection's own weight, as float32; of a fused one Q's and K's rows only."""
    # bfloat16 would round updates of 2e-5 to no change.
    weight = nn.Parameter(projection.module.get_parameter("weight").data.float())
    projection.module.weight = weight
    _mask_gradient(projection, weight, dim=1 if _is_transposed(projection.module) else 0)


def train_head(model: PreTrainedModel) -> None:
    """Train the LM head, as float32, by a weight of its own where it shared the embedding's.

    Raises:
        UserError: the head is quantized.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(
            f"{model.config.model_type}'s LM head is of type {type(head).__name__}: --train-head "
            "needs a float one"
        )
    head.weight = nn.Parameter(head.weight.detach().to(torch.float32, copy=True))
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach().to(torch.float32, copy=True))


def unfreeze_all(model: PreTrainedModel) -> PreTrainedModel:
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
    # The forward may end inside the last attention, so its layer cannot be computed again.
    inner = prepare(model)
    last: GradientCheckpointingLayer = decoder_layers(inner)[max(attention_layers(inner))]
    last.gradient_checkpointing = False
    model.train()


def save_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, base: Mapping[str, Any] | None = None
) -> None:
    """Write LoRA, or W_Q and W_K themselves, as an adapter that plain PEFT loads.

    Trained weights, of the LM head too, are PEFT's `modules_to_save`: copies of modules that take
    the base's place. An adapter without LoRA is one with a target that PEFT has for that.

    Args:
        model: the trained model.
        folder: where to write.
        base: what it was trained on, by `base_identity.describe_base`.
    """
    plain = without_peft(model)
    names = {id(module): name for name, module in plain.named_modules()}
    modules = []
    if plain.get_output_embeddings().weight.requires_grad:
        modules.append(plain.get_output_embeddings())
    if isinstance(model, PeftModel):
        config = copy.copy(model.peft_config["default"])
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        modules += [p.module for p in query_key_projections(model)]
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type="CAUSAL_LM")
        config.base_model_name_or_path = model.name_or_path
        tensors = {}
    config.inference_mode = True
    if modules:
        config.modules_to_save = sorted({names[id(m)].rsplit(".", 1)[-1] for m in modules})
    for name, value in list(vars(config).items()):
        if isinstance(value, set):  # a set of strings has another order in each process
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))
    for module in modules:
        for key, tensor in module.state_dict().items():
            tensors[f"base_model.model.{names[id(module)]}.{key}"] = tensor
    write_tensors(tensors, folder / ADAPTER_WEIGHTS)
    if base is not None:
        (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    say: Callable[[str], object] = logger.warning,
    *,
    weights_are_away: bool = False,
) -> PeftModel:
    """Put a trained adapter on its model.

    Args:
        model: the base.
        folder: of the adapter.
        say: gets a line for each thing that PEFT warns of.
        weights_are_away: whether the base's weights are read later, so that no adapter's tensor
            may take their place in memory.

    Raises:
        UserError: the folder holds no adapter that changes weights, or it does not fit the model.
    """
    check_adapter(folder)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            config = PeftConfig.from_pretrained(str(folder))
            adapted = PeftModel.from_pretrained(
                model, str(folder), config=config, low_cpu_mem_usage=weights_are_away
            )
            saved = load_peft_weights(str(folder), device="cpu")
            held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        version = Version(str(config.peft_version).partition("@")[0])  # a commit may follow
    except Exception as error:  # of whatever kind the adapter is
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = next((each.strip() for each in lines if "size mismatch" in each), lines[0])
        raise UserError(f"adapter {folder} does not fit the model: {line}") from error
    # PEFT only warns of weights that one of the two lacks. Some are the base's own.
    lacking = held.keys() - saved.keys()
    without_place = saved.keys() - held.keys() - adapted.state_dict().keys()
    if lacking or without_place:
        name = min(lacking or without_place).removeprefix("base_model.model.")
        raise UserError(
            f"adapter {folder} does not fit the model: the adapter changes other layers: it "
            f"{'lacks' if lacking else 'has'} {name}"
        )
    broken = [name for name, tensor in saved.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"adapter {folder}: {broken[0]} is not finite: train or copy it again")
    if version > Version(peft.__version__):
        say(f"adapter {folder} is from PEFT {version}, and this is PEFT {peft.__version__}")
    texts = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    for text in dict.fromkeys(texts):
        say(f"adapter {folder}: PEFT says: {textwrap.shorten(text, 250)}")
    copies = [m.modules_to_save for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)]
    if copies:  # PEFT has rounded them to the base's dtype
        for each in copies:
            each.float()
        set_peft_model_state_dict(adapted, saved)
    return adapted


def _of_layers(projections: list[Projection], layers: Collection[int] | None) -> list[Projection]:
    """Return the projections of some layers; refuse a layer that has none."""
    if layers is None:
        return projections
    known = sorted({projection.layer for projection in projections})
    if unknown := set(layers) - set(known):
        raise UserError(
            f"--layers: the model has no attention layer {min(unknown)}: its layers are "
            f"{known[0]} to {known[-1]}"
        )
    return [projection for projection in projections if projection.layer in layers]


def _refuse_quantized(model: PreTrainedModel, trainable: str) -> None:
    # FP8 and torchao weights call themselves floating point.
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"{model.config.model_type}'s weights are quantized: --trainable {trainable} needs "
            "float weights, use --trainable lora"
        )


def _mask_gradient(projection: Projection, weight: nn.Parameter, dim: int) -> None:
    """Zero the gradient of V's part of a fused projection, so that Adam never moves it."""
    if projection.rows is None:
        return
    shape = [1, 1]
    shape[dim] = -1
    mask = projection.rows.to(weight.device, weight.dtype).view(shape)

    def keep_rows(gradient: Tensor) -> Tensor:
        nonlocal mask
        mask = mask.to(gradient.device)  # a streamed weight moves there later
        return gradient * mask

    weight.register_hook(keep_rows)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
