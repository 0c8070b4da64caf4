"""Options of `abft-fast analyze`, a class for each of its verbs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from abft_fast.options.base import Layers, layer_numbers, name_or_count
from abft_fast.options.evaluate import DrawnPromptOptions
from abft_fast.options.model import PlacementOptions

_NUMBER = r"-?\d+(?:\.\d+)?"
_GROUPS = ("head", "layer", "induction", "other")
_DESIDERATA = ("label-word", "position", "text-prior")


class OutputOptions(PlacementOptions):
    """Options that say where an analysis goes."""

    output_dir: Path | None = Field(
        None,
        description="Folder for the results; files of the same names in it are replaced. Unset: a "
        "new folder in `analysis/`.",
    )

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the adapters that the options name."""
        return []

    @property
    def other_models(self) -> list[str]:
        """Return the models beside `--model` that the options name."""
        return []


class ComparedOptions(OutputOptions):
    """Options that name the tuned model beside the base."""

    _needs_tuned: ClassVar[bool] = True

    adapter: Path | None = Field(
        None, description="PEFT adapter folder; the tuned model is --model with it."
    )
    tuned: str | None = Field(
        None,
        description="The tuned model itself, as for --model, in place of --adapter: such as the "
        "folder `model` of a run that trained the whole model.",
    )

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the adapters that the options name."""
        return [] if self.adapter is None else [self.adapter]

    @property
    def other_models(self) -> list[str]:
        """Return the models beside `--model` that the options name."""
        return [] if self.tuned is None else [self.tuned]

    @model_validator(mode="after")
    def _check_tuned(self) -> Self:
        if self.adapter is not None and self.tuned is not None:
            raise ValueError("--adapter and --tuned both name the tuned model: leave one out")
        if self._needs_tuned and self.adapter is None and self.tuned is None:
            raise ValueError("name the tuned model: --adapter FOLDER, or --tuned MODEL")
        if self.tuned is not None and self.quantized:
            raise ValueError("--quantized works with --adapter: leave out one of them")
        return self


class ReadPromptOptions(OutputOptions, DrawnPromptOptions):
    """Options of the analyses that read prompts of a test."""

    test_type: Literal["Normal", "UnseenLabel"] = Field(
        "Normal",
        description="Prompts of StaICC's test. UnseenLabel: no demonstration has the query's label "
        "(paper, A.4).",
    )


class AnalyzeOptions(ReadPromptOptions):
    """Options of the analyses that average over prompts."""

    prompts: int = Field(
        128,
        ge=1,
        description="Test prompts to read, each of another query, drawn at random, the same in "
        "every call. More than there are queries: one of each.",
    )


class ComparedOnPromptsOptions(ComparedOptions, AnalyzeOptions):
    """Options of the analyses that compare two models on prompts."""


class AttentionConfig(ComparedOnPromptsOptions):
    """Options of `abft-fast analyze attention`."""

    _needs_tuned: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_k(self) -> Self:
        if self.k == 0:
            raise ValueError(
                "--k 0: there are no labels to attend to: use one demonstration or more"
            )
        return self


class ShowConfig(ComparedOptions, ReadPromptOptions):
    """Options of `abft-fast analyze show`."""

    _needs_tuned: ClassVar[bool] = False

    prompt_index: int = Field(0, ge=0, description="Which prompt of the test, counted from 0.")
    text: str | None = Field(
        None, description="A prompt of your own, in place of one of the dataset's."
    )
    layers: Layers = Field(
        None,
        description="Layers to show, counted from 0: a layer, a range such as 10-20, or several by "
        "commas. Unset: the two whose heads attend most to labels; with --text, which has no "
        "labels, the last two.",
    )
    also: list[Path] = Field(
        [], description="Further adapter of the same base to show. May be repeated."
    )

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the adapters that the options name."""
        return [*super().adapter_folders, *self.also]

    @property
    def chosen_layers(self) -> list[int]:
        """Return the layers that `--layers` names, in its order; none if it is unset."""
        return [] if self.layers is None else layer_numbers(self.layers)


class ShiftConfig(ComparedOptions):
    """Options of `abft-fast analyze shift`."""


def _some_of(allowed: Sequence[str], kind: str) -> BeforeValidator:
    """Return what checks names that are separated by commas, or a list of them."""

    def check(value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list):
            parts = list(dict.fromkeys(str(part).strip() for part in parts))
            unknown = [part for part in parts if part not in allowed]
            if unknown or not parts:
                given = unknown[0] if unknown else ""
                raise ValueError(f"{given!r} is no {kind}: use some of {', '.join(allowed)}")
            return ",".join(parts)
        return value

    return BeforeValidator(check)


def _heads(value: Any) -> Any:
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else [value]
    if not all(re.fullmatch(r"\s*\d+\.\d+\s*", str(part)) for part in parts):
        raise ValueError("use LAYER.HEAD, several by commas, such as 3.1,5.0")
    return value


class CmapConfig(ComparedOnPromptsOptions):
    """Options of `abft-fast analyze cmap`."""

    what: Literal["output", "pattern", "values"] = Field(
        "output",
        description="What of a head is patched at the last row. output: its output. pattern: its "
        "attention, over the values of the model that receives. values: the values, under the "
        "attention of the model that receives.",
    )
    groups: Annotated[str, _some_of(_GROUPS, "group")] = Field(
        "head,layer,induction,other",
        description="Groups of heads that are patched, separated by commas. head: each head alone. "
        "layer: each layer's heads. induction: the heads with S > T for the prompt, in one of the "
        "two models or in both. other: the remaining heads.",
    )
    reverse: bool = Field(
        False, description="Put the base's heads into the tuned model: which heads it needs."
    )
    random_draws: int = Field(
        5, ge=1, description="Random groups for each size of the curve over the best heads."
    )


class RestrictConfig(ComparedOnPromptsOptions):
    """Options of `abft-fast analyze restrict`."""

    heads: Annotated[str | None, BeforeValidator(_heads)] = Field(
        None,
        description="Heads whose change of weights is kept, as LAYER.HEAD, separated by commas; "
        "layers and heads count from 0. A key head is kept where one of its query heads is.",
    )
    top: Annotated[
        str | int, BeforeValidator(lambda v: name_or_count(v, ("all",), "all or a number"))
    ] = Field(
        "all",
        description="Without --heads: keep the best 1, 2, 4, ... heads, up to this many, and as "
        "many random ones. Heads are ranked by `cmap` on one half of the prompts and tested on the "
        "other half.",
    )
    random_draws: int = Field(5, ge=1, description="Random groups for each number of heads.")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.heads is not None and self.top != "all":
            raise ValueError("--heads and --top both choose heads: leave one out")
        return self

    @property
    def chosen(self) -> list[tuple[int, int]]:
        """Return the layers and heads that `--heads` names."""
        pairs = [part.strip().split(".") for part in (self.heads or "").split(",") if part.strip()]
        return [(int(layer), int(head)) for layer, head in pairs]


class PathConfig(ComparedOnPromptsOptions):
    """Options of `abft-fast analyze path`."""

    _needs_tuned: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_label_token(self) -> Self:
        if self.label_token == "first":
            raise ValueError(
                "--label-token first: path exchanges label words, and they must be of one token: "
                "use a --template that gives such words"
            )
        return self


class DcmConfig(ComparedOnPromptsOptions):
    """Options of `abft-fast analyze dcm`."""

    _needs_tuned: ClassVar[bool] = False

    desiderata: Annotated[str, _some_of(_DESIDERATA, "desideratum")] = Field(
        ",".join(_DESIDERATA),
        description="What heads may carry, separated by commas; a mask is learnt for each. "
        "label-word: label words are rotated in the demonstrations. position: right demonstrations "
        "change places with wrong ones. text-prior: another query follows the same demonstrations.",
    )
    head_cost: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="What a head in use costs, in nats."
    )
    learning_rate: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="Adam's learning rate of the masks."
    )
    steps: int = Field(50, ge=1, description="Steps of each mask.")
    batch_size: int = Field(
        16, ge=1, description="Prompts of a step, drawn from one half of --prompts."
    )

    @property
    def chosen(self) -> list[str]:
        """Return the desiderata that `--desiderata` names."""
        return self.desiderata.split(",")

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if self.test_type == "UnseenLabel":
            raise ValueError(
                "--test-type UnseenLabel: no demonstration has the right label: use Normal"
            )
        if self.k < 2:
            raise ValueError(
                f"--k {self.k}: labels cannot change places: use two demonstrations or more"
            )
        return self


def _grid(value: Any) -> Any:
    found = re.fullmatch(rf"({_NUMBER}):({_NUMBER}):(\d+)", str(value).strip())
    if found is None or float(found[1]) >= float(found[2]) or int(found[3]) < 2:
        raise ValueError("use LOWEST:HIGHEST:COUNT with 2 points or more, such as -0.5:1.5:11")
    return value


class PlaneConfig(AnalyzeOptions):
    """Options of `abft-fast analyze plane`."""

    a: Path = Field(description="Run, adapter or model folder of the one solution, such as ABFT's.")
    e: Path = Field(description="The same of the other solution, such as E2E's.")
    grid: Annotated[str, BeforeValidator(_grid)] = Field(
        "-0.5:1.5:11",
        description="Coefficients of both solutions, as LOWEST:HIGHEST:COUNT. Every pair of them "
        "is tested.",
    )

    @field_validator("a", "e")
    @classmethod
    def _check_solution(cls, value: Path) -> Path:
        if not value.is_dir():
            raise ValueError("there is no such folder: name a run, an adapter or a model")
        return value

    @property
    def coefficients(self) -> list[float]:
        """Return the coefficients of the grid."""
        low, high, count = self.grid.split(":")
        step = (float(high) - float(low)) / (int(count) - 1)
        return [round(float(low) + i * step, 9) for i in range(int(count))]

    @property
    def artifacts(self) -> list[Path]:
        """Return the adapter or model folders of both solutions, `a` first."""
        return [artifact_of(self.a), artifact_of(self.e)]

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the adapters that the options name."""
        return [folder for folder in self.artifacts if is_adapter(folder)]

    @property
    def other_models(self) -> list[str]:
        """Return the models beside `--model` that the options name."""
        return [str(folder) for folder in self.artifacts if not is_adapter(folder)]


def artifact_of(folder: Path) -> Path:
    """Return what a run trained, or the folder itself if it is not a run's."""
    trained = (folder / name for name in ("adapter", "model"))
    return next((path for path in trained if path.is_dir()), folder)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter; one with a model beside it counts."""
    return (folder / "adapter_config.json").is_file()
