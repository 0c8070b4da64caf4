"""What training and evaluation share: data, prompts and a model, on a device."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from abft_fast import data
from abft_fast.commands.data_report import show_data
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.evaluation import inference
from abft_fast.evaluation.evaluation_set import EvaluationSet
from abft_fast.memory.plan import Arithmetic, Flow, make_plan, memory_to_be_had, what_to_change
from abft_fast.memory.simulation import CannotCount
from abft_fast.models import loading
from abft_fast.models.device_map import over_all_gpus, refuse_offloaded
from abft_fast.models.preflight import check_attention
from abft_fast.options import EvalConfig, PredictConfig, TrainConfig, datasets
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.runtime import processes
from abft_fast.runtime.environment import uses_cpu
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import CPU_TOKENS
from abft_fast.training.training_data import training_prompts

_FEWER = "with fewer demonstrations"


class ModelOnDevice:
    """A model by its options, and where and how it is computed; its weights come with `load`."""

    def __init__(
        self,
        config: TrainConfig | EvalConfig | PredictConfig,
        progress: Progress,
        tracker_folder: Path | None = None,
    ):
        self.config, self.progress = config, progress
        self.accelerator = make_accelerator(config, tracker_folder)
        device = self.accelerator.device
        self.placement = over_all_gpus(device) if config.device_map == "auto" else None
        self.arithmetic = Arithmetic(device.type, self.accelerator.mixed_precision == "bf16")
        self.shape = loading.read_config(config.model)

    def load(self) -> None:
        """Get the model; what is wrong with prompts or memory has been said by then."""
        self.progress.say(f"loading {self.config.model}")
        self.model = loading.load(
            self.config.model,
            self.accelerator.device,
            self.arithmetic.dtype,
            self.config.bits if self.config.quantized else None,
            self.placement,
        )
        refuse_offloaded(self.model, self.config.model)


class Job(ModelOnDevice):
    """With a dataset and its encoder: what training and evaluation share."""

    def __init__(
        self,
        config: TrainConfig | EvalConfig,
        progress: Progress,
        tracker_folder: Path | None = None,
    ):
        super().__init__(config, progress, tracker_folder)
        self.dataset = datasets.by_options(config)
        self.encoder = PromptEncoder.by_options(
            config,
            loading.read_tokenizer(config.model),
            self.dataset,
            loading.context_length(self.shape),
        )
        self.most_tokens: int | None = None  # at once, by the plan

    def encode_training(self) -> list[EncodedPrompt]:
        """The training prompts of the method."""
        encoded = training_prompts(self.config, self.dataset, self.encoder)
        cut = "cut to their end" if self.config.method == "PICL" else _FEWER
        self._say_too_long(encoded, "training", cut)
        return encoded.prompts

    def _say_too_long(self, encoded: EncodedPrompts, what: str, cut: str = _FEWER) -> None:
        if encoded.dropped or encoded.shortened:
            self.progress.say(
                f"{what} prompts beyond the model's context: {encoded.dropped} dropped, "
                f"{encoded.shortened} {cut}, of "
                f"{encoded.dropped + len(encoded.prompts)}"
            )

    def show_data(self, *parts: Sequence[EncodedPrompt]) -> None:
        """Print what the user's own data are, with the prompts made of them."""
        lengths = [len(prompt) for prompts in parts for prompt in prompts]
        show_data(self.progress, self.dataset, self.encoder, lengths)

    def check_attention(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Make sure that packed attention is the model's own, and say what it runs on."""
        self.progress.say("checking packed attention against the model's own")
        try:
            found = check_attention(
                self.model,
                prompts,
                self.accelerator.autocast,
                self.config.attention_backend,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        for (name, backend), reasons in found.items():
            self.progress.say(f"attention: {name}, its loss: {backend}")
            if name == "separate":
                self.progress.say(f"one prompt at a time, keys read twice: {reasons}")

    def evaluation_sets(self) -> list[EvaluationSet]:
        """What the options want the model tested on, its prompts tokenized.

        Raises:
            UserError: a dataset does not allow the test, or a prompt is too long.
        """
        names = [self.dataset.name]
        if self.config.generalization_test:
            names += [name for name in data.PAPER_DATASETS if name != self.dataset.name]
        tests = []
        for name in names:
            dataset, encoder = self.dataset, self.encoder
            if name != self.dataset.name:
                dataset = data.load(name)
                encoder = PromptEncoder.by_options(
                    self.config,
                    encoder.tokenizer,
                    dataset,
                    encoder.max_length,
                )
            test = EvaluationSet(self.config, dataset, encoder)
            for encoded in test.encoded:
                self._say_too_long(encoded, f"{name}: test")
            tests.append(test)
        return tests

    def keep_label_rows(self, tests: Sequence[EvaluationSet]) -> None:
        """Free the rows of the LM head that are of no label word."""
        wanted = set(self.encoder.label_ids).union(*(test.label_ids for test in tests))
        keep_label_rows(self.model, sorted(wanted))

    def evaluate(self, tests: Sequence[EvaluationSet], what: str) -> tuple[dict, dict]:
        """Test the model as it is.

        Returns:
            Metrics by dataset, and attention behavior by dataset.
        """
        metrics, attention = {}, {}
        for test in tests:
            own = sum(len(processes.own_share(list(map(len, e.prompts)))) for e in test.encoded)
            label = what if len(tests) == 1 else f"{what}, {test.dataset}"
            with self.progress.bar(label, own) as advance:

                def predict(encoded: EncodedPrompts, behavior: bool, advance=advance):
                    return inference.predict_labels(
                        self.model,
                        encoded,
                        CPU_TOKENS
                        if self.config.token_budget == "auto"
                        else self.config.token_budget,
                        advance,
                        self.accelerator.autocast,
                        self.config.attention_backend,
                        behavior,
                    )

                found, behavior = test.run(predict)
            metrics[test.dataset] = found
            attention[test.dataset] = dataclasses.asdict(behavior)
        return metrics, attention

    def check_memory(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Say what memory training will take; refuse what cannot fit, before weights are read.

        Raises:
            UserError: not even the longest prompt fits, and `--force` is not given.
        """
        config = self.config
        longest = max(map(len, prompts))
        flow = Flow(config.gradient, config.checkpointing)
        room = memory_to_be_had(self.accelerator.device, all_gpus=self.placement is not None)
        run = (self.shape, config, self.arithmetic)
        try:
            plan = make_plan(*run, [flow], longest, room)
            advice = "" if plan.fits(flow) else what_to_change(*run, longest, room)
        except CannotCount as error:
            self.progress.say(f"no plan of memory: {error}")
            return
        self.progress.say(
            f"plan: weights and optimizer {plan.static.total / 1e9:.2f} GB, "
            f"{plan.steps[flow].at(longest) / 1e9:.2f} GB for the longest prompt ({longest} "
            f"tokens); {plan.most_tokens(flow):,} tokens at once fit in {room / 1e9:.1f} GB"
        )
        self.most_tokens = plan.most_tokens(flow)
        if not plan.fits(flow) and not config.force:
            raise UserError(
                f"{config.model} with {flow.options} does not fit in {room / 1e9:.1f} GB: "
                f"{advice}, or --force"
            )


def check_same_data(config: TrainConfig | EvalConfig) -> None:
    """Make sure that all processes read the same data of the user's, as each makes all prompts.

    Raises:
        UserError: they do not.
    """
    with processes.fail_together():
        files = datasets.file_hashes(config)
    everyones = processes.gather(files)
    if len({tuple(found.values()) for found in everyones}) > 1:
        path = next(p for p in files if len({found.get(p) for found in everyones}) > 1)
        raise UserError(f"not every process reads the same {Path(path).name}: share the file")


def make_accelerator(
    config: TrainConfig | EvalConfig | PredictConfig, tracker_folder: Path | None = None
) -> Accelerator:
    """Device, arithmetic and trackers.

    Raises:
        UserError: a GPU is asked for and there is none, or the tracker is not installed.
    """
    cpu = uses_cpu(config.device)
    precision = config.mixed_precision
    if precision == "auto":
        precision = "no" if cpu else "bf16"
    tracker = getattr(config, "tracker", "none")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--tracker {tracker}: not installed; `pip install 'abft-fast[track]'`")
    try:
        return Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=None if tracker == "none" else tracker,
            project_dir=None if tracker_folder is None else str(tracker_folder),
        )
    except (ImportError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"--mixed-precision {precision}: {line}") from error
