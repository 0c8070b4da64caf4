"""Train: evaluate a model, optimize it, evaluate it again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel

from abft_fast.commands import mauve
from abft_fast.commands.evaluate import (
    as_details,
    keep_rows_of_labels,
    prepare_tests,
    run_tests,
)
from abft_fast.commands.report import report_of_training
from abft_fast.commands.session import Session, check_same_data
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import FailedApart, Interrupted, UserError
from abft_fast.evaluation.details import describe_test, some_prompts
from abft_fast.evaluation.evaluation_set import EvaluationSet, Outcome
from abft_fast.evaluation.last_rows import mean_last_row
from abft_fast.memory.plan import available_memory, make_plan, what_to_change
from abft_fast.memory.simulation import CannotCount
from abft_fast.memory.types import Flow, StaticMemory, StepMemory
from abft_fast.models import gguf, loading, trainable
from abft_fast.models.base_identity import compare_bases, describe_base
from abft_fast.models.preflight import check_gradients
from abft_fast.options import TrainConfig, datasets
from abft_fast.options.methods import METHODS
from abft_fast.runtime import processes
from abft_fast.runtime.environment import describe, uses_cpu
from abft_fast.runtime.files import atomic_folder
from abft_fast.runtime.freed_memory import KEPT_BY_MALLOC, give_back_at_once
from abft_fast.runtime.launch import is_main
from abft_fast.runtime.progress import Progress
from abft_fast.training.loop import Training, optimize
from abft_fast.training.methods import TRAINING_METHODS, training_prompts
from abft_fast.training.run_folder import RunFolder

_MANY_UNSEEN = 0.2
"""Share of training prompts without a right label from which on the user is told."""


def train(config: TrainConfig, run: RunFolder, progress: Progress) -> RunFolder:
    """Start a run, or continue the one that `config.resume` names.

    Args:
        config: the run's options.
        run: its folder, by `RunFolder.reserve` or `RunFolder.open`.
        progress: prints messages and bars.

    Returns:
        The run's folder: the main process's, as a reserved name contains the time.

    Raises:
        UserError: an option, the data or the model does not allow the run; nothing is written.
        RunError: training cannot continue.
        Interrupted: the user stopped a run that can be continued.
    """
    with processes.running(uses_cpu(config.device)):
        run = RunFolder(processes.from_main(run.folder))
        try:
            if config.stream:
                from abft_fast.commands.streamed.run import train_streamed  # it uses this module

                train_streamed(config, run, progress)
            else:
                _train(config, run, progress)
            if not config.no_report:
                processes.run_on_main(report_of_training, run.folder, progress.say)
        except KeyboardInterrupt:
            is_own = config.resume is not None or run.is_created  # else --overwrite has not begun
            if config.no_save or not is_own:
                raise
            line = f"interrupted; continue with `{run.resume_command(config)}`"
            raise Interrupted(line) from None
        except (UserError, FailedApart) as error:  # also of weights read after the folder was made
            if isinstance(error, UserError) or isinstance(error.error, UserError):
                run.discard()
            raise
        finally:
            run.release()
    return run


def _train(config: TrainConfig, run: RunFolder, progress: Progress) -> None:
    """Do what the run has not done yet; see `train`."""
    check_same_data(config)
    with processes.fail_together():
        session, prompts, tests = set_up(config, run, progress)

    def evaluate_once(side: str) -> None:
        if side in config.sides and processes.from_main(side not in run.evaluation):
            metrics, attention, outcomes = run_tests(session, tests, f"evaluating {side}")

            def record() -> None:
                details = as_details(outcomes, functools.partial(details_of, session))
                run.record_evaluation(side, metrics, attention, details)

            processes.run_on_main(record)

    evaluate_once("before")
    if config.mauve_test:
        processes.run_on_main(mauve.record_texts, config, run, session, "before")
        processes.run_on_main(mauve.record_texts, config, run, session, "before-again")
    optimize(to_train(session, run, prompts))
    processes.run_on_main(save_result, config, run, session.model)
    evaluate_once("after")
    if config.mauve_test:
        processes.run_on_main(mauve.record_texts, config, run, session, "after")
        processes.run_on_main(mauve.score_texts, config, run, session)
    session.accelerator.end_training()


def set_up(
    config: TrainConfig, run: RunFolder, progress: Progress
) -> tuple[TrainSession, list[EncodedPrompt], list[EvaluationSet]]:
    """Prepare everything that precedes the first evaluation, and make a new run's folder.

    Returns:
        The session with its model loaded, the training prompts, and the tests.

    Raises:
        UserError: as `train`.
    """
    is_new = config.resume is None
    session, prompts, tests = prepare_data(config, run, progress)
    session.check_memory(prompts)
    session.load()
    base = describe_base(session.model, config.model)
    if run.base is not None and not is_new:
        for line in compare_bases(run.base, base, f"run {run.folder}"):
            progress.say(line)
    session.check_attention(prompts)
    if config.trainable == "lora":
        check_gradients(session.model)
    if config.needs_label_rows_only:
        keep_rows_of_labels(session, tests)
    set_seed(config.seed)
    session.model = trainable.set_trained(
        session.model, config.trainable, config.lora_r, config.train_head, config.layer_indices
    )
    trained = sum(p.numel() for p in trainable.trained_parameters(session.model).values())
    begin(session, run, trained, base)
    return session, prompts, tests


def prepare_data(
    config: TrainConfig, run: RunFolder, progress: Progress
) -> tuple[TrainSession, list[EncodedPrompt], list[EvaluationSet]]:
    """Check and tokenize all data of a run; hold the folder of a run that goes on.

    Returns:
        The session without its model, the training prompts, and the tests.

    Raises:
        UserError: an option or the data do not allow the run.
    """
    is_new = config.resume is None
    if not is_new and is_main():
        run.hold(progress.say)
    set_seed(config.seed)
    files = datasets.file_hashes(config)
    session = TrainSession(config, progress, run.folder)
    session.files = files
    if not is_new and is_main():
        run.check_data(files)
    for line in config.without_effect:
        progress.say(line)
    if config.objective == "share" and METHODS[config.method].uses_penalty:
        progress.say(
            "--objective share has no penalty to control, so --adaptation is none; the factor of "
            f"ln S is {config.hold:g} times the relative change of induction heads since step 1"
        )
    prompts = session.encode_training()
    tests = prepare_tests(session) if config.sides else []
    session.show_data(prompts, *(test.prompts for test in tests[:1]))
    session.say_unseen(prompts)
    if config.mauve_test:
        mauve.check(config, session.dataset)
    tested = sum(len(encoded.prompts) for test in tests for encoded in test.encoded)
    progress.say(
        f"on {session.accelerator.device.type}: {len(prompts):,} prompts to train on, "
        f"{tested:,} to test on"
    )
    return session, prompts, tests


def begin(session: TrainSession, run: RunFolder, trained: int, base: Mapping[str, Any]) -> None:
    """Make a new run's folder; keep all messages in its log.

    Args:
        session: the run's session.
        run: the folder.
        trained: number of trained parameters.
        base: what the run trains, by `base_identity`.
    """
    config, progress = session.config, session.progress
    if config.resume is None and is_main():
        run.hold(progress.say)
        environment = {**describe(), **gguf.identity(config.model), "base": base}
        run.create(config, trained, session.files, environment)
    progress.keep(run.folder / "run.log")


class TrainSession(Session):
    """Add training prompts and the plan of memory to a session.

    Attributes:
        planned_tokens: tokens that fit at once, after `check_memory`; None without a plan.
        files: SHA-256 of the user's own data files, by path.
    """

    config: TrainConfig
    files: Mapping[str, str]
    planned_tokens: int | None = None

    def encode_training(self) -> list[EncodedPrompt]:
        """Return the training prompts of the method; say how many were too long."""
        encoded = training_prompts(self.config, self.dataset, self.encoder)
        if self.config.training_labels == "symbols":
            size = len(self.encoder.symbols.training)
            self.progress.say(f"label words of training prompts are drawn from {size:,} words")
        self.say_too_long(encoded, "training", TRAINING_METHODS[self.config.method].shortened)
        return encoded.prompts

    def say_unseen(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Say how many training prompts have nothing right to attend to, if these are many."""
        unseen = sum(not any(prompt.label_is_correct) for prompt in prompts)
        total = len(prompts)
        is_mass = METHODS[self.config.method].uses_penalty and self.config.objective == "mass"
        if is_mass and unseen > _MANY_UNSEEN * total:
            self.progress.say(
                f"{unseen / total:.0%} of the training prompts have no demonstration with the "
                "query's label, and only teach heads to attend to no label: --seen-labels-only "
                "replaces them"
            )

    def check_memory(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Say how much memory training takes; refuse what cannot fit, before weights are read.

        Raises:
            UserError: not even the longest prompt fits, and `--force` is not given.
        """
        config = self.config
        longest = max(map(len, prompts))
        flow = Flow(config.gradient, config.checkpointing)
        room = available_memory(self.accelerator.device, all_gpus=self.placement is not None)
        model = (self.shape, config, self.arithmetic)
        try:
            plan = make_plan(*model, [flow], longest, room)
            advice = "" if plan.fits(flow) else what_to_change(*model, longest, room)
        except CannotCount as error:
            self.progress.say(f"no plan of memory: {error}")
            return
        self.progress.say(
            f"plan: weights and optimizer {plan.static.total / 1e9:.2f} GB, "
            f"{plan.steps[flow].at(longest) / 1e9:.2f} GB for the longest prompt ({longest} "
            f"tokens); {plan.most_tokens(flow):,} tokens at once fit in {room / 1e9:.1f} GB"
        )
        self.planned_tokens = plan.most_tokens(flow)
        if not plan.fits(flow) and not config.force:
            raise UserError(
                f"{config.model} with {flow.options} does not fit in {room / 1e9:.1f} GB: "
                f"{advice}, or pass --force"
            )
        if self.accelerator.device.type == "cpu":
            self._spare_memory(plan.static, plan.steps[flow], prompts, room)

    def _spare_memory(
        self,
        static: StaticMemory,
        step: StepMemory,
        prompts: Sequence[EncodedPrompt],
        room: int,
    ) -> None:
        """Give freed memory back at once, if a step would not fit with the gaps of malloc."""
        pseudo_batch = sum(sorted(map(len, prompts))[-self.config.pseudo_batch_size :])
        tokens = min(self.token_budget, pseudo_batch)
        is_short = static.total + KEPT_BY_MALLOC * step.at(tokens) > room
        if is_short and give_back_at_once():
            self.progress.say(
                "memory is short: freed memory goes back to the system at once, which makes steps "
                "slower"
            )


def details_of(session: TrainSession, test: EvaluationSet, outcome: Outcome) -> dict[str, Any]:
    """Return what a report shows of a test beyond its metrics; it runs ten prompts again."""
    session.model.eval()
    row = functools.partial(
        mean_last_row,
        session.model,
        autocast=session.accelerator.autocast,
        attention=session.config.attention_backend,
    )
    return describe_test(test, outcome, some_prompts(test, session.encoder.tokenizer, row))


def to_train(
    session: TrainSession,
    run: RunFolder,
    prompts: list[EncodedPrompt],
    model: PreTrainedModel | None = None,
) -> Training:
    """Return what the training loop takes; `model` is the session's where none is given."""
    return Training(
        config=session.config,
        run=run,
        model=session.model if model is None else model,
        prompts=prompts,
        accelerator=session.accelerator,
        progress=session.progress,
        planned_tokens=session.planned_tokens,
    )


def save_result(config: TrainConfig, run: RunFolder, model: PreTrainedModel) -> None:
    """Write `adapter/`, which plain PEFT loads, or `model/`, which plain transformers loads."""
    name = "model" if config.trainable == "model" else "adapter"
    if config.no_save or run.artifact.is_dir():
        return
    with atomic_folder(run.folder / name) as temporary:
        if name == "adapter":
            trainable.save_adapter(model, temporary, run.base)
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
        else:
            model.save_pretrained(temporary)
            loading.save_tokenizer(config.model, temporary)
