"""Every option of the command line: its default, its help and its validation, once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from abft_fast import data
from abft_fast.builtin import BUILTIN_LEARNING_RATES
from abft_fast.data import tables
from abft_fast.errors import UserError

TestType = Literal[
    "Normal", "TempSensitivity", "DemoSensitivity", "GLER", "TripletBias", "UnseenLabel"
]
CalibrationType = Literal["none", "contextual", "domain", "batch"]


def _dataset(name: str) -> str:
    try:
        return data.resolve_name(str(name))
    except UserError:
        if str(name) and tables.is_table(str(name)):
            return str(name)
        raise


def _place(name: str) -> str:
    """A dataset of StaICC's by its name, a file by its absolute path."""
    return name if name in data.DATASETS else str(Path(name).resolve())


def _named_or_count(value: Any, names: tuple[str, ...], allowed: str) -> str | int:
    if value in names:
        return value
    if not isinstance(value, bool) and str(value).isdecimal() and int(value) >= 1:
        return int(value)
    raise ValueError(f"use {allowed}")


_POSITIONAL = {"positional": True}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def is_positional(field: FieldInfo) -> bool:
    """Whether an option is given without its name."""
    return field.json_schema_extra == _POSITIONAL


class CommandOptions(BaseModel):
    """What every command has; a field with exclude=True is of one call only."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    debug: bool = Field(False, exclude=True, description="Show tracebacks.")


class ModelOptions(CommandOptions):
    """Which model, and how its weights are kept."""

    model: str = Field(
        "builtin",
        description="`builtin`, a local folder, a hub id, or `synthetic:` and the name of a known "
        "shape for random weights of true size.",
    )
    quantized: bool = Field(
        False, description="Quantize the weights as they are loaded (bitsandbytes); see bits."
    )
    bits: int = Field(4, description="Of a quantized weight: 4 (NF4, double quantization) or 8.")
    config: Path | None = Field(
        None, exclude=True, description="YAML file of options; flags override it."
    )

    @model_validator(mode="after")
    def _check_quantized(self) -> Self:
        if self.bits != 4 and not self.quantized:
            raise ValueError(f"--bits {self.bits} needs --quantized")
        return self

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: int) -> int:
        if value not in (4, 8):
            raise ValueError("use 4 or 8")
        return value


class DatasetOptions(ModelOptions):
    """Which data."""

    dataset: Annotated[str, BeforeValidator(_dataset)] = Field(
        "subj",
        description=f"One of {', '.join(data.DATASETS)}; the original's index 0-7; or data of "
        f"your own: a file ({tables.FORMATS}).",
    )


class TableOptions(ModelOptions):
    """What the user's own files hold."""

    text_column: str = Field("text", description="Column of the texts, in data of your own.")
    label_column: str = Field("label", description="Column of the labels, in data of your own.")
    template: Path | None = Field(
        None,
        description="YAML file on data of your own: `input_prefix`, `label_prefix`, and `labels`, "
        "from values in the label column to label words. Unset: `text: `, `label: `, the values.",
    )

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.text_column == self.label_column:
            raise ValueError(f"--text-column and --label-column are both {self.text_column}")
        return self


class SamplingOptions(ModelOptions):
    """What prompts are made of the data, and what is tested with them."""

    test_file: Path | None = Field(
        None,
        description="Test examples of your own, as for dataset. Unset: a DatasetDict's part "
        "`test`, else a share of the dataset.",
    )
    test_share: float = Field(
        0.2, gt=0, lt=1, description="Part of each label's rows to test on, where nothing else is."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the choice of these rows.")
    k: int = Field(4, ge=0, description="Demonstrations a prompt.")
    test_type: TestType = Field(
        "Normal",
        description="StaICC's test: accuracy (Normal), consistency of predictions under other "
        "templates or demonstrations, accuracy against wrong labels (GLER), bias, or accuracy "
        "where no demonstration has the query's label (paper, A.4).",
    )
    generalization_test: bool = Field(
        False,
        description="Test on all 8 datasets of the paper; `--dataset` is in-domain (paper, "
        "Table 2).",
    )
    calibration: CalibrationType = Field(
        "none", description="Calibrate the predictions of tests, as StaICC does."
    )
    calibration_samples: int = Field(
        512,
        ge=1,
        description="Prompts of training examples that contextual and domain calibration learn "
        "from.",
    )


class PromptOptions(ModelOptions):
    """How prompts are written, and what runs the model on them."""

    prompt_form: Literal["ours", "staicc"] = Field(
        "ours",
        description="How prompts are written: one space belongs to the label token everywhere, "
        "or StaICC's own string.",
    )
    label_token: Literal["single", "first"] = Field(
        "single",
        description="Refuse label words of several tokens, or use their first token "
        "(in StaICC's form at the query the last, as StaICC does).",
    )
    on_long_prompt: Literal["refuse", "drop", "fewer-demonstrations"] = Field(
        "refuse", description="What to do with prompts beyond the model's context length."
    )
    token_budget: str | int = Field(
        "auto",
        description="Tokens a packed batch, at most; auto tries in training what a GPU holds and "
        "is 8192 elsewhere, less where the plan says so. Results do not depend on it.",
    )
    attention_backend: Literal[
        "auto", "flash-attn", "varlen", "sdpa", "flash-attn-3", "separate"
    ] = Field("auto", description="What computes attention; `abft-fast doctor` says what there is.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to run.")
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto splits a model larger than one GPU, by layers, over all GPUs of this "
        "machine.",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = Field(
        "auto",
        description="Arithmetic of the forward: bfloat16, or no for float32 throughout. "
        "auto is bf16 on a GPU, no on a CPU.",
    )

    @field_validator("token_budget", mode="before")
    @classmethod
    def _check_token_budget(cls, value: Any) -> str | int:
        return _named_or_count(value, ("auto",), "auto or a number of tokens from 1")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads `no` as false


class Options(PromptOptions, SamplingOptions, TableOptions, DatasetOptions):
    """What `train` and `eval` share; from the last class to the first, as help lists them."""

    @property
    def data_are_own(self) -> bool:
        """Whether `dataset` is a file or folder."""
        return self.dataset not in data.DATASETS

    @property
    def reads_own_data(self) -> bool:
        """Whether any dataset of the run is a file or folder."""
        return self.data_are_own

    @property
    def dataset_name(self) -> str:
        """The dataset's name, or that of the user's file without its suffix."""
        if not self.data_are_own:
            return self.dataset
        name = tables.name_of(Path(self.dataset))
        return f"own-{name}" if name in data.DATASETS else name

    @field_serializer("dataset", "template", "test_file", when_used="json")
    def _found_from_anywhere(self, value: str | Path | None) -> str | None:
        return None if value is None else _place(str(value))

    @model_validator(mode="after")
    def _check_own_data(self) -> Self:
        fields = Options.model_fields
        own = ("text_column", "label_column", "template", "test_file")
        split = ("test_share", "split_seed")
        given = [n for n in (*own, *split) if getattr(self, n) != fields[n].default]
        without_own = ("test_file",) if self.reads_own_data else (*own, *split)
        unwanted = [name for name in given if name in without_own]
        if unwanted and not self.data_are_own:
            raise ValueError(
                f"{flag(unwanted[0])} is for data of your own, and {self.dataset} is StaICC's: "
                "leave it out, or name a file by --dataset"
            )
        if self.test_file is not None and given[-1] in split:
            raise ValueError(f"{flag(given[-1])}: with --test-file nothing is split: leave it out")
        return self

    @model_validator(mode="after")
    def _check_test_type(self) -> Self:
        if self.test_type == "TempSensitivity" and self.data_are_own:
            raise ValueError(
                f"--test-type TempSensitivity: {self.dataset} has no alternate templates; use "
                "another --test-type"
            )
        if self.test_type in ("GLER", "DemoSensitivity") and self.k == 0:
            raise ValueError(
                f"--k 0: {self.test_type} changes demonstrations, so it needs at least one"
            )
        return self

    @property
    def without_effect(self) -> list[str]:
        """A line for each option that is not at its default and does nothing in this run."""
        fields = type(self).model_fields
        found = {
            name: f"{flag(name)} does nothing here: it is for {purpose}"
            for idle, purpose, names in self._idle()
            for name in names
            if idle and getattr(self, name) != fields[name].default
        }
        return list(found.values())

    def _idle(self) -> list[tuple[bool, str, tuple[str, ...]]]:
        """Whether options do nothing, what they are for, and which they are."""
        learns = self.calibration in ("contextual", "domain")
        return [(not learns, "--calibration contextual and domain", ("calibration_samples",))]


class EvalConfig(Options):
    """Options of `abft-fast eval`."""

    adapter: Path | None = Field(None, description="PEFT adapter folder to load on the model.")
    output: Path | None = Field(None, exclude=True, description="Write the metrics here as JSON.")


class TrainConfig(Options):
    """Options of `abft-fast train`; the defaults are the paper's (section 4.1)."""

    k: int = Field(4, ge=1, description="Demonstrations a prompt.")
    method: Literal["ABFT", "E2E", "MetaICL", "PICL"] = Field(
        "ABFT",
        description="ABFT; E2E, cross-entropy of the query's label; MetaICL, the same on other "
        "datasets (Min et al. 2022); PICL, a language model's loss on retrieved plain text "
        "(Gu et al. 2023).",
    )
    meta_datasets: str | None = Field(
        None,
        description="What MetaICL trains on, names or files as for dataset, separated by commas. "
        "Unset: StaICC's datasets but those that are tested.",
    )
    plain_text: Path | None = Field(
        None,
        description="What PICL trains on, one paragraph a line. Unset: StaICC's texts, "
        "without labels and without test texts.",
    )
    train_samples: int = Field(512, ge=1, description="Training prompts.")
    epochs: int = Field(2, ge=1, description="Passes over the training prompts.")
    pseudo_batch_size: int = Field(32, ge=1, description="Prompts averaged in an optimizer step.")
    lr: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Adam's learning rate. Unset: 1e-4 for LoRA, 2e-5 for full W_Q/W_K, 1e-5 for "
        "the whole model, the built-in model's own where that is trained.",
    )
    gradient: str | int = Field(
        "full",
        description="How far a layer's loss reaches in ABFT: full, local (its own layer), or N "
        "layers.",
    )
    trainable: Literal["lora", "full", "model"] | None = Field(
        None,
        description="Train LoRA on W_Q/W_K, W_Q/W_K themselves in float32, or the whole model so. "
        "Unset: lora; for MetaICL and PICL model.",
    )
    lora_r: int = Field(16, ge=1, description="Rank of LoRA.")
    penalty: float = Field(
        0.5,
        ge=0,
        allow_inf_nan=False,
        description="A, on attention to wrong labels, at the start.",
    )
    reward: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="B, on attention missing from right labels."
    )
    adaptation: Literal["pid", "p", "none"] = Field(
        "pid", description="Control of the penalty by the number of induction heads (paper, A.3)."
    )
    p_factor: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Factor of the control where it is p. Unset: pid-p.",
    )
    pid_p: float = Field(0.03, allow_inf_nan=False, description="Factor C_p of the control.")
    pid_i: float = Field(0.005, allow_inf_nan=False, description="Factor C_i of the control.")
    pid_d: float = Field(0.005, allow_inf_nan=False, description="Factor C_d of the control.")
    head_filter: bool = Field(True, description="Train induction heads only, or every head.")
    checkpointing: bool = Field(
        False, description="Recompute layers in the backward instead of keeping them in memory."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of prompts, their order and LoRA's start."
    )
    mauve_test: bool = Field(
        False, description="Score by MAUVE how close texts written after are to those of before."
    )
    mauve_prefix: Path | None = Field(
        None,
        description="Beginnings of the texts MAUVE compares, one a line. Unset: the first words "
        "of the dataset's test texts.",
    )
    mauve_model: str | None = Field(
        None, description="Model whose hidden states MAUVE compares. Unset: the model as it was."
    )
    save_steps: int = Field(8, ge=1, description="Steps between checkpoints.")
    no_eval: bool = Field(False, description="Skip the evaluations before and after.")
    no_eval_before: bool = Field(False, description="Skip the evaluation before.")
    no_eval_after: bool = Field(False, description="Skip the evaluation after.")
    no_save: bool = Field(
        False, description="Keep no adapter and no checkpoint; a killed run starts anew."
    )
    tracker: Literal["none", "wandb", "tensorboard"] = Field(
        "none", description="Also log to a tracker of accelerate."
    )
    force: bool = Field(
        False, exclude=True, description="Run even where the plan of memory says it cannot fit."
    )
    output_dir: Path | None = Field(
        None, exclude=True, description="Folder of the run. Unset: runs/<time>-<model>-<dataset>."
    )
    overwrite: bool = Field(
        False, exclude=True, description="Replace what an existing output folder holds."
    )
    resume: Path | None = Field(
        None, exclude=True, description="Continue the run in this folder with its own options."
    )

    @field_validator("gradient", mode="before")
    @classmethod
    def _check_gradient(cls, value: Any) -> str | int:
        return _named_or_count(value, ("full", "local"), "full, local or a number of layers from 1")

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        names = {name.lower(): name for name in get_args(cls.model_fields["method"].annotation)}
        return names.get(str(value).lower(), value)

    @field_validator("adaptation", mode="before")
    @classmethod
    def _check_adaptation(cls, value: Any) -> Any:
        return "none" if value is None else str(value).lower()

    @field_validator("meta_datasets")
    @classmethod
    def _check_meta_datasets(cls, value: str | None) -> str | None:
        if value is None:
            return None
        names = [_dataset(name.strip()) for name in value.split(",")]
        places = [_place(name) for name in names]
        for name, place in zip(names, places, strict=True):
            if places.count(place) > 1:
                raise ValueError(f"{name} is named twice")
        return ",".join(names)

    @field_serializer("meta_datasets", when_used="json")
    def _all_found_from_anywhere(self, value: str | None) -> str | None:
        return None if value is None else ",".join(map(_place, value.split(",")))

    @field_serializer("plain_text", "mauve_prefix", when_used="json")
    def _text_found_from_anywhere(self, value: Path | None) -> str | None:
        return None if value is None else str(value.resolve())

    @model_validator(mode="after")
    def _check_trainable(self) -> Self:
        if self.trainable is None:
            self.trainable = "lora" if self.method in ("ABFT", "E2E") else "model"
        if self.quantized and self.trainable != "lora":
            raise ValueError(
                f"--trainable {self.trainable} needs float weights: drop --quantized, or use lora"
            )
        if self.method != "ABFT" and self.gradient != "full":
            raise ValueError(
                f"--gradient {self.gradient} is ABFT's: the loss of {self.method} is at the "
                "model's output, so its gradient is full"
            )
        return self

    @model_validator(mode="after")
    def _check_tested_apart(self) -> Self:
        if self.method == "MetaICL":
            _ = self.meta_dataset_names
        return self

    @model_validator(mode="after")
    def _check_inputs(self) -> Self:
        needed = {"meta_datasets": "--method MetaICL", "plain_text": "--method PICL"}
        needed |= dict.fromkeys(("mauve_prefix", "mauve_model"), "--mauve-test")
        there = {f"--method {self.method}", "--mauve-test" if self.mauve_test else ""}
        for name, option in needed.items():
            if getattr(self, name) is not None and option not in there:
                raise ValueError(f"{flag(name)} is for {option}: add that, or leave it out")
        return self

    @property
    def reads_own_data(self) -> bool:
        """Whether any dataset of the run, tested or of MetaICL, is a file or folder."""
        names = self.meta_datasets.split(",") if self.meta_datasets else ()
        return self.data_are_own or not set(names) <= set(data.DATASETS)

    def _idle(self) -> list[tuple[bool, str, tuple[str, ...]]]:
        pid = ("p_factor", "pid_p", "pid_i", "pid_d")
        tests = ("test_type", "generalization_test", "calibration", "calibration_samples")
        own_factor = self.adaptation == "p" and self.p_factor is not None
        return [
            *super()._idle(),
            (not self.sides, "evaluations", tests),
            (self.no_save, "checkpoints", ("save_steps",)),
            (self.trainable != "lora", "--trainable lora", ("lora_r",)),
            (self.adaptation != "pid", "--adaptation pid", ("pid_i", "pid_d")),
            (own_factor, "--adaptation p without --p-factor", ("pid_p",)),
            (self.adaptation == "none", "--adaptation pid and p", ("pid_p",)),
            (self.adaptation != "p", "--adaptation p", ("p_factor",)),
            (
                self.method != "ABFT",
                "--method ABFT",
                ("penalty", "reward", "adaptation", *pid, "head_filter"),
            ),
        ]

    @property
    def meta_dataset_names(self) -> list[str]:
        """What MetaICL trains on.

        Raises:
            UserError: a dataset that is tested is among them.
        """
        tested = {_place(self.dataset), *({_place(str(self.test_file))} if self.test_file else ())}
        if self.generalization_test:
            tested.update(data.PAPER_DATASETS)
        if self.meta_datasets is None:
            return [name for name in data.DATASETS if name not in tested]
        names = self.meta_datasets.split(",")
        for name in names:
            if tested & {_place(name), *map(str, Path(_place(name)).parents)}:
                raise UserError(f"--meta-datasets holds {name}, which is tested: leave it out")
        return names

    @property
    def proportional_factor(self) -> float:
        """Of the number of induction heads, in the control of the penalty."""
        own = self.adaptation == "p" and self.p_factor is not None
        return self.p_factor if own else self.pid_p

    @property
    def needs_label_rows_only(self) -> bool:
        """Whether nothing needs an LM head's other rows: no loss, no text, no model to be saved."""
        return self.trainable == "lora" and self.method == "ABFT" and not self.mauve_test

    @property
    def sides(self) -> tuple[str, ...]:
        """When to evaluate: `before`, `after`."""
        skipped = {"before": self.no_eval_before, "after": self.no_eval_after}
        return tuple(when for when, skip in skipped.items() if not (skip or self.no_eval))

    @model_validator(mode="after")
    def _default_learning_rate(self) -> Self:
        if self.lr is None:
            paper = {"lora": 1e-4, "full": 2e-5, "model": 1e-5}
            rates = BUILTIN_LEARNING_RATES if self.model == "builtin" else paper
            self.lr = rates[self.trainable]
        return self


class PlanConfig(TrainConfig):
    """Options of `abft-fast plan`: those of `train`, and the GPU to plan for."""

    gpu_memory: float | None = Field(
        None,
        gt=1,  # is left to CUDA
        allow_inf_nan=False,
        description="GB (10^9 bytes) of the GPU to plan for. Unset: what is free here.",
    )


class PredictConfig(PromptOptions, TableOptions):
    """Options of `abft-fast predict`."""

    on_long_prompt: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What to do with a query whose prompt is beyond the model's context length; "
        "drop leaves its predictions empty.",
    )
    adapter: Path | None = Field(None, description="PEFT adapter folder to load on the model.")
    demonstrations: Path = Field(
        description="File of texts and labels, all of which, in their order, every prompt begins "
        "with."
    )
    input: Path = Field(description="File of the texts to label.")
    output: Path | None = Field(
        None,
        description="File to write, .csv or .jsonl: the input's columns, `prediction`, and "
        "`p_WORD` for each label word. Unset or `-`: CSV to standard output.",
    )

    @field_validator("output")
    @classmethod
    def _check_output(cls, value: Path | None) -> Path | None:
        if value is None or str(value) == "-":
            return None
        if value.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError("end it in .csv or .jsonl")
        return value


class MergeConfig(ModelOptions):
    """Options of `abft-fast merge`."""

    adapter: str = Field(
        description="PEFT adapter folders, separated by commas, each with `=` and a coefficient "
        "where that is not 1: the model plus the sum of coefficients times what was learnt "
        "(paper, Eq. 2)."
    )
    output_dir: Path = Field(description="Folder to be made, which plain transformers loads.")

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """The folders and their coefficients."""
        return self._parse(self.adapter)

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, value: str) -> str:
        cls._parse(value)
        return value

    @staticmethod
    def _parse(value: str) -> list[tuple[Path, float]]:
        found = []
        for part in value.split(","):
            folder, given, factor = part.partition("=")
            try:
                coefficient = float(factor) if given else 1.0
            except ValueError:
                coefficient = math.nan
            if not folder or not math.isfinite(coefficient):
                raise ValueError("use FOLDER or FOLDER=NUMBER, several separated by commas")
            found.append((Path(folder), coefficient))
        return found


class SweepConfig(CommandOptions):
    """Options of `abft-fast sweep`."""

    file: Path = Field(
        description="YAML: options of every cell, a grid of lists, named settings.",
        json_schema_extra=_POSITIONAL,
    )
    model: str | None = Field(None, description="In place of every model of the file.")
    device: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="Where every cell runs."
    )
    set: list[str] = Field(
        [],
        description="`name=value`, the value in YAML, in place of all that the file says of an "
        "option; a list is an axis; may be repeated.",
    )
    output_dir: Path | None = Field(
        None, description="Folder of the sweep. Unset: runs/<name of the file>."
    )
    jobs: int | None = Field(
        None, ge=1, description="Cells at once. Unset: 1, or with ray all that the cluster holds."
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="Processes of this machine, or tasks of a Ray cluster."
    )
    cell_cpus: int = Field(1, ge=1, description="With ray: CPUs of a cell.")
    cell_gpus: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="With ray: GPUs of a cell. Unset: 1, if any."
    )
    dry_run: bool = Field(False, description="Only say which cells there are.")

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        given = [n for n in ("cell_cpus", "cell_gpus") if n in self.model_fields_set]
        if given and self.engine != "ray":
            raise ValueError(f"{flag(given[0])} is for --engine ray: leave it out")
        return self


class TableConfig(CommandOptions):
    """Options of `abft-fast table`."""

    folder: Path = Field(
        description="A sweep's folder, a run's, or one above them.", json_schema_extra=_POSITIONAL
    )
    layout: Literal["1", "2", "3", "4"] = Field(
        "1",
        description="The paper's table: 1 methods by dataset, 2 cost and out of domain, "
        "3 consistency, 4 settings.",
    )
    metric: Literal[
        "accuracy", "macro_f1", "true_label_likelihood", "expected_calibration_error"
    ] = Field("accuracy", description="What is shown, but in layout 3.")
    format: Literal["markdown", "latex"] = Field("markdown", description="How it is written.")
    output: Path | None = Field(None, description="File to write. Unset: standard output.")

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.layout == "3" and "metric" in self.model_fields_set:
            raise ValueError(f"--metric {self.metric}: layout 3 shows consistency: leave it out")
        return self
