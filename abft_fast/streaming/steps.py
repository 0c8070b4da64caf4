"""Take all steps of training on a block before the next block is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core.backbone import attention_layers, prepare
from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.objective import block_size
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, PackedPrompts
from abft_fast.core.run_packed import run_packed
from abft_fast.models.preflight import check_gradients
from abft_fast.options import TrainConfig
from abft_fast.runtime import launch
from abft_fast.runtime.tensor_file import with_prefix
from abft_fast.runtime.token_budget import TokenBudget, tokens_at_once
from abft_fast.streaming.group import PromptGroup, WalkingPrompt
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import StageInTurns
from abft_fast.training.checkpoint import put_back, tensors_of
from abft_fast.training.loop import (
    Training,
    TrainState,
    check_first_step,
    pseudo_batches,
    train_step,
)
from abft_fast.training.methods import loss_options
from abft_fast.training.penalty import PenaltyController


class TrainingSteps(StageInTurns):
    """Train block by block: take all steps on one block, then go on to the next.

    With h(b, t) the hidden states that enter block b at step t and θ(b, t) the block's trained
    weights, h(b + 1, t) is block b of h(b, t) at θ(b, t), and θ(b, t + 1) follows from the block's
    own loss at h(b, t). So a block needs nothing of the blocks after it, and the result is that of
    `optimize`. Each block has its own Adam, and its own penalty A, which follows the induction
    heads of the block alone (ours: the paper's follows those of all layers).

    Args:
        streamed: the model.
        training: what `loop.train_step` takes; this stage sets its `loss` and `is_part`.
    """

    waits_for_others = True
    saved_between_turns = True

    def __init__(self, streamed: StreamedModel, training: Training):
        super().__init__(streamed, training.accelerator)
        self._training = training
        self._config = training.config
        self._size = block_size(self._config.gradient)
        tokens = tokens_at_once(self._config.token_budget, training.accelerator.device.type)
        self._budget = TokenBudget(tokens, training.progress.say)
        self.groups = [
            PromptGroup([training.prompts[i] for i in places])
            for places in pseudo_batches(len(training.prompts), self._config)
        ]
        self.facts = {"rows": []}  # rows of each block, by step
        training.loss, training.is_part = self._loss, True
        self._block, self._group = range(0), self.groups[0]  # what takes a step
        self._states: dict[range, TrainState] = {}
        self._rows: dict[range, list[dict[str, Any]]] = {}

    def begin(self, block: range) -> None:
        """Make the block's optimizer and penalty."""
        if block.start == 0:
            check_gradients(self.streamed.model)
        trained = self.streamed.trained_parameters(block)
        controller = PenaltyController.from_options(self._config)
        optimizer = torch.optim.Adam(trained.values(), lr=self._config.lr)
        self._states[block] = TrainState(trained, optimizer, controller, self._budget)
        self._rows[block] = []

    def take(self, block: range, turn: int) -> None:
        """Take a step on a block."""
        self._block, self._group = block, self.groups[turn]
        group = self._group
        if group.own:
            group.enter(block)
        row = train_step(self._training, self._states[block], list(group.prompts), turn + 1)
        self._rows[block].append({**row, "process": launch.rank()})
        if group.own:
            group.leave()

    def end(self, block: range) -> None:
        """Keep the rows of the block's steps, and nothing else of it."""
        del self._states[block]
        self.facts["rows"].append(self._rows.pop(block))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps, with the blocks that are between two steps."""
        tensors, facts = super().state()
        between = {}
        for block, state in self._states.items():
            own = tensors_of(state.trained, state.optimizer)
            tensors |= {f"block.{block.start}.{name}": tensor for name, tensor in own.items()}
            controller = asdict(state.controller)
            between[block.start] = {"controller": controller, "rows": self._rows[block]}
        return tensors, {**facts, "between": between}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take what `state` returned; blocks that are between two steps have begun before."""
        between = facts.pop("between")
        super().restore(tensors, facts)
        for block, state in self._states.items():
            own, known = with_prefix(tensors, f"block.{block.start}."), between[str(block.start)]
            put_back(own, state.trained, state.optimizer)
            vars(state.controller).update(known["controller"])
            self._rows[block] = known["rows"]

    def _loss(
        self,
        model: PreTrainedModel,
        prompts: Sequence[EncodedPrompt],
        packed: PackedPrompts,
        config: TrainConfig,
        penalty: float,
    ) -> AttentionBehavior:
        """Return the loss of the block's layers, and store the hidden states that leave it."""
        places, group = [cast(WalkingPrompt, prompt).place for prompt in prompts], self._group
        forward = PackedForward(
            packed,
            loss_options(config, penalty),
            config.attention_backend,
            self._size,
            stop_after=max(attention_layers(prepare(model))),
            layers_to_run=self._block,
            entering=group.entering(places, self.accelerator.device),
        )
        run_packed(prepare(model), forward)
        behavior = forward.behavior()
        group.store(places, forward.leaving)
        group.observe(self._block, places, behavior)
        return behavior

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, one a step, after the last block.

        Raises:
            RunError: the first step found no induction head in any block, or no gradient.
        """
        rows = []
        for step, group in enumerate(self.groups, start=1):
            of_blocks = [of_block[step - 1] for of_block in self.facts["rows"]]
            heads = group.behavior()
            behavior = heads.result()
            penalties = [row["penalty"] for row in of_blocks]
            seconds = _seconds(of_blocks)
            row: dict[str, Any] = {
                "step": step,
                "loss": sum(row["loss"] for row in of_blocks),
                "penalty": sum(penalties) / len(penalties),
                "induction_heads": behavior.induction_heads,
                "correct_share_above_chance": behavior.correct_share_above_chance,
                "attention_loss": heads.attention_loss(self._config.penalty, self._config.reward),
                "gradient_norm": math.hypot(*(row["gradient_norm"] for row in of_blocks)),
                "learning_rate": self._config.lr,
                "tokens_per_second": sum(group.lengths) / seconds,
                "peak_memory_bytes": max(row["peak_memory_bytes"] for row in of_blocks),
                "seconds": seconds,
                "penalty_by_block": penalties,
            }
            if step == 1:
                check_first_step(self._config, row["gradient_norm"], row["induction_heads"])
            rows.append(row)
        return rows


def _seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of a step on all blocks; processes compute at the same time."""
    by_process: defaultdict[int, float] = defaultdict(float)
    for row in rows:
        by_process[row.get("process", 0)] += row["seconds"]
    return max(by_process.values())
