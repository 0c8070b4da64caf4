"""Attention Behavior Fine-Tuning (Cho et al. 2025, sections 3 and 4.1): the training loop."""

from __future__ import annotations

import functools
import math
import random
import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from abft_fast.commands import mauve
from abft_fast.commands.session import Job, check_same_data
from abft_fast.core.packing import EncodedPrompt, pack
from abft_fast.errors import RunError
from abft_fast.evaluation.behavior import Behavior, BehaviorMean
from abft_fast.evaluation.evaluation_set import EvaluationSet
from abft_fast.models import loading, trainable
from abft_fast.models.preflight import check_gradients
from abft_fast.options import TrainConfig, datasets
from abft_fast.runtime import processes
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.environment import peak_memory
from abft_fast.runtime.files import atomic_folder
from abft_fast.runtime.launch import is_main
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import CPU_TOKENS, TokenBudget, find_token_budget
from abft_fast.training import checkpoint
from abft_fast.training.methods import method_loss
from abft_fast.training.penalty import PenaltyController
from abft_fast.training.run_folder import Run


def train(config: TrainConfig, run: Run, progress: Progress, *, new: bool) -> None:
    """Run, or go on with, a whole training run: evaluate, optimize, evaluate.

    Raises:
        UserError: an option, the data or the model does not allow the run; nothing is written.
        RunError: training cannot go on.
    """
    check_same_data(config)
    with processes.fail_together():
        job, prompts, tests = set_up(config, run, progress, new=new)

    def evaluate_once(when: str) -> None:
        if when in config.sides and processes.from_main(when not in run.evaluation):
            found = job.evaluate(tests, f"evaluating {when}")
            processes.run_on_main(run.record_evaluation, when, *found)

    evaluate_once("before")
    if config.mauve_test:
        processes.run_on_main(mauve.record_texts, config, run, job, "before")
        processes.run_on_main(mauve.record_texts, config, run, job, "before-again")
    optimize(config, run, job, prompts)
    processes.run_on_main(save_result, config, run, job.model)
    evaluate_once("after")
    if config.mauve_test:
        processes.run_on_main(mauve.record_texts, config, run, job, "after")
        processes.run_on_main(mauve.score_texts, config, run, job)
    job.accelerator.end_training()


def set_up(
    config: TrainConfig, run: Run, progress: Progress, *, new: bool
) -> tuple[Job, list[EncodedPrompt], list[EvaluationSet]]:
    """What a run needs before its first evaluation: a job, training and test prompts, a folder."""
    set_seed(config.seed)
    files = datasets.file_hashes(config)
    job = Job(config, progress, run.folder)
    if not new and is_main():
        run.check_data(files)
    for line in config.without_effect:
        progress.say(line)
    prompts = job.encode_training()
    tests = job.evaluation_sets() if config.sides else []
    job.show_data(prompts, *(test.prompts for test in tests[:1]))
    if config.mauve_test:
        mauve.check(config, job.dataset)
    tested = sum(len(encoded.prompts) for test in tests for encoded in test.encoded)
    progress.say(
        f"on {job.accelerator.device.type}: {len(prompts):,} prompts to train on, "
        f"{tested:,} to test on"
    )
    job.check_memory(prompts)
    job.load()
    job.check_attention(prompts)
    if config.trainable == "lora":
        check_gradients(job.model)
    if config.needs_label_rows_only:
        job.keep_label_rows(tests)
    set_seed(config.seed)
    job.model = trainable.set_trained(job.model, config.trainable, config.lora_r)
    trained = sum(p.numel() for p in trainable.trained_parameters(job.model).values())
    if new and is_main():
        run.create(config, trained, files)
    progress.keep(run.folder / "run.log")
    return job, prompts, tests


def optimize(config: TrainConfig, run: Run, job: Job, prompts: list[EncodedPrompt]) -> None:
    """Adam on the method's loss, one step a pseudo-batch, from the last checkpoint on."""
    accelerator, model = job.accelerator, job.model
    trained = trainable.trained_parameters(model)
    optimizer = torch.optim.Adam(trained.values(), lr=config.lr)
    controller = PenaltyController(
        config.adaptation if config.method == "ABFT" else "none",
        config.penalty,
        config.proportional_factor,
        config.pid_i,
        config.pid_d,
    )
    with processes.fail_together():
        done = checkpoint.restore(run.checkpoints, trained, optimizer, controller)
    if len(set(processes.gather(done))) > 1:
        raise RunError(f"not every process sees the same checkpoints: share {run.checkpoints}")
    processes.run_on_main(run.forget_metrics_after, done)
    optimizer = accelerator.prepare_optimizer(optimizer)
    model.eval()  # dropout off: heads are judged by their attention as it is
    if config.checkpointing:
        trainable.enable_checkpointing(model)
    if config.tracker != "none":
        accelerator.init_trackers("abft-fast", config.model_dump(mode="json"))
    batches = pseudo_batches(len(prompts), config)
    first_budget = token_budget(config, run, job, prompts)
    budget = TokenBudget(first_budget, job.progress.say)
    with job.progress.bar("training", len(batches), done) as advance:
        for step, chosen in enumerate(batches[done:], start=done + 1):
            started = time.perf_counter()
            batch = [prompts[i] for i in chosen]
            part = [batch[i] for i in processes.own_share([len(prompt) for prompt in batch])]
            with processes.fail_together():
                found = budget.attempt(
                    [len(prompt) for prompt in part],
                    functools.partial(
                        backward,
                        model,
                        part,
                        config,
                        controller.penalty,
                        accelerator,
                        pseudo_batch=len(batch),
                    ),
                    optimizer.zero_grad,
                )
            processes.sum_gradients(accelerator, trained.values())
            loss, behavior, tokens = join(processes.gather((*found, budget.tokens)))
            budget.lower(tokens)
            norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
            heads = behavior.induction_heads
            check_step(config, step, loss, norm.item(), heads)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            row = {
                "step": step,
                "loss": loss,
                "penalty": controller.penalty,
                "induction_heads": heads,
                "correct_share_above_chance": behavior.correct_share_above_chance,
                "gradient_norm": norm.item(),
                "learning_rate": config.lr,
                "tokens_per_second": sum(map(len, batch)) / seconds,
                "peak_memory_bytes": max(processes.gather(peak_memory(accelerator.device))),
                "seconds": seconds,
            }
            controller.update(heads)
            with processes.fail_together():
                if is_main():
                    if budget.tokens != first_budget:
                        run.record_token_budget(budget.tokens)
                    run.append_metrics(row)
                    accelerator.log({k: v for k, v in row.items() if v is not None}, step=step)
                    due = step % config.save_steps == 0 or step == len(batches)
                    if due and not config.no_save:
                        checkpoint.save(run.checkpoints, step, trained, optimizer, controller)
            advance(1, f"loss {row['loss']:.3f}, {heads:.1f} induction heads")


def backward(
    model: nn.Module,
    batch: list[EncodedPrompt],
    config: TrainConfig,
    penalty: float,
    accelerator: Accelerator,
    tokens: int,
    pseudo_batch: int | None = None,
) -> tuple[float, BehaviorMean]:
    """Accumulate the gradient of a pseudo-batch's mean loss; the same however it is split.

    Args:
        pseudo_batch: prompts of the whole, where `batch` is one process's part of it.
    """
    loss, behavior = torch.zeros((), device=accelerator.device), BehaviorMean()
    for micro in micro_batches([len(p) for p in batch], tokens):
        prompts = [batch[i] for i in micro]
        packed = pack(prompts).to(accelerator.device)
        with accelerator.autocast():
            result = method_loss(model, prompts, packed, config, penalty)
        share = result.loss * (len(micro) / (pseudo_batch or len(batch)))
        accelerator.backward(share)
        loss += share.detach().to(loss.device)
        behavior.add(result, packed)
    return loss.item(), behavior


def join(parts: list[tuple[float, BehaviorMean, int]]) -> tuple[float, Behavior, int]:
    """Loss, behavior and token budget of a step from those of the processes."""
    losses, behaviors, budgets = zip(*parts, strict=True)
    everyone = BehaviorMean()
    for behavior in behaviors:
        everyone.join(behavior)
    return sum(losses), everyone.result(), min(budgets)


def token_budget(config: TrainConfig, run: Run, job: Job, prompts: list[EncodedPrompt]) -> int:
    """The budget asked for, or the one found for this run, once; the least of all processes."""
    known = processes.from_main(run.token_budget)
    if known is not None:
        return known
    if config.token_budget != "auto":
        return config.token_budget
    lengths = [len(prompt) for prompt in prompts]
    if job.accelerator.device.type != "cuda":
        planned = CPU_TOKENS if job.most_tokens is None else max(job.most_tokens, *lengths)
        tokens = min(CPU_TOKENS, *processes.gather(planned))
        if tokens < CPU_TOKENS:  # free memory may be another when the run is resumed
            processes.run_on_main(run.record_token_budget, tokens)
        return tokens
    most = sum(sorted(lengths)[-config.pseudo_batch_size :])

    def forward_and_backward(indices: list[int]) -> None:
        try:
            batch = [prompts[i] for i in indices]
            backward(job.model, batch, config, config.penalty, job.accelerator, most)
        finally:
            job.model.zero_grad(set_to_none=True)

    with processes.fail_together():
        found = find_token_budget(lengths, forward_and_backward, most)
    found = min(processes.gather(found))
    processes.run_on_main(run.record_token_budget, found)
    job.progress.say(f"token budget: {found} a batch")
    return found


def check_step(config: TrainConfig, step: int, loss: float, norm: float, heads: float) -> None:
    """Stop a run that would go wrong silently.

    Raises:
        RunError: loss or gradient is not finite; at step 1, no induction heads or no gradient.
    """
    finite = math.isfinite(loss) and math.isfinite(norm)
    if step == 1 and not finite:
        raise RunError(
            f"step 1: loss {loss}, gradient norm {norm}: not finite before anything is learnt: the "
            "model's files are damaged (download them again), or use another --mixed-precision"
        )
    if not finite:
        raise RunError(
            f"step {step}: loss {loss}, gradient norm {norm}: not finite; lower --lr "
            f"(now {config.lr:g}) or use another --mixed-precision"
        )
    if step == 1 and heads == 0 and config.head_filter and config.method == "ABFT":
        raise RunError(
            "no induction head in the first pseudo-batch, so the loss is 0: try "
            "--no-head-filter, more demonstrations (--k), or another model"
        )
    if step == 1 and norm == 0:
        raise RunError("the gradient is 0 at step 1: nothing would be learnt")


def pseudo_batches(prompts: int, config: TrainConfig) -> list[list[int]]:
    """Indices of each optimizer step's prompts; every epoch is a new permutation."""
    order: list[int] = []
    for epoch in range(config.epochs):
        indices = list(range(prompts))
        random.Random(f"{config.seed}-{epoch}").shuffle(indices)
        order += indices
    size = config.pseudo_batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def save_result(config: TrainConfig, run: Run, model: nn.Module) -> None:
    """Write `adapter/`, which plain PEFT loads, or `model/`, which plain transformers loads."""
    name = "adapter" if config.trainable == "lora" else "model"
    if config.no_save or (run.folder / name).exists():
        return
    with atomic_folder(run.folder / name) as temporary:
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's card to be filled in
        if name == "model":
            loading.read_tokenizer(config.model).save_pretrained(temporary)
