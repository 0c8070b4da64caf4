"""Memory of a training run before it is run, from the model's config alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from abft_fast.commands.data_report import show_data
from abft_fast.core.packing import pack
from abft_fast.errors import UserError
from abft_fast.memory.simulation import (
    CannotCount,
    bytes_of,
    float32_as_on_a_gpu,
    peak_memory,
    without_memory,
)
from abft_fast.models import loading, trainable
from abft_fast.models.shapes import SYNTHETIC, known_shape, with_layers
from abft_fast.models.stored_format import stored_format
from abft_fast.models.synthetic import skeleton
from abft_fast.options import PlanConfig, TrainConfig, datasets
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.environment import free_memory, uses_cpu
from abft_fast.runtime.launch import local_process_count
from abft_fast.runtime.progress import Progress
from abft_fast.training.methods import example_prompt, method_loss
from abft_fast.training.training_data import training_prompts

_ADAM_STATES = 2
_FEWEST_TOKENS = 2048  # with less, what does not grow with tokens sets the peak
GPU_RESERVE = 10**9  # CUDA's context and libraries, and memory in pieces; assumed, not counted


@dataclass(frozen=True)
class Arithmetic:
    """How numbers are kept.

    Attributes:
        device_type: `cuda` or `cpu`.
        mixed: whether the forward is in bfloat16 (autocast).
        dtype: of weights that are neither quantized nor trained.
    """

    device_type: str
    mixed: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed and self.device_type == "cuda" else torch.float32


@dataclass(frozen=True)
class Flow:
    """How far gradients flow, and whether layers are recomputed for it."""

    gradient: str | int
    checkpointing: bool = False

    @property
    def options(self) -> str:
        """The command line's words for it."""
        return f"--gradient {self.gradient}" + " --checkpointing" * self.checkpointing


FLOWS = (Flow("full"), Flow("full", True), Flow(4), Flow(2), Flow("local"))
"""From most memory to least, in most models."""


def flows_of(config: TrainConfig) -> list[Flow]:
    """Those a method can take: a loss at the output needs the whole graph."""
    return [flow for flow in FLOWS if config.method == "ABFT" or flow.gradient == "full"]


@dataclass(frozen=True)
class Static:
    """Bytes that are there all the time.

    Attributes:
        quantized: weights in 4 or 8 bits, with their statistics.
        frozen: all other weights that are not trained; no LM head of its own where only its label
            rows are kept.
        trained: trained parameters, float32.
        gradients: of them.
        optimizer: Adam's two moments of them.
        parameters: how many are trained.
    """

    quantized: int
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    parameters: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.quantized + self.frozen + self.trained + self.gradients + self.optimizer


@dataclass(frozen=True)
class Step:
    """Most bytes a step takes beyond what is always there: `fixed + a_token * tokens`."""

    fixed: float
    a_token: float

    def at(self, tokens: int) -> float:
        """Bytes for a packed batch of this many tokens."""
        return self.fixed + self.a_token * tokens

    def most_tokens(self, room: float) -> int:
        """The largest batch that takes no more than `room` bytes; 0 if there is none."""
        return max(0, int((room - self.fixed) / self.a_token))


def static_memory(shape: PreTrainedConfig, config: TrainConfig, arithmetic: Arithmetic) -> Static:
    """Memory of weights and optimizer.

    Raises:
        UserError: the model cannot be trained this way.
    """
    model = _trainable(shape, config, arithmetic, Flow("local"))
    trained = [p for p in model.parameters() if p.requires_grad]
    head = model.get_output_embeddings()
    freed = set()
    if config.needs_label_rows_only and head.weight is not model.get_input_embeddings().weight:
        freed = set(head.parameters())
    frozen = [p for p in model.parameters() if not p.requires_grad and p not in freed]
    quantized = [p for p in frozen if not p.is_floating_point()]
    rest = [p for p in frozen if p.is_floating_point()]
    size = bytes_of(trained)
    return Static(
        bytes_of(quantized),
        bytes_of([*rest, *model.buffers()]),
        size,
        size,
        _ADAM_STATES * size,
        sum(p.numel() for p in trained),
    )


def step_memory(
    shape: PreTrainedConfig,
    config: TrainConfig,
    arithmetic: Arithmetic,
    flow: Flow,
    length: int,
) -> Step:
    """Memory of one forward and backward on prompts of `length` tokens.

    Few layers are run on tensors without memory, twice as many again, and a line drawn to the
    depth of the model.
    """
    depth = shape.num_hidden_layers
    few = max(4, flow.gradient) if isinstance(flow.gradient, int) else 4
    depths = [few, 2 * few] if 2 * few < depth else [depth]
    softcap = getattr(shape.get_text_config(decoder=True), "attn_logit_softcapping", None)
    one_by_one = softcap is not None or _attention(config, arithmetic) == "separate"
    count = 1 if one_by_one else -(-_FEWEST_TOKENS // length)
    counts = [count, 3 * count]
    found = []
    for layers in depths:
        model = _trainable(with_layers(shape, layers), config, arithmetic, flow)
        found.append([_peak(model, config, arithmetic, flow, length, n) for n in counts])
    at_depth = [_line(depths, peaks, depth) for peaks in zip(*found, strict=True)]
    tokens = [n * length for n in counts]
    return Step(_line(tokens, at_depth, 0), (at_depth[1] - at_depth[0]) / (tokens[1] - tokens[0]))


def _line(at: Sequence[float], values: Sequence[float], to: float) -> float:
    if len(at) == 1:
        return values[0]
    return values[0] + (values[1] - values[0]) * (to - at[0]) / (at[1] - at[0])


def _trainable(
    shape: PreTrainedConfig, config: TrainConfig, arithmetic: Arithmetic, flow: Flow
) -> nn.Module:
    """The model as `train` sets it up, on tensors without memory."""
    model = skeleton(shape, arithmetic.dtype, _bits(shape, config))
    model = without_memory(trainable.set_trained(model, config.trainable, config.lora_r))
    if flow.checkpointing:
        trainable.enable_checkpointing(model)
    return model


def _bits(shape: PreTrainedConfig, config: TrainConfig) -> int | None:
    """Bits of the quantized weights, by the options or by how the checkpoint is stored."""
    match stored_format(shape):
        case None:
            return config.bits if config.quantized else None
        case "bitsandbytes":
            return 8 if shape.quantization_config.get("load_in_8bit") else 4
        case "mxfp4":
            return None  # dequantized as it is read
    raise CannotCount(f"weights stored as {stored_format(shape)} are not counted")


def _peak(
    model: nn.Module,
    config: TrainConfig,
    arithmetic: Arithmetic,
    flow: Flow,
    length: int,
    count: int,
) -> int:
    prompts = [example_prompt(config, length)] * count
    packed = pack(prompts)
    changes = {"gradient": flow.gradient, "attention_backend": _attention(config, arithmetic)}
    options = config.model_copy(update=changes)
    for parameter in trainable.trained_parameters(model).values():
        parameter.grad = torch.empty_like(parameter)  # of the batch before

    def step() -> None:
        with contextlib.ExitStack() as stack:
            if arithmetic.mixed:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if arithmetic.device_type == "cuda":
                stack.enter_context(float32_as_on_a_gpu())
            method_loss(model, prompts, packed, options, config.penalty).loss.backward()

    return peak_memory(step)


def _attention(config: TrainConfig, arithmetic: Arithmetic) -> str:
    """What stands for a run's attention: all that share a log-sum-exp take the same memory."""
    float32_on_gpu = arithmetic.device_type == "cuda" and not arithmetic.mixed
    return "separate" if float32_on_gpu or config.attention_backend == "separate" else "auto"


@dataclass(frozen=True)
class Plan:
    """What a run takes, for one or several ways that gradients flow.

    Attributes:
        static: bytes that are there all the time.
        steps: bytes of a step, by flow.
        longest: tokens of the longest prompt; a batch holds at least one.
        k: demonstrations in it.
        limit: bytes there are.
        context: tokens a prompt may have at most; None if the model does not say.
    """

    static: Static
    steps: dict[Flow, Step]
    longest: int
    k: int
    limit: int
    context: int | None

    def most_tokens(self, flow: Flow) -> int:
        """The largest packed batch that fits; 0 where not even the weights do."""
        return self.steps[flow].most_tokens(self.limit - self.static.total)

    def fits(self, flow: Flow) -> bool:
        """Whether the longest prompt does."""
        return self.most_tokens(flow) >= self.longest

    def most_demonstrations(self, flow: Flow) -> int:
        """Demonstrations of one prompt that fits, each as long as the longest prompt's."""
        tokens = self.most_tokens(flow)
        if self.context is not None:
            tokens = min(tokens, self.context)
        return max(0, int(tokens / (self.longest / (self.k + 1))) - 1)


def make_plan(
    shape: PreTrainedConfig,
    config: TrainConfig,
    arithmetic: Arithmetic,
    flows: Iterable[Flow],
    longest: int,
    limit: int,
) -> Plan:
    """The plan of a run whose longest prompt has `longest` tokens, in `limit` bytes.

    Raises:
        UserError: the model cannot be trained this way.
        CannotCount: its memory cannot be told from its config.
    """
    try:
        steps = {flow: step_memory(shape, config, arithmetic, flow, longest) for flow in flows}
        static = static_memory(shape, config, arithmetic)
    except (UserError, CannotCount):
        raise
    except Exception as error:  # what a family does that fewer layers or fake tensors do not bear
        line = str(error).strip().split("\n")[0]
        raise CannotCount(f"{shape.model_type}: {type(error).__name__}: {line}") from error
    return Plan(static, steps, longest, config.k, limit, loading.context_length(shape))


def what_to_change(
    shape: PreTrainedConfig, config: TrainConfig, arithmetic: Arithmetic, longest: int, limit: int
) -> str:
    """Options with which a run that does not fit would, the least change first.

    Raises:
        CannotCount: as `make_plan`.
    """
    candidates = {"": config}
    if stored_format(shape) is None and not config.quantized:
        options = "--quantized " + "--trainable lora " * (config.trainable != "lora")
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
    if plan.static.total > limit:
        return (
            f"weights and optimizer alone take {plan.static.total / 1e9:.1f} GB"
            + " with --quantized" * bool(options)
            + ": use a larger GPU or a smaller model"
        )
    flow = max(plan.steps, key=plan.most_demonstrations)
    if not plan.most_demonstrations(flow):
        return "no prompt with a demonstration does: use a larger GPU or a smaller model"
    return f"try {options}{flow.options} --k {plan.most_demonstrations(flow)}"


def memory_to_be_had(device: torch.device, *, all_gpus: bool = False) -> int:
    """Bytes a run may plan with on a device, or on all GPUs of this machine together."""
    if device.type != "cuda":
        return free_memory(device) // local_process_count()  # they share it
    gpus = range(torch.cuda.device_count()) if all_gpus else [device.index or 0]
    return sum(free_memory(torch.device("cuda", gpu)) - GPU_RESERVE for gpu in gpus)


def plan_run(config: PlanConfig, progress: Progress) -> tuple[Plan, list[str]]:
    """The plan of a run with these options, for every flow, and what is to be said of it.

    Raises:
        UserError: an option, the data or the model does not allow the run, or its memory cannot be
            told from its config.
    """
    here = Path(config.model).is_dir()
    known = None if here else known_shape(config.model.removeprefix(SYNTHETIC))
    shape = known or loading.read_config(config.model)
    dataset = datasets.by_options(config)
    tokenizer = loading.read_tokenizer("builtin" if known else config.model)
    context = loading.context_length(shape)
    prompts = config
    if known:  # in its own tokenizer a label word may be one token
        prompts = config.model_copy(update={"label_token": "first"})
    encoder = PromptEncoder.by_options(prompts, tokenizer, dataset, context)
    lengths = [len(prompt) for prompt in training_prompts(config, dataset, encoder).prompts]
    show_data(progress, dataset, encoder, lengths)
    longest = max(lengths)
    on_gpu = config.gpu_memory is not None or not uses_cpu(config.device)
    device = torch.device("cuda" if on_gpu else "cpu")
    limit = (
        memory_to_be_had(device, all_gpus=config.device_map == "auto")
        if config.gpu_memory is None
        else int(config.gpu_memory * 1e9) - GPU_RESERVE
    )
    mixed = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and on_gpu)
    arithmetic = Arithmetic(device.type, mixed)
    chosen = Flow(config.gradient, config.checkpointing)
    flows = dict.fromkeys([*flows_of(config), chosen])
    try:
        plan = make_plan(shape, config, arithmetic, flows, longest, limit)
        verdict = (
            "fits"
            if plan.fits(chosen)
            else f"does not fit: {what_to_change(shape, config, arithmetic, longest, limit)}"
        )
    except CannotCount as error:
        raise UserError(
            f"model {config.model}: {error}; `train` finds a budget by trying"
        ) from error
    notes = [
        f"longest of {len(lengths)} training prompts of {dataset.name}, k={config.k}: "
        f"{longest} tokens" + ", by the built-in model's tokenizer, which makes many" * bool(known),
        f"{limit / 1e9:.1f} GB are to be had"
        + f" ({GPU_RESERVE / 1e9:.0f} GB is left to CUDA)" * on_gpu,
        f"{chosen.options}: {verdict}",
        *config.without_effect,
    ]
    return plan, notes
