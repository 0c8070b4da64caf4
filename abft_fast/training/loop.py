"""Train a model by one optimizer step a pseudo-batch (Cho et al. 2025, sections 3 and 4.1).

`optimize` is the loop, `train_step` is one step of it, and `backward` computes the gradient. Each
of several processes computes its share of every pseudo-batch.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.packing import EncodedPrompt, PackedPrompts, pack
from abft_fast.errors import RunError
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.models import trainable
from abft_fast.options import TrainConfig
from abft_fast.options.methods import METHODS
from abft_fast.runtime import processes
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.environment import peak_memory
from abft_fast.runtime.float32_linear import fast_float32_linear
from abft_fast.runtime.launch import is_main
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import CPU_TOKENS, TokenBudget, find_token_budget
from abft_fast.training import checkpoint
from abft_fast.training.methods import Loss, method_loss
from abft_fast.training.penalty import PenaltyController
from abft_fast.training.run_folder import RunFolder


@dataclass
class Training:
    """Hold what the loop works with.

    Attributes:
        config: the run's options.
        run: the run's folder.
        model: a decoder of which only the trained parameters require a gradient.
        prompts: the method's training prompts.
        accelerator: the device, the arithmetic and the tracker.
        progress: prints messages and the bar.
        planned_tokens: tokens that fit in memory at once by the plan; None without a plan.
        loss: computes the loss of packed prompts.
        is_part: whether only some layers of the model are trained now, so that a step may well
            find no induction head.
    """

    config: TrainConfig
    run: RunFolder
    model: PreTrainedModel
    prompts: list[EncodedPrompt]
    accelerator: Accelerator
    progress: Progress
    planned_tokens: int | None = None
    loss: Loss = method_loss
    is_part: bool = False


@dataclass
class TrainState:
    """Hold what a step changes besides the folder.

    Attributes:
        trained: trained parameters by name.
        optimizer: Adam on them.
        controller: the current penalty A and what controls it.
        budget: how many tokens are packed at once.
    """

    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    controller: PenaltyController
    budget: TokenBudget


def optimize(training: Training) -> None:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises:
        RunError: a step's loss or gradient is not finite, memory does not hold one prompt, or the
            processes read different checkpoints.
    """
    config = training.config
    state, done = _start_or_resume(training)
    batches = pseudo_batches(len(training.prompts), config)
    sizes = [sum(len(training.prompts[i]) for i in indices) for indices in batches]
    with training.progress.bar("training", len(batches), sum(sizes[done:]), done) as advance:
        for step, indices in enumerate(batches[done:], start=done + 1):
            row = train_step(training, state, [training.prompts[i] for i in indices], step)
            with processes.fail_together():
                if is_main():
                    is_due = step % config.save_steps == 0 or step == len(batches)
                    _record(training, state, row, save=is_due and not config.no_save)
            note = f"loss {row['loss']:.3f}, {row['induction_heads']:.1f} induction heads"
            advance(1, sizes[step - 1], note)


def train_step(
    training: Training, state: TrainState, batch: list[EncodedPrompt], step: int
) -> dict[str, Any]:
    """Take one optimizer step on a pseudo-batch.

    Returns:
        The step's row of metrics.jsonl.

    Raises:
        RunError: as `optimize`.
    """
    started = time.perf_counter()
    penalty = state.controller.penalty
    loss, mean = _pseudo_batch_gradient(training, state, batch)
    behavior = mean.result()
    gradients = [p.grad for p in state.trained.values() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item()
    check_finite(training.config, step, loss, norm)
    if step == 1 and not training.is_part:
        check_first_step(training.config, norm, behavior.induction_heads)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.controller.update(behavior.induction_heads)
    seconds = time.perf_counter() - started
    return {
        "step": step,
        "loss": loss,
        "penalty": penalty,
        "induction_heads": behavior.induction_heads,
        "correct_share_above_chance": behavior.correct_share_above_chance,
        "attention_loss": mean.attention_loss(training.config.penalty, training.config.reward),
        "gradient_norm": norm,
        "learning_rate": training.config.lr,
        "tokens_per_second": sum(map(len, batch)) / seconds,
        "peak_memory_bytes": max(processes.gather(peak_memory(training.accelerator.device))),
        "seconds": seconds,
    }


def backward(
    model: PreTrainedModel,
    batch: list[EncodedPrompt],
    config: TrainConfig,
    penalty: float,
    accelerator: Accelerator,
    tokens: int,
    pseudo_batch: int | None = None,
    loss_of: Loss = method_loss,
) -> tuple[float, BehaviorMean]:
    """Accumulate the gradient of a pseudo-batch's mean loss, micro-batch by micro-batch.

    The result does not depend on how the pseudo-batch is split.

    Args:
        model: the model to train.
        batch: the prompts of one process.
        config: the run's options.
        penalty: the current A.
        accelerator: the device and the arithmetic.
        tokens: most tokens of a micro-batch.
        pseudo_batch: number of prompts on all processes. Unset: those in `batch`.
        loss_of: computes the loss of packed prompts.

    Returns:
        The loss and what the heads did, both of the prompts in `batch`.
    """
    loss = torch.zeros((), device=accelerator.device)
    found: list[tuple[AttentionBehavior, PackedPrompts]] = []
    for indices in micro_batches([len(prompt) for prompt in batch], tokens):
        prompts = [batch[i] for i in indices]
        packed = pack(prompts).to(accelerator.device)
        with fast_float32_linear():
            with accelerator.autocast():
                result = loss_of(model, prompts, packed, config, penalty)
            weighted = result.loss * (len(prompts) / (pseudo_batch or len(batch)))
            accelerator.backward(weighted)
        loss += weighted.detach().to(loss.device)
        found.append((result._replace(loss=result.loss.detach()), packed))
    behavior = BehaviorMean()
    for each in found:  # only now is a GPU awaited
        behavior.add(*each)
    return loss.item(), behavior


def _pseudo_batch_gradient(
    training: Training, state: TrainState, batch: list[EncodedPrompt]
) -> tuple[float, BehaviorMean]:
    """Compute the gradient of a pseudo-batch on all processes; return its loss and behavior."""
    accelerator, penalty = training.accelerator, state.controller.penalty
    share = [batch[i] for i in processes.own_share([len(prompt) for prompt in batch])]

    def attempt(tokens: int) -> tuple[float, BehaviorMean]:
        model, config = training.model, training.config
        return backward(
            model, share, config, penalty, accelerator, tokens, len(batch), training.loss
        )

    with processes.fail_together():
        loss, behavior = state.budget.attempt(
            [len(prompt) for prompt in share], attempt, state.optimizer.zero_grad
        )
    processes.sum_gradients(state.trained.values())
    parts = processes.gather((loss, behavior, state.budget.tokens))
    losses, behaviors, budgets = zip(*parts, strict=True)
    state.budget.lower(min(budgets))
    everyone = BehaviorMean()
    for part in behaviors:
        everyone.join(part)
    return sum(losses), everyone


def check_first_step(config: TrainConfig, norm: float, heads: float) -> None:
    """Stop a run that would learn nothing.

    Raises:
        RunError: the first step has no induction head, or no gradient.
    """
    if heads == 0 and config.head_filter and METHODS[config.method].uses_penalty:
        words = (
            "other label words by --template, such as negative and positive for 0 and 1, "
            if config.data_are_own
            else ""
        )
        raise RunError(
            "the first pseudo-batch has no induction head, so the loss is 0: try "
            f"{words}more demonstrations (--k), another model, or --no-head-filter"
        )
    if norm == 0:
        raise RunError("the gradient is 0 at step 1: nothing would be learnt")


def check_finite(config: TrainConfig, step: int, loss: float, norm: float) -> None:
    """Stop a run whose numbers overflow.

    Raises:
        RunError: the loss or the gradient is not finite.
    """
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if step == 1 and not is_finite:
        raise RunError(
            f"step 1: loss {loss} and gradient norm {norm} are not finite before anything is "
            "learnt: the model's files are damaged (download them again), or use another "
            "--mixed-precision"
        )
    if not is_finite:
        raise RunError(
            f"step {step}: loss {loss} and gradient norm {norm} are not finite: lower --lr "
            f"(now {config.lr:g}) or use another --mixed-precision"
        )


def pseudo_batches(prompts: int, config: TrainConfig) -> list[list[int]]:
    """Return the indices of every step's prompts; each epoch shuffles all prompts anew."""
    order: list[int] = []
    for epoch in range(config.epochs):
        indices = list(range(prompts))
        random.Random(f"{config.seed}-{epoch}").shuffle(indices)
        order += indices
    size = config.pseudo_batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def choose_token_budget(training: Training) -> int:
    """Return the token budget of the run: the recorded one, the requested one, or one that fits.

    A GPU's budget is found by trying, once a run. A CPU's is the plan's, as a system without memory
    kills processes. All processes use the smallest budget among them.
    """
    config, run = training.config, training.run
    recorded = processes.from_main(run.token_budget)
    if recorded is not None:
        return recorded
    if isinstance(config.token_budget, int):
        return config.token_budget
    lengths = [len(prompt) for prompt in training.prompts]
    if training.accelerator.device.type == "cuda":
        tokens = min(processes.gather(_largest_that_fits(training, lengths)))
        processes.run_on_main(run.record_token_budget, tokens)
        training.progress.say(f"token budget: {tokens} a batch")
        return tokens
    planned = training.planned_tokens
    wanted = CPU_TOKENS if planned is None else max(planned, *lengths)
    tokens = min(CPU_TOKENS, *processes.gather(wanted))
    if tokens < CPU_TOKENS:  # a resumed run may find another amount of free memory
        processes.run_on_main(run.record_token_budget, tokens)
    return tokens


def _largest_that_fits(training: Training, lengths: list[int]) -> int:
    """Find how many tokens a forward and backward on this process's GPU can take."""
    config = training.config
    most = sum(sorted(lengths)[-config.pseudo_batch_size :])

    def forward_and_backward(indices: list[int]) -> None:
        try:
            batch = [training.prompts[i] for i in indices]
            backward(training.model, batch, config, config.penalty, training.accelerator, most)
        finally:
            training.model.zero_grad(set_to_none=True)

    with processes.fail_together():
        return find_token_budget(lengths, forward_and_backward, most)


def _start_or_resume(training: Training) -> tuple[TrainState, int]:
    """Return the state after the newest checkpoint, and how many steps that checkpoint has."""
    config, run, model = training.config, training.run, training.model
    trained = trainable.trained_parameters(model)
    optimizer = torch.optim.Adam(trained.values(), lr=config.lr)
    controller = PenaltyController.from_options(config)
    with processes.fail_together():
        done = checkpoint.restore(run.checkpoints, trained, optimizer, controller)
    if len(set(processes.gather(done))) > 1:
        raise RunError(
            f"not every process sees the same checkpoints: put {run.checkpoints} on a shared disk"
        )
    processes.run_on_main(run.forget_metrics_after, done)
    # Adam's step counters stay on the CPU: on a GPU each step would wait for each of them.
    optimizer = training.accelerator.prepare_optimizer(optimizer, device_placement=False)
    model.eval()  # dropout stays off: heads are judged by their undisturbed attention
    if config.checkpointing:
        trainable.enable_checkpointing(model)
    if config.tracker != "none":
        training.accelerator.init_trackers("abft-fast", config.model_dump(mode="json"))
    budget = TokenBudget(choose_token_budget(training), training.progress.say)
    return TrainState(trained, optimizer, controller, budget), done


def _record(training: Training, state: TrainState, row: dict[str, Any], *, save: bool) -> None:
    """Write a step's row, the token budget if it has fallen, and a checkpoint if one is due."""
    run, step = training.run, row["step"]
    if state.budget.has_fallen:
        run.record_token_budget(state.budget.tokens)
    run.append_metrics(row)
    known = {name: value for name, value in row.items() if value is not None}
    training.accelerator.log(known, step=step)
    if save:
        checkpoint.save(run.checkpoints, step, state.trained, state.optimizer, state.controller)
