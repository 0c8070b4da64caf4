"""Plan a streamed run: memory of the device and of the host, bytes read, operations, seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from abft_fast.core.backbone import decoder_layers, prepare
from abft_fast.core.objective import block_size
from abft_fast.memory.measure import ADAM_STATES, step_memory, trainable_without_memory
from abft_fast.memory.simulation import bytes_of
from abft_fast.memory.types import Arithmetic, Flow, StepMemory
from abft_fast.models.shapes import with_layers
from abft_fast.options import TrainConfig
from abft_fast.runtime.neighbours import ON_THE_WAY
from abft_fast.streaming.model import WeightToRead
from abft_fast.streaming.pipeline import block_shares

_COPIES_TO_QUANTIZE = 2.5  # in float32, that bitsandbytes' NF4 holds on a CPU at most


class Stored(NamedTuple):
    """A weight that is read, or some rows of it, and its bytes in the file and as it is read."""

    weight: WeightToRead
    in_file: int
    as_read: int


@dataclass(frozen=True)
class PromptTokens:
    """What a plan needs of the prompts of a run.

    Attributes:
        longest: tokens of the longest prompt.
        steps: tokens of all training prompts, each as often as it is trained on.
        tests: tokens of all test prompts, each as often as it is tested.
        batch: most tokens of a packed batch, before memory runs out.
        turn: most tokens of a turn that one pipeline computes.
        turns: how often a process hands on hidden states.
    """

    longest: int
    steps: int
    tests: int
    batch: int
    turn: int
    turns: int


@dataclass(frozen=True)
class Speeds:
    """How fast the machine is; None where it is not known.

    Attributes:
        disk: bytes a second that are read from the disk.
        bus: bytes a second from the host's memory to the device's; not used on a CPU.
        operations: floating-point operations a second.
    """

    disk: float | None
    bus: float | None
    operations: float | None


@dataclass(frozen=True)
class StreamedPlan:
    """What a streamed run takes, in a pipeline the process that takes most.

    Attributes:
        processes: of all pipelines; 1 without one.
        device: bytes on the device all the time that the largest block is there, by part.
        quantizing: bytes on the device that one weight takes while it is quantized.
        step: bytes that a packed batch adds.
        batch: tokens of the largest packed batch; on a GPU halved until it fits.
        limit: available bytes of the device; a CPU's device is its host.
        states: bytes of hidden states: those that enter a block, and those that leave it.
        states_on_disk: whether files hold them.
        host_reading: bytes on the host of one weight, in the file, as read and as the model has it.
        host_ahead: bytes on the host of the block that is read ahead; 0 on a CPU.
        read: bytes read from the weights' files.
        copied: bytes copied to the device; 0 on a CPU.
        operations: of all products with weights of the layers.
        filling: how much longer a pipeline takes because it fills and empties; 1 without one.
    """

    processes: int
    device: dict[str, int]
    quantizing: int
    step: StepMemory
    batch: int
    limit: int
    states: int
    states_on_disk: bool
    host_reading: int
    host_ahead: int
    read: int
    copied: int
    operations: float
    filling: float

    @property
    def resident(self) -> int:
        """Return the bytes on the device without a batch."""
        return sum(self.device.values())

    @property
    def device_peak(self) -> float:
        """Return the most bytes on the device."""
        return self.resident + max(self.quantizing, self.step.at(self.batch))

    @property
    def host_peak(self) -> int:
        """Return the most bytes on the host beside the device's."""
        return self.host_reading + self.host_ahead + (0 if self.states_on_disk else self.states)

    @property
    def fits(self) -> bool:
        """Return whether the batch fits on the device; on a CPU, with what the host holds."""
        shared = 0 if self.copied else self.host_peak
        return self.device_peak + shared <= self.limit

    def seconds(self, speeds: Speeds) -> dict[str, float]:
        """Return the seconds of each part whose speed is known; on a GPU reading overlaps.

        The processes of a pipeline share one disk, and have a bus and a device each.
        """
        parts = {
            "read": (self.read, speeds.disk),
            "copy": (self.copied / self.processes, speeds.bus),
            "compute": (self.operations * self.filling / self.processes, speeds.operations),
        }
        return {name: work / speed for name, (work, speed) in parts.items() if speed and work}


def plan_streamed(
    shape: PreTrainedConfig,
    config: TrainConfig,
    arithmetic: Arithmetic,
    weights: Sequence[Stored],
    prompts: PromptTokens,
    limit: int,
    pipeline_size: int = 1,
    pipelines: int = 1,
) -> StreamedPlan:
    """Plan `train --stream` with these options.

    Args:
        shape: the model's config.
        config: the run's options.
        arithmetic: how numbers are kept.
        weights: what is read, by `streaming.model.weights_to_read`.
        prompts: tokens of the prompts.
        limit: available bytes of a device.
        pipeline_size: processes of a pipeline; 1 without one.
        pipelines: that share the prompts of every step.

    Raises:
        UserError: the model cannot be trained this way.
        CannotCount: its memory cannot be counted.
    """
    depth = shape.num_hidden_layers
    size = min(block_size(config.gradient) or depth, depth)
    item = arithmetic.dtype.itemsize
    width = shape.get_text_config(decoder=True).hidden_size
    handed_on = prompts.turn * width * item
    device = _on_device(shape, config, arithmetic, size, pipeline_size)
    if pipeline_size > 1:
        device["hidden states that enter and leave a block"] = 2 * handed_on
    wanted = [each.weight for each in weights]
    outside = sum(each.numbers for each in wanted if each.layer is None)
    in_layers = sum(each.numbers for each in wanted if each.layer is not None)
    device["rows of the embedding and the head, norms"] = item * outside
    # With one layer more the block's last layer runs whole: a model's last one stops after its
    # attention.
    cut = with_layers(shape, min(size + 1, depth))
    step = step_memory(cut, config, arithmetic, Flow(config.gradient), prompts.longest)
    matrices = [each for each in weights if each.weight.is_matrix]
    largest = max(matrices, key=lambda each: (each.weight.numbers, each.in_file))
    in_model = item * largest.weight.numbers
    on_gpu = arithmetic.device_type == "cuda"
    reading = 0
    if config.quantized and on_gpu:
        reading = in_model
    elif config.quantized:  # bitsandbytes makes it float32 first
        in_float32 = torch.float32.itemsize * largest.weight.numbers
        copies = _COPIES_TO_QUANTIZE + (1 if arithmetic.mixed else 0)
        reading = int(copies * in_float32)
    room = limit - sum(device.values())
    batch = max(prompts.batch, prompts.longest)
    while on_gpu and batch > prompts.longest and step.at(batch) > room:
        batch = max(prompts.longest, batch // 2)  # as `TokenBudget` does
    inside = sum(each.numbers for each in wanted if each.layer is not None and each.is_matrix)
    blocks = math.ceil(depth / size)
    ahead = [0] * blocks
    for each in wanted:
        if each.layer is not None:
            ahead[each.layer // size] += item * each.numbers
    read_by_each = sum(each.in_file for each in weights if each.weight.layer is None)
    read_by_pipeline = sum(each.in_file for each in weights if each.weight.layer is not None)
    tokens = prompts.steps + prompts.tests
    states = min(blocks - 1, 2) * tokens * width * item
    if pipeline_size > 1:
        states = (ON_THE_WAY + 1) * handed_on
        ahead = []
    return StreamedPlan(
        processes=pipeline_size * pipelines,
        device=device,
        quantizing=reading,
        step=step,
        batch=batch,
        limit=limit,
        states=states,
        states_on_disk=config.stream_states == "disk",
        host_reading=largest.in_file
        + largest.as_read
        + (in_model if largest.as_read != in_model else 0),
        host_ahead=max(ahead[1:], default=0) if on_gpu else 0,
        read=pipelines * (read_by_pipeline + pipeline_size * read_by_each),
        copied=pipelines * item * (in_layers + pipeline_size * outside) if on_gpu else 0,
        # Forward: 2 a weight and token. Backward: again 2 for the layers that a loss crosses.
        operations=2.0 * inside * (tokens + prompts.steps * (size - 1) / size),
        filling=1 + (pipeline_size - 1) / prompts.turns,
    )


def _on_device(
    shape: PreTrainedConfig,
    config: TrainConfig,
    arithmetic: Arithmetic,
    size: int,
    pipeline_size: int,
) -> dict[str, int]:
    """Return the bytes of a process's blocks and their optimizer, one's gradients, all LoRA.

    A process has one block at a time, or, in a pipeline, its share of them; the largest counts.
    """
    model = trainable_without_memory(shape, config, arithmetic, Flow("local"))
    layers = decoder_layers(prepare(model))
    blocks = [layers[start : start + size] for start in range(0, len(layers), size)]
    trained, frozen = ([bytes_of(_tensors(b, kind)) for b in blocks] for kind in (True, False))
    at_once = [range(i, i + 1) for i in range(len(blocks))]
    whose, of = "a block's", "of a block"
    if pipeline_size > 1:
        at_once = block_shares(len(blocks), pipeline_size)
        of = f"of {max(map(len, at_once))} blocks"
        whose = f"a process's {max(map(len, at_once))} blocks'"

    def most(sizes: Sequence[int]) -> int:
        return max(sum(sizes[i] for i in blocks) for blocks in at_once)

    is_lora = config.trainable == "lora"
    return {
        f"{whose} frozen weights": most(frozen),
        "LoRA of all layers" if is_lora else f"{whose} trained weights": (
            sum(trained) if is_lora else most(trained)
        ),
        "a block's gradients": max(trained),
        f"Adam's moments {of}": ADAM_STATES * most(trained),
    }


def _tensors(block: object, trained: bool) -> list[Tensor]:
    parameters = list(block.parameters())  # type: ignore[attr-defined]
    chosen: list[Tensor] = [p for p in parameters if p.requires_grad == trained]
    return chosen if trained else [*chosen, *block.buffers()]  # type: ignore[attr-defined]
