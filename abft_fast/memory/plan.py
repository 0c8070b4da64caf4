"""Plan the memory of a training run from the model's config alone, before weights are read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from abft_fast.data import BOXES
from abft_fast.errors import UserError
from abft_fast.memory.measure import static_memory, step_memory
from abft_fast.memory.simulation import CannotCount
from abft_fast.memory.types import FLOWS, Arithmetic, Flow, Plan
from abft_fast.models import loading
from abft_fast.models.stored_format import stored_format
from abft_fast.options import TrainConfig
from abft_fast.options.methods import METHODS
from abft_fast.runtime.environment import free_memory
from abft_fast.runtime.launch import local_process_count

GPU_RESERVE = 10**9  # for CUDA's context, libraries and fragmentation; assumed, not counted


def flows_of(config: TrainConfig) -> list[Flow]:
    """Return the flows that a method allows: a loss at the output needs the whole graph."""
    whole_graph_only = METHODS[config.method].loss_at_output
    return [flow for flow in FLOWS if flow.gradient == "full" or not whole_graph_only]


def make_plan(
    shape: PreTrainedConfig,
    config: TrainConfig,
    arithmetic: Arithmetic,
    flows: Iterable[Flow],
    longest: int,
    limit: int,
) -> Plan:
    """Plan a run whose longest prompt has `longest` tokens, for `limit` available bytes.

    Raises:
        UserError: the model cannot be trained this way.
        CannotCount: the model's memory cannot be counted from its config.
    """
    try:
        steps = {flow: step_memory(shape, config, arithmetic, flow, longest) for flow in flows}
        static = static_memory(shape, config, arithmetic)
    except (UserError, CannotCount):
        raise
    except Exception as error:  # a family may not bear fewer layers or fake tensors
        line = str(error).strip().split("\n")[0]
        raise CannotCount(f"{shape.model_type}: {type(error).__name__}: {line}") from error
    return Plan(static, steps, longest, config.k, limit, loading.context_length(shape))


def what_to_change(
    shape: PreTrainedConfig, config: TrainConfig, arithmetic: Arithmetic, longest: int, limit: int
) -> str:
    """Advise which options make a run fit that does not fit, the smallest change first.

    Raises:
        CannotCount: as `make_plan`.
    """
    candidates = {"": config}
    if stored_format(shape) is None and not config.quantized:
        options = "--quantized " if config.trainable == "lora" else "--quantized --trainable lora "
        changes = {"quantized": True, "trainable": "lora"}
        candidates[options] = config.model_copy(update=changes)
    for options, candidate in candidates.items():
        plan = make_plan(shape, candidate, arithmetic, [], longest, limit)
        if plan.static.total <= limit:
            flows = flows_of(config)
            plan = make_plan(shape, candidate, arithmetic, flows, longest, limit)
            for flow in flows:
                if plan.fits(flow):
                    return f"try {options}{flow.options}"
    # Nothing fits. The last candidate takes least memory, so the advice is about that one.
    if plan.static.total > limit:
        what = "weights and optimizer alone take"
        size = f"{plan.static.total / 1e9:.1f} GB" + (" with --quantized" if options else "")
        return f"{what} {size}: use a larger GPU or a smaller model"
    flow = max(plan.steps, key=plan.most_demonstrations)
    if not plan.most_demonstrations(flow):
        return "not even a prompt with one demonstration fits: use a larger GPU or a smaller model"
    if config.dataset in BOXES:  # the dataset's name sets k
        return f"try {options}{flow.options}, and a dataset of fewer boxes"
    return f"try {options}{flow.options} --k {plan.most_demonstrations(flow)}"


def available_memory(device: torch.device, *, all_gpus: bool = False) -> int:
    """Return the bytes that a run may plan with, on a device or on all GPUs of this machine."""
    if device.type != "cuda":
        return free_memory(device) // local_process_count()  # the processes share it
    gpus = range(torch.cuda.device_count()) if all_gpus else [device.index or 0]
    return sum(free_memory(torch.device("cuda", gpu)) - GPU_RESERVE for gpu in gpus)
