"""Train and evaluate in one walk through the model, which reads each weight once."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import set_seed

from abft_fast.commands.evaluate import Metrics, as_details, as_metrics
from abft_fast.commands.session import ModelOnDevice, Session, check_same_data
from abft_fast.commands.train import TrainSession, begin, prepare_data, save_result, to_train
from abft_fast.core.objective import block_size
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.evaluation.details import describe_test
from abft_fast.evaluation.evaluation_set import EvaluationSet
from abft_fast.models import loading
from abft_fast.models.base_identity import base_of_adapter
from abft_fast.options import EvalConfig, TrainConfig
from abft_fast.runtime import processes
from abft_fast.runtime.freed_memory import collect_and_give_back, give_back_at_once
from abft_fast.runtime.progress import Progress
from abft_fast.streaming.checkpoint import BLOCK, STEP, WalkCheckpoint, remove_saved_walk
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.pipeline import PipelinedWalk, size_of_pipelines
from abft_fast.streaming.stages import AttentionCheck, BaseIdentity, Evaluating, StageInTurns
from abft_fast.streaming.steps import TrainingSteps
from abft_fast.streaming.walk import Walk
from abft_fast.training.run_folder import RunFolder


def train_streamed(config: TrainConfig, run: RunFolder, progress: Progress) -> None:
    """Evaluate, train and evaluate again in one walk; see `commands.train.train`.

    Raises:
        UserError: an option, the data or the model does not allow the run; nothing is written.
        RunError: training cannot continue.
    """
    check_same_data(config)
    pipeline_size = (
        size_of_pipelines(config.pipeline_size, processes.count()) if config.pipeline else 1
    )
    with processes.fail_together():
        session, prompts, tests = prepare_data(config, run, progress)
        session.forget_encoder()
    is_done = config.resume is not None and run.artifact.is_dir()
    if processes.from_main(is_done):
        processes.run_on_main(remove_saved_walk, run.checkpoints)  # it may have ended before that
    else:
        StreamedTraining(session, run, prompts, tests, pipeline_size).run()
    collect_and_give_back()  # a report's pictures need memory, too


def evaluate_streamed(
    config: EvalConfig, session: Session, tests: list[EvaluationSet]
) -> tuple[Metrics, Metrics]:
    """Evaluate the model that the options name, with or without an adapter, in one walk.

    Returns:
        Metrics and attention behavior.

    Raises:
        UserError: the model cannot be streamed, or the adapter does not fit it.
    """
    session.forget_encoder()
    with processes.fail_together():
        streamed, walk, evaluating = _walk_of_tests(config, session, tests)
    walk.run(session.progress, "evaluating")
    say_read(session, streamed)
    return as_metrics(evaluating.outcomes())


def _walk_of_tests(
    config: EvalConfig, session: Session, tests: list[EvaluationSet]
) -> tuple[StreamedModel, Walk, Evaluating]:
    streamed = streamed_model(session)
    place = streamed, session.accelerator
    adapter = next(iter(config.adapter_folders), None)
    trained_on = None if adapter is None else base_of_adapter(adapter)
    backend = config.attention_backend
    evaluating = Evaluating(*place, tests, session.token_budget, backend, processes.count())
    stages = [
        BaseIdentity(*place, session.progress, trained_on, f"adapter {adapter}"),
        AttentionCheck(*place, tests[0].prompts, backend, session.progress),
        evaluating,
    ]
    walk = Walk(streamed, stages, size=1)
    walk.read_outside(_label_ids(tests))
    if adapter is not None:
        streamed.load_adapter(adapter, session.progress.say)
    return streamed, walk, evaluating


def streamed_model(session: ModelOnDevice) -> StreamedModel:
    """Return the model that the options name, without weights.

    Raises:
        UserError: the model cannot be streamed.
    """
    config = session.config
    session.suggest_bfloat16()
    for line in loading.left_out(config.model, *getattr(config, "adapter_folders", ())):
        session.progress.say(line)
    return StreamedModel(
        config.model,
        session.shape,
        session.accelerator.device,
        session.arithmetic.dtype,
        config.bits if config.quantized else None,
    )


def spare_memory(session: ModelOnDevice) -> None:
    """Let a walk whose hidden states are on disk hold on a CPU what its tensors take, no more."""
    if session.accelerator.device.type == "cpu" and give_back_at_once():
        session.progress.say(
            "--stream-states disk: freed memory goes back to the system at once, which makes steps "
            "slower"
        )


def _label_ids(tests: Sequence[EvaluationSet]) -> list[int]:
    return sorted({token for test in tests for token in test.label_ids})


def say_read(session: Session, streamed: StreamedModel) -> None:
    """Say how many bytes of weights were read."""
    read = sum(processes.gather(sum(streamed.weights.read_bytes.values())))
    session.progress.say(f"weights read: {read / 1e6:,.0f} MB")


class StreamedTraining:
    """A run of streamed training: its model, its stages, and its results.

    Args:
        session: the run's session.
        run: its folder.
        prompts: to train on.
        tests: the tests.
        pipeline_size: processes of a pipeline; 1 without one.

    Raises:
        UserError: the model cannot be streamed, or the disk has no room for the hidden states.
    """

    def __init__(
        self,
        session: TrainSession,
        run: RunFolder,
        prompts: list[EncodedPrompt],
        tests: list[EvaluationSet],
        pipeline_size: int = 1,
    ):
        self._session, self._run, config = session, run, session.config
        with processes.fail_together():
            self._streamed = streamed_model(session)
        training = to_train(session, run, prompts, self._streamed.model)
        place = self._streamed, session.accelerator
        base = None if config.resume is None else run.base
        self._identity = BaseIdentity(*place, session.progress, base, f"run {run.folder}")
        check = AttentionCheck(*place, prompts, config.attention_backend, session.progress)
        sharing = processes.count() // pipeline_size
        self._tests = {
            side: Evaluating(*place, tests, session.token_budget, config.attention_backend, sharing)
            for side in config.sides
        }
        self._steps = TrainingSteps(self._streamed, training)
        stages: list[StageInTurns] = [self._identity, check, self._steps]
        if "before" in self._tests:
            stages.insert(2, self._tests["before"])
        if "after" in self._tests:
            stages.append(self._tests["after"])
        self._checkpoint = None
        if not config.no_save:
            unit = STEP if pipeline_size > 1 else BLOCK
            self._checkpoint = WalkCheckpoint(run.checkpoints, config.save_steps, unit)
        size = block_size(config.gradient) or self._streamed.layers
        self._walk: Walk
        if pipeline_size > 1:
            self._walk = PipelinedWalk(
                self._streamed, stages, size, self._checkpoint, pipeline_size
            )
        else:
            states = run.checkpoints if config.stream_states == "disk" else None
            if states is not None:
                spare_memory(session)
            self._walk = Walk(self._streamed, stages, size, states, self._checkpoint)
        with processes.fail_together():
            self._walk.read_outside(_label_ids(tests))
            set_seed(config.seed)
            self._streamed.set_trained(config.trainable, config.lora_r)
        training.model = self._streamed.model

    def run(self) -> None:
        """Walk through the model, from the newest checkpoint on, and write the results.

        Raises:
            RunError: a step's loss is not finite, or nothing was learnt.
        """
        session, config = self._session, self._session.config
        with processes.fail_together():
            begin(session, self._run, self._streamed.count_trained(), self._identity.base)
        self._say_how()
        if config.tracker != "none":
            session.accelerator.init_trackers("abft-fast", config.model_dump(mode="json"))
        self._walk.run(session.progress, "block by block")
        processes.run_on_main(self._write)
        say_read(session, self._streamed)
        session.accelerator.end_training()

    def _say_how(self) -> None:
        """Say how this run differs from one that is not streamed.

        Raises:
            UserError: not every process sees the run's folder, where its blocks are written.
        """
        session, config = self._session, self._session.config
        if not all(processes.gather(self._run.is_begun)):
            raise UserError(
                f"not every process sees {self._run.folder}, where each writes what its blocks "
                "have learnt: put it on a shared disk (--output-dir)"
            )
        if config.pipeline and processes.count() == 1:
            session.progress.say(
                "--pipeline has one process, which takes one block after the other: start it with "
                "a launcher, as `torchrun --nproc_per_node 2 -m abft_fast train ...`"
            )
        if config.adaptation != "none":
            session.progress.say(
                "the penalty is controlled for each block by its own induction heads (ours, not "
                "the paper's); --adaptation none keeps it as it is"
            )

    def _write(self) -> None:
        """Write metrics, evaluations and, last, the adapter: a run with an adapter is done."""
        run, session = self._run, self._session
        run.forget_metrics_after(0)
        for row in self._steps.metrics():
            run.append_metrics(row)
            known = {name: x for name, x in row.items() if isinstance(x, int | float)}
            session.accelerator.log(known, step=row["step"])
        for side, testing in self._tests.items():
            outcomes = testing.outcomes()
            details = as_details(outcomes, describe_test)
            run.record_evaluation(side, *as_metrics(outcomes), details)
        run.record_base(self._identity.base)
        if self._checkpoint is None:
            return
        self._checkpoint.trained.put_back(self._streamed, self._walk.blocks)
        save_result(session.config, run, self._streamed.model)
        self._walk.remove_files()
        remove_saved_walk(run.checkpoints)
