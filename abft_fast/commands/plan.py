"""Plan the memory of a training run, for every way that gradients can flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from abft_fast.commands.data_report import show_data
from abft_fast.core.packing import EncodedPrompt
from abft_fast.data import Dataset
from abft_fast.errors import UserError
from abft_fast.memory.plan import (
    GPU_RESERVE,
    available_memory,
    flows_of,
    make_plan,
    what_to_change,
)
from abft_fast.memory.simulation import CannotCount
from abft_fast.memory.types import EVALUATION, Arithmetic, Flow, Plan
from abft_fast.models import loading
from abft_fast.models.shapes import SYNTHETIC, known_shape
from abft_fast.options import PlanConfig, datasets
from abft_fast.prompts import PromptEncoder, for_tokenizer
from abft_fast.runtime.environment import uses_cpu
from abft_fast.runtime.progress import Progress
from abft_fast.training.methods import training_prompts


def plan(config: PlanConfig, progress: Progress) -> tuple[Plan, list[str]]:
    """Plan the run that `train` would start with these options; read no weights.

    Returns:
        The plan, and notes on it: the longest prompt, the available memory, whether the run fits.

    Raises:
        UserError: an option, the data or the model does not allow the run, or its memory cannot be
            counted from its config.
    """
    shape, is_known, config = shape_of(config)
    prompts, dataset, encoder = training_data(config, shape, is_known)
    lengths = [len(prompt) for prompt in prompts]
    show_data(progress, dataset, encoder, lengths)
    longest = max(lengths)
    arithmetic, limit = machine_of(config)
    chosen = Flow(config.gradient, config.checkpointing)
    flows = dict.fromkeys([*flows_of(config), chosen, EVALUATION])
    try:
        planned = make_plan(shape, config, arithmetic, flows, longest, limit)
        if planned.fits(chosen):
            verdict = "fits"
        else:
            advice = what_to_change(shape, config, arithmetic, longest, limit)
            verdict = f"does not fit: {advice}"
    except CannotCount as error:
        raise UserError(
            f"model {config.model}: {error}; `train` finds a budget by trying"
        ) from error
    notes = [
        *notes_on_data(config, dataset, prompts, is_known),
        note_on_limit(arithmetic, limit),
        f"{chosen.options}: {verdict}",
        *([] if is_known else loading.left_out(config.model)),
        *config.without_effect,
    ]
    return planned, notes


def shape_of(config: PlanConfig) -> tuple[PreTrainedConfig, bool, PlanConfig]:
    """Return a model's config, whether it is of a known shape instead of files, and the options.

    A known shape has no tokenizer. The built-in model's stands in, and under it a label word may be
    several tokens.
    """
    model = config.model
    known = None if Path(model).is_dir() else known_shape(model.removeprefix(SYNTHETIC))
    if known is None:
        return loading.read_config(model), False, config
    return known, True, config.model_copy(update={"label_token": "first"})


def machine_of(config: PlanConfig) -> tuple[Arithmetic, int]:
    """Return how numbers are kept on the machine to plan for, and its available bytes."""
    on_gpu = config.gpu_memory is not None or not uses_cpu(config.device)
    device = torch.device("cuda" if on_gpu else "cpu")
    if config.gpu_memory is None:
        limit = available_memory(device, all_gpus=config.device_map == "auto")
    else:
        limit = int(config.gpu_memory * 1e9) - GPU_RESERVE
    mixed = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and on_gpu)
    return Arithmetic(device.type, mixed), limit


def notes_on_data(
    config: PlanConfig, dataset: Dataset, prompts: Sequence[EncodedPrompt], is_known: bool
) -> list[str]:
    """Say how long the longest training prompt is."""
    names = config.training_dataset_names
    several = names != [config.dataset] and names
    tokenizer = (
        " by the built-in model's tokenizer, which makes more than the model's own"
        if is_known
        else ""
    )
    return [
        f"longest of {len(prompts)} training prompts of "
        f"{', '.join(names) if several else dataset.name}, k={config.k}: "
        f"{max(map(len, prompts))} tokens{tokenizer}"
    ]


def note_on_limit(arithmetic: Arithmetic, limit: int) -> str:
    """Say how much memory is available."""
    on_gpu = arithmetic.device_type == "cuda"
    reserve = f" ({GPU_RESERVE / 1e9:.0f} GB is left to CUDA)" if on_gpu else ""
    return f"{limit / 1e9:.1f} GB are available{reserve}"


def training_data(
    config: PlanConfig, shape: PreTrainedConfig, is_known: bool
) -> tuple[list[EncodedPrompt], Dataset, PromptEncoder]:
    """Return the training prompts, the dataset that the run tests on, and its encoder.

    A known shape has no tokenizer, so the built-in model's tokenizer stands for it.
    """
    tokenizer = loading.read_tokenizer("builtin" if is_known else config.model)
    context = loading.context_length(shape)
    vocabulary = loading.vocabulary_size(shape)
    dataset = for_tokenizer(datasets.from_options(config), tokenizer, vocabulary)
    encoder = PromptEncoder.from_options(config, tokenizer, dataset, context, vocabulary)
    return training_prompts(config, dataset, encoder).prompts, dataset, encoder
