"""Measure the memory of weights and of a step on tensors without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from abft_fast.core.label_logits import label_logits, set_label_rows
from abft_fast.core.packing import pack
from abft_fast.memory.simulation import (
    CannotCount,
    bytes_of,
    float32_as_on_a_gpu,
    peak_memory,
    without_memory,
)
from abft_fast.memory.types import EVALUATION, Arithmetic, Flow, Line, StaticMemory, StepMemory
from abft_fast.models import trainable
from abft_fast.models.shapes import with_layers
from abft_fast.models.stored_format import stored_format
from abft_fast.models.synthetic import skeleton
from abft_fast.options import TrainConfig
from abft_fast.training.methods import example_prompt, method_loss

ADAM_STATES = 2
_FEWEST_LAYERS = 4
_FEWEST_TOKENS = 2048  # below this, memory that does not grow with tokens sets the peak
_LABEL_IDS = [0, 1]


def static_memory(
    shape: PreTrainedConfig, config: TrainConfig, arithmetic: Arithmetic
) -> StaticMemory:
    """Count the memory of weights and optimizer.

    Raises:
        UserError: the model cannot be trained this way.
        CannotCount: its weights are stored in a format that is not counted.
    """
    model = trainable_without_memory(shape, config, arithmetic, Flow("local"))
    trained = [p for p in model.parameters() if p.requires_grad]
    freed = set()
    if config.needs_label_rows_only and not _is_tied(model):
        freed = set(model.get_output_embeddings().parameters())
    frozen = [p for p in model.parameters() if not p.requires_grad and p not in freed]
    quantized = [p for p in frozen if not p.is_floating_point()]
    others = [p for p in frozen if p.is_floating_point()]
    size = bytes_of(trained)
    return StaticMemory(
        quantized=bytes_of(quantized),
        frozen=bytes_of([*others, *model.buffers()]),
        trained=size,
        gradients=size,
        optimizer=ADAM_STATES * size,
        parameters=sum(p.numel() for p in trained),
    )


def step_memory(
    shape: PreTrainedConfig,
    config: TrainConfig,
    arithmetic: Arithmetic,
    flow: Flow,
    length: int,
) -> StepMemory:
    """Measure two shallow models on fake tensors and extrapolate linearly to the model's depth.

    Args:
        shape: the model's config.
        config: the run's options.
        arithmetic: how numbers are kept.
        flow: how far gradients flow.
        length: tokens of each prompt.

    Returns:
        The memory of one forward and backward, or of a forward for `EVALUATION`.
    """
    depth = shape.num_hidden_layers
    block = flow.gradient if isinstance(flow.gradient, int) else 1
    unit = block * -(-_FEWEST_LAYERS // block)
    few = max(unit, 2 * block)  # the first block differs from all others
    depths = [few, few + unit] if few + unit < depth else [depth]
    softcap = getattr(shape.get_text_config(decoder=True), "attn_logit_softcapping", None)
    one_by_one = softcap is not None or _attention(config, arithmetic) == "separate"
    count = 1 if one_by_one else -(-_FEWEST_TOKENS // length)
    counts = [count, 3 * count]
    peaks = []  # by depth, then by number of prompts, then by what takes them
    for layers in depths:
        model = trainable_without_memory(with_layers(shape, layers), config, arithmetic, flow)
        peaks.append([step_peak(model, config, arithmetic, flow, length, n) for n in counts])
    tokens = [n * length for n in counts]
    lines = []
    for name in peaks[0][0]:
        at_depth = [
            _extrapolate(depths, [peak[name] for peak in of_count], depth)
            for of_count in zip(*peaks, strict=True)
        ]
        slope = (at_depth[1] - at_depth[0]) / (tokens[1] - tokens[0])
        lines.append(Line(fixed=_extrapolate(tokens, at_depth, 0), a_token=slope))
    return StepMemory(tuple(lines))


def trainable_without_memory(
    shape: PreTrainedConfig, config: TrainConfig, arithmetic: Arithmetic, flow: Flow
) -> PreTrainedModel:
    """Set the model up as `train` does, on tensors without memory."""
    model = skeleton(shape, arithmetic.dtype, _bits(shape, config))
    model = without_memory(
        trainable.set_trained(model, config.trainable, config.lora_r, config.train_head)
    )
    if flow.checkpointing:
        trainable.enable_checkpointing(model)
    return model


def step_peak(
    model: PreTrainedModel,
    config: TrainConfig,
    arithmetic: Arithmetic,
    flow: Flow,
    length: int,
    count: int,
) -> dict[str, int]:
    """Return the peak bytes of a forward and backward on `count` prompts of `length` tokens.

    They are apart by what takes them, as in `peak_memory`. `EVALUATION` has no backward.
    """
    prompts = [example_prompt(config, length)] * count
    packed = pack(prompts)
    if flow == EVALUATION and not _is_tied(model):
        head = model.get_output_embeddings()
        rows = {name: parameter[_LABEL_IDS] for name, parameter in head.named_parameters()}
        set_label_rows(model, _LABEL_IDS, rows)
    changes = {"gradient": flow.gradient, "attention_backend": _attention(config, arithmetic)}
    options = config.model_copy(update=changes)
    for parameter in trainable.trained_parameters(model).values():
        parameter.grad = torch.empty_like(parameter)  # the previous batch leaves gradients

    def step() -> None:
        with contextlib.ExitStack() as stack:
            if arithmetic.mixed:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if arithmetic.device_type == "cuda":
                stack.enter_context(float32_as_on_a_gpu())
            if flow == EVALUATION:
                stack.enter_context(torch.no_grad())
                label_logits(model, prompts, _LABEL_IDS, options.attention_backend)
            else:
                method_loss(model, prompts, packed, options, config.penalty).loss.backward()

    return peak_memory(step, arithmetic.device_type)


def _is_tied(model: PreTrainedModel) -> bool:
    """Return whether the LM head is the input embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _extrapolate(at: Sequence[float], values: Sequence[float], to: float) -> float:
    """Extrapolate linearly to `to`; a single point is at `to`."""
    if len(at) == 1:
        return values[0]
    return values[0] + (values[1] - values[0]) * (to - at[0]) / (at[1] - at[0])


def _bits(shape: PreTrainedConfig, config: TrainConfig) -> int | None:
    """Return the bits of quantized weights, by the options or by the checkpoint's format."""
    match stored_format(shape):
        case None:
            return config.bits if config.quantized else None
        case "bitsandbytes":
            return 8 if shape.quantization_config.get("load_in_8bit") else 4
        case "mxfp4":
            return None  # loading dequantizes these weights
    raise CannotCount(f"the memory of weights stored as {stored_format(shape)} cannot be counted")


def _attention(config: TrainConfig, arithmetic: Arithmetic) -> str:
    """Return an attention backend of the same memory as the run's.

    All backends that return a log-sum-exp take the same memory.
    """
    float32_on_gpu = arithmetic.device_type == "cuda" and not arithmetic.mixed
    return "separate" if float32_on_gpu or config.attention_backend == "separate" else "auto"
