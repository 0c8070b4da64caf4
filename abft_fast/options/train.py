"""Options of `abft-fast train` and `plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from abft_fast.builtin import BUILTIN_LEARNING_RATES
from abft_fast.data.tables import place_to_save
from abft_fast.options.base import Layers, flag, layer_numbers, name_or_count
from abft_fast.options.methods import METHODS, Trainable
from abft_fast.options.training_data import TrainingDataOptions, spelled_method
from abft_fast.options.without_effect import TRAINING, Rule

_PAPER_LEARNING_RATES = {"lora": 1e-4, "full": 2e-5, "model": 1e-5}


def default_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `trainable` and `lr`, where none is given, from the method and the model.

    A value that is given but invalid is left to its own check; what depends on it is as for LoRA.
    """
    trainable, rate = given.get("trainable"), given.get("lr")
    method = METHODS.get(str(spelled_method(given.get("method", "ABFT"))))
    if trainable is None and (method is None or not method.trains_whole_model):
        trainable = "lora" if _lora_is_meant(given) else "full"
    if trainable is None:
        trainable = "model"
    if rate is None:
        builtin = given.get("model", "builtin") == "builtin"
        rates = BUILTIN_LEARNING_RATES if builtin else _PAPER_LEARNING_RATES
        rate = rates.get(str(trainable), rates["lora"])
    return {"trainable": trainable, "lr": rate}


def _lora_is_meant(given: Mapping[str, Any]) -> bool:
    """Return whether W_Q and W_K cannot be trained themselves, or LoRA's rank is given.

    The paper trains W_Q and W_K of models that it does not quantize, LoRA of those it does
    (section 4.1). The built-in model's learning rates and results are of LoRA.
    """
    model = str(given.get("model", "builtin"))
    if model == "builtin" or given.get("quantized") or given.get("lora_r") is not None:
        return True
    from huggingface_hub import try_to_load_from_cache  # takes 0.2 s

    config = Path(model) / "config.json"
    try:
        if not config.is_file():
            config = Path(str(try_to_load_from_cache(model, "config.json")))
        return "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not downloaded, or a mistake that is named when it is read
        return False


def default_adaptation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `adaptation: none` where ABFT has no filter or no penalty, unless it is given.

    The paper switches the control off in both ablations (Table 4). The objective `share` has no
    penalty either.
    """
    method = METHODS.get(str(spelled_method(given.get("method", "ABFT"))))
    is_ablation = given.get("head_filter", True) is False or _is_zero(given.get("penalty"))
    has_no_control = is_ablation or given.get("objective") == "share"
    if "adaptation" in given or method is None or not (method.uses_penalty and has_no_control):
        return {}
    return {"adaptation": "none"}


def _is_zero(value: Any) -> bool:
    try:
        return float(value) == 0
    except (TypeError, ValueError):
        return False


class TrainConfig(TrainingDataOptions):
    """Options of `abft-fast train`; the defaults are the paper's (section 4.1)."""

    _rules_of_effect: ClassVar[tuple[Rule, ...]] = TRAINING

    epochs: int = Field(2, ge=1, description="Passes over the training prompts.")
    pseudo_batch_size: int = Field(
        32, ge=1, description="Prompts that one optimizer step averages."
    )
    lr: float = Field(
        None,  # replaced by `default_training`
        validate_default=True,
        gt=0,
        le=1e30,  # above it Adam's own step overflows
        allow_inf_nan=False,
        description="Adam's learning rate. Unset: 1e-4 for LoRA, 2e-5 for full W_Q/W_K, 1e-5 "
        "for the whole model; the built-in model has rates of its own.",
    )
    gradient: str | int = Field(
        "full",
        description="How far back the loss of a layer trains, in ABFT. full: all earlier layers "
        "too. local: this layer only. A number N: its block of N layers.",
    )
    stream: bool = Field(
        False,
        description="Train block by block: each block of layers takes all steps before the next "
        "is read, so that one block's weights are in memory, and are read once a run. Needs "
        "--gradient local or a number. --save-steps counts blocks, and with --pipeline training "
        "steps. The penalty is controlled for each block by its own heads (ours), or not with "
        "--adaptation none.",
    )
    pipeline: bool = Field(
        False,
        description="With --stream, under a launcher: each process holds some of the blocks for "
        "the whole run, takes the hidden states of a step from the process before it, and hands "
        "them on. The result is that of one process.",
    )
    pipeline_size: int | None = Field(
        None,
        ge=2,
        description="With --pipeline: processes of a pipeline. Unset: all that run. If more run, "
        "several pipelines share the prompts of every step.",
    )
    stream_states: Literal["memory", "disk"] = Field(
        "memory",
        description="Where --stream keeps the hidden states of all prompts between blocks. disk: "
        "in files in the run's folder; on a CPU freed memory then goes back to the system at once, "
        "which takes less memory and more time.",
    )
    trainable: Trainable = Field(
        None,  # replaced by `default_training`
        validate_default=True,
        description="What is trained. lora: LoRA on W_Q and W_K. full: W_Q and W_K themselves, "
        "in float32. model: every weight, in float32. Unset: full for ABFT and E2E, lora if the "
        "model is quantized or built in or --lora-r is given, model for MetaICL and PICL.",
    )
    layers: Layers = Field(
        None,
        description="Layers whose W_Q and W_K are trained, counted from 0: a layer, a range such "
        "as 10-20, or several by commas. The loss is still that of all layers. Unset: all. Plans "
        "of memory count all layers.",
    )
    lora_r: int = Field(16, ge=1, description="Rank of LoRA.")
    train_head: bool = Field(
        False,
        description="E2E: train the LM head too, in float32, as in the paper's Table 2. A head "
        "that shares the embedding's weight gets one of its own.",
    )
    objective: Literal["mass", "share"] = Field(
        "mass",
        description="The loss of a head, in ABFT. mass: equation 1 of the paper. share (ours): 1 "
        "- C / S, C the attention on right labels and S that on all labels, so that attention on "
        "all labels together changes nothing; --hold takes the place of --adaptation.",
    )
    hold: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="With --objective share: weight of the term hold * (n_t / n_1 - 1) * ln S of "
        "each head's loss, which keeps the number n_t of induction heads at step t near n_1. 0 "
        "leaves it out.",
    )
    penalty: float = Field(
        0.5,
        ge=0,
        allow_inf_nan=False,
        description="A, the factor of the loss on attention to wrong labels, at the start.",
    )
    reward: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="B, the factor of the loss on attention missing from right labels.",
    )
    adaptation: Literal["pid", "p", "none"] = Field(
        "pid",
        description="How the number of induction heads controls the penalty (paper, A.3). Unset "
        "with --no-head-filter, --penalty 0 or --objective share: none.",
    )
    p_factor: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Factor of the control with --adaptation p. Unset: the value of --pid-p.",
    )
    pid_p: float = Field(
        0.03, allow_inf_nan=False, description="Factor C_p of the penalty's control."
    )
    pid_i: float = Field(
        0.005, allow_inf_nan=False, description="Factor C_i of the penalty's control."
    )
    pid_d: float = Field(
        0.005, allow_inf_nan=False, description="Factor C_d of the penalty's control."
    )
    head_filter: bool = Field(
        True,
        description="Compute the loss on induction heads only; without the filter, on every head.",
    )
    checkpointing: bool = Field(
        False,
        description="Recompute layers in the backward pass instead of keeping them in memory.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the training prompts, their order and LoRA's initial weights.",
    )
    mauve_test: bool = Field(
        False,
        description="Score with MAUVE how close texts written after training are to texts "
        "written before.",
    )
    mauve_prefix: Path | None = Field(
        None,
        description="File of beginnings of the texts that MAUVE compares, one a line. Unset: "
        "the first words of the dataset's test texts.",
    )
    mauve_model: str | None = Field(
        None, description="Model whose hidden states MAUVE compares. Unset: the untrained model."
    )
    save_steps: int = Field(8, ge=1, description="Steps between checkpoints.")
    no_eval: bool = Field(False, description="Skip the evaluations before and after training.")
    no_eval_before: bool = Field(False, description="Skip the evaluation before training.")
    no_eval_after: bool = Field(False, description="Skip the evaluation after training.")
    no_save: bool = Field(
        False, description="Save no adapter and no checkpoint; a killed run must start again."
    )
    no_report: bool = Field(
        False, description="Write no report.html into the run folder; see `abft-fast report`."
    )
    tracker: Literal["none", "wandb", "tensorboard"] = Field(
        "none", description="Also log to this tracker, by accelerate."
    )
    force: bool = Field(
        False,
        exclude=True,
        description="Run even if the plan of memory says that the run does not fit.",
    )
    output_dir: Path | None = Field(
        None, exclude=True, description="Folder of the run. Unset: runs/<time>-<model>-<dataset>."
    )
    overwrite: bool = Field(
        False, exclude=True, description="Replace the content of an existing output folder."
    )
    resume: Path | None = Field(
        None, exclude=True, description="Continue the run in this folder with its own options."
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return given | default_training(given) | default_adaptation(given)

    @field_validator("gradient", mode="before")
    @classmethod
    def _check_gradient(cls, value: Any) -> str | int:
        return name_or_count(value, ("full", "local"), "full, local or a number of layers from 1")

    @field_validator("adaptation", mode="before")
    @classmethod
    def _check_adaptation(cls, value: Any) -> Any:
        return "none" if value is None else str(value).lower()

    @field_serializer("mauve_prefix", when_used="json")
    def _save_absolute_prefix_path(self, value: Path | None) -> str | None:
        return None if value is None else place_to_save(value)

    @model_validator(mode="after")
    def _check_trainable(self) -> Self:
        if self.quantized and self.trainable != "lora":
            raise ValueError(
                f"--trainable {self.trainable} needs float weights: drop --quantized, or use "
                "--trainable lora"
            )
        if self.layers is not None and self.trainable == "model":
            raise ValueError(
                "--layers works with --trainable lora and full: --trainable model trains every "
                "weight"
            )
        if self.train_head and self.method != "E2E":
            raise ValueError(f"--train-head works with --method E2E, not {self.method}")
        if self.gradient != "full" and not METHODS[self.method].gradient_can_be_local:
            raise ValueError(
                f"--gradient {self.gradient} works with ABFT only: the loss of {self.method} is at "
                "the model's output, so use --gradient full"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        is_share = self.objective == "share" and METHODS[self.method].uses_penalty
        if is_share and self.adaptation != "none":
            raise ValueError(
                f"--adaptation {self.adaptation} controls the penalty, and --objective share has "
                "none: leave --adaptation out (--hold keeps the number of induction heads)"
            )
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.pipeline_size is not None and not self.pipeline:
            raise ValueError("--pipeline-size needs --pipeline")
        if not self.stream:
            if self.stream_states != "memory":
                raise ValueError(f"--stream-states {self.stream_states} needs --stream")
            if self.pipeline:
                raise ValueError("--pipeline needs --stream")
            return self
        if self.pipeline and self.stream_states != "memory":
            raise ValueError(
                f"--pipeline and --stream-states {self.stream_states}: a process keeps one step's "
                "hidden states at a time, so leave --stream-states out"
            )
        if self.gradient == "full":
            raise ValueError(
                "--stream trains one block of layers after the other, and with --gradient full a "
                "layer's loss trains all earlier layers: use --gradient local or a number of layers"
            )
        reasons = {
            "--checkpointing": (self.checkpointing, "computes layers again in the backward"),
            "--mauve-test": (self.mauve_test, "writes texts token by token"),
            "--device-map auto": (self.device_map == "auto", "keeps all layers on GPUs"),
            "--layers": (self.layers is not None, "leaves layers without training"),
            "--trainable model": (self.trainable == "model", "trains what is outside the layers"),
        }
        for option, (given, why) in reasons.items():
            if given:
                raise ValueError(f"--stream and {option}, which {why}: leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_mauve(self) -> Self:
        for name in ("mauve_prefix", "mauve_model"):
            if getattr(self, name) is not None and not self.mauve_test:
                raise ValueError(
                    f"{flag(name)} works with --mauve-test only: add --mauve-test, or leave "
                    f"{flag(name)} out"
                )
        return self

    @property
    def layer_indices(self) -> list[int] | None:
        """Return the layers that are trained, in order; None for all."""
        return None if self.layers is None else sorted(layer_numbers(self.layers))

    @property
    def proportional_factor(self) -> float:
        """Return the factor C_p of the number of induction heads in the control of the penalty."""
        own = self.p_factor if self.adaptation == "p" else None
        return self.pid_p if own is None else own

    @property
    def needs_label_rows_only(self) -> bool:
        """Return whether the run needs only the LM head's rows of label words.

        A loss at the output, written text and a saved model need the other rows, too.
        """
        return (
            self.trainable != "model"
            and not METHODS[self.method].loss_at_output
            and not self.mauve_test
        )

    @property
    def without_effect(self) -> list[str]:
        """Return a line for each option that does nothing, or controls what is not there."""
        lines = super().without_effect
        if self.adaptation != "none" and METHODS[self.method].uses_penalty:
            controlled = f"--adaptation {self.adaptation}"
            if not self.head_filter:
                lines.append(
                    f"{controlled} follows the number of induction heads, but --no-head-filter "
                    "trains all heads: pass --adaptation none for the paper's ablation"
                )
            if self.penalty == 0:
                lines.append(
                    f"{controlled} raises the penalty from --penalty 0: pass --adaptation none to "
                    "train without a penalty"
                )
        return lines

    @property
    def sides(self) -> tuple[str, ...]:
        """Return when the run evaluates: `before`, `after`, both, or never."""
        skipped = {"before": self.no_eval_before, "after": self.no_eval_after}
        return tuple(when for when, skip in skipped.items() if not (skip or self.no_eval))


class PlanConfig(TrainConfig):
    """Options of `abft-fast plan`: the options of `train`, and the machine to plan for."""

    gpu_memory: float | None = Field(
        None,
        gt=1,  # is left to CUDA
        allow_inf_nan=False,
        description="Memory of the GPU to plan for, in GB (10^9 bytes). Unset: what is free on "
        "this machine.",
    )
    disk_bandwidth: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="With --stream: GB (10^9 bytes) a second that are read from the disk.",
    )
    bus_bandwidth: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="With --stream: GB a second that are copied from the host to the GPU.",
    )
    operations: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="With --stream: 10^12 floating-point operations a second of the device.",
    )

    processes: int = Field(
        1,
        ge=1,
        description="With --pipeline: how many processes the launcher will start, each on a GPU of "
        "its own.",
    )

    @model_validator(mode="after")
    def _check_machine(self) -> Self:
        if self.pipeline != (self.processes > 1):
            raise ValueError("--pipeline and --processes, at least 2, belong together: give both")
        for name in ("disk_bandwidth", "bus_bandwidth", "operations"):
            if getattr(self, name) is not None and not self.stream:
                raise ValueError(f"{flag(name)} works with --stream only: add --stream")
        return self
