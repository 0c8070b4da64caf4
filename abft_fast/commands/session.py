"""Hold what the commands share: a model on a device, and a dataset with its encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from abft_fast.commands.data_report import show_data
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.memory.types import Arithmetic
from abft_fast.models import loading
from abft_fast.models.base_identity import compare_adapter, describe_base
from abft_fast.models.device_map import over_all_gpus, refuse_offloaded
from abft_fast.models.merging import add_adapters
from abft_fast.models.preflight import check_attention, lines_on_attention
from abft_fast.models.trainable import load_adapter
from abft_fast.options import DrawnPromptOptions, Options, PlacementOptions, datasets
from abft_fast.prompts import EncodedPrompts, PromptEncoder, for_tokenizer
from abft_fast.runtime import processes
from abft_fast.runtime.environment import multiplies_bfloat16, uses_cpu
from abft_fast.runtime.freed_memory import collect_and_give_back
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import tokens_at_once


class ModelOnDevice:
    """Know a model's config, device and arithmetic; read its weights on `load`.

    Attributes:
        config: the command's options.
        progress: prints messages.
        accelerator: the device, the arithmetic and the tracker.
        placement: how the layers are split over all GPUs; None on one device.
        arithmetic: how numbers are kept.
        shape: the model's config.
        model: the model, after `load`.
    """

    config: PlacementOptions

    def __init__(
        self, config: PlacementOptions, progress: Progress, tracker_folder: Path | None = None
    ):
        self.config, self.progress = config, progress
        self.accelerator = make_accelerator(config, tracker_folder)
        device = self.accelerator.device
        self.placement = over_all_gpus(device) if config.device_map == "auto" else None
        self.arithmetic = Arithmetic(device.type, self.accelerator.mixed_precision == "bf16")
        self.shape = loading.read_config(config.model)

    @property
    def token_budget(self) -> int:
        """Return the most tokens of a packed batch, where a run does not try what fits."""
        asked = getattr(self.config, "token_budget", "auto")
        return tokens_at_once(asked, self.accelerator.device.type)

    def load(self) -> None:
        """Read the weights; prompts and memory have been checked by then."""
        self.load_as(self.arithmetic.dtype)

    def load_as(self, dtype: torch.dtype) -> None:
        """Read the weights; those that are not quantized get this dtype."""
        self.suggest_bfloat16()
        self.progress.say(f"loading {self.config.model}")
        self.model = loading.load(
            self.config.model,
            self.accelerator.device,
            dtype,
            self.config.bits if self.config.quantized else None,
            self.placement,
        )
        refuse_offloaded(self.model, self.config.model)
        for line in loading.left_out(
            self.config.model, *getattr(self.config, "adapter_folders", ())
        ):
            self.progress.say(line)

    def suggest_bfloat16(self) -> None:
        """Say what would be faster on this processor, if the user has not chosen the arithmetic."""
        is_free = self.config.mixed_precision == "auto" and self.config.model != "builtin"
        if is_free and self.arithmetic.device_type == "cpu" and multiplies_bfloat16():
            self.progress.say("--mixed-precision bf16 is faster on this processor")

    def load_adapter(self, folder: Path) -> None:
        """Put an adapter on the model, after `load`.

        Raises:
            UserError: the adapter was trained on another base, or cannot be put on the model.
        """
        base = describe_base(self.model, self.config.model)
        for line in compare_adapter(folder, base):
            self.progress.say(line)
        self.model = load_adapter(self.model, folder, self.progress.say)

    def add_adapters(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Add adapters to the model's weights, each with a coefficient.

        The model is in float32, by `load_as`.

        Raises:
            UserError: the model is quantized, or as `load_adapter`.
        """
        if getattr(self.model.config, "quantization_config", None) is not None:
            raise UserError(
                f"{self.config.model} is quantized, so nothing can be added to its weights: name "
                "one adapter without a number, or merge with `abft-fast merge` first"
            )
        base = describe_base(self.model, self.config.model)
        for folder, _ in adapters:
            for line in compare_adapter(folder, base):
                self.progress.say(line)
        self.model = add_adapters(self.model, adapters, self.progress.say)


class PromptSession(ModelOnDevice):
    """Add a dataset and its encoder: what training, evaluation and analyses share.

    Attributes:
        dataset: the dataset that `--dataset` names.
        encoder: its encoder for the model.
    """

    config: DrawnPromptOptions

    def __init__(
        self,
        config: DrawnPromptOptions,
        progress: Progress,
        tracker_folder: Path | None = None,
    ):
        super().__init__(config, progress, tracker_folder)
        tokenizer = loading.read_tokenizer(config.model)
        vocabulary = loading.vocabulary_size(self.shape)
        self.dataset = for_tokenizer(datasets.from_options(config), tokenizer, vocabulary)
        self.encoder = PromptEncoder.from_options(
            config, tokenizer, self.dataset, loading.context_length(self.shape), vocabulary
        )

    def forget_encoder(self) -> None:
        """Free the encoder with its tokenizer, once all prompts are encoded."""
        del self.encoder
        collect_and_give_back()

    def show_data(self, *parts: Sequence[EncodedPrompt]) -> None:
        """Print what the user's own data are, with the lengths of the prompts made of them."""
        lengths = [len(prompt) for prompts in parts for prompt in prompts]
        show_data(self.progress, self.dataset, self.encoder, lengths)

    def say_too_long(self, encoded: EncodedPrompts, what: str, shortened: str) -> None:
        """Say how many prompts were beyond the model's context, and what was done to them."""
        if encoded.dropped or encoded.shortened:
            total = encoded.dropped + len(encoded.prompts)
            self.progress.say(
                f"{what} prompts beyond the model's context: {encoded.dropped} dropped, "
                f"{encoded.shortened} {shortened}, of {total}"
            )

    def check_attention(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Compare packed attention with the model's own, and say which backends compute it.

        Raises:
            UserError: the two differ, or no backend supports the model here.
        """
        self.progress.say("checking packed attention against the model's own")
        attentions = check_attention(
            self.model, prompts, self.accelerator.autocast, self.config.attention_backend
        )
        for line in lines_on_attention(attentions):
            self.progress.say(line)


class Session(PromptSession):
    """Hold the options of a training run or an evaluation, too."""

    config: Options

    def __init__(self, config: Options, progress: Progress, tracker_folder: Path | None = None):
        super().__init__(config, progress, tracker_folder)


def check_same_data(config: Options) -> None:
    """Refuse processes that read different files, because each process makes all prompts.

    Raises:
        UserError: a file of the user's own data differs between processes.
    """
    with processes.fail_together():
        files = datasets.file_hashes(config)
    all_files = processes.gather(files)
    if len({tuple(hashes.values()) for hashes in all_files}) > 1:
        path = next(p for p in files if len({hashes.get(p) for hashes in all_files}) > 1)
        raise UserError(
            f"not every process reads the same {Path(path).name}: give all of them the same file"
        )


def make_accelerator(config: PlacementOptions, tracker_folder: Path | None = None) -> Accelerator:
    """Return the device, the arithmetic and the tracker that the options ask for.

    Raises:
        UserError: a GPU is requested and there is none, or the tracker is not installed.
    """
    cpu = uses_cpu(config.device)
    precision = config.mixed_precision
    if precision == "auto":
        precision = "no" if cpu else "bf16"
    tracker = getattr(config, "tracker", "none")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"--tracker {tracker} is not installed: `pip install 'abft-fast[track]'`")
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
