"""Options of `abft-fast eval`, and those that it shares with `train` and `analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, PrivateAttr, field_serializer, field_validator, model_validator

from abft_fast import data
from abft_fast.data import tables
from abft_fast.errors import UserError
from abft_fast.options.base import flag
from abft_fast.options.data import (
    ColumnOptions,
    DatasetOptions,
    SamplingOptions,
    ScoringOptions,
    absolute_place,
)
from abft_fast.options.merge import checked_adapters, parse_adapters
from abft_fast.options.model import PromptOptions, check_stream_placement
from abft_fast.options.without_effect import EVALUATION, Rule, lines_without_effect

_OF_BOXES = {
    "test_type": (("Normal",), "has no test but Normal"),
    "prompt_form": (("ours",), "has one form of prompts"),
    "label_token": (("single",), "takes only objects of one token"),
    "on_long_prompt": (("refuse", "drop"), "needs every box of a prompt"),
    "calibration": (("none",), "has other answers in each prompt"),
    "training_labels": (("own",), "draws new objects for each prompt anyway"),
}
"""What generated boxes allow, by option, and why not the rest."""


class DrawnPromptOptions(PromptOptions, SamplingOptions, ColumnOptions, DatasetOptions):
    """Options that say which prompts a model is tested on; help lists the last base class first."""

    @property
    def data_are_own(self) -> bool:
        """Return whether `dataset` is a file or folder."""
        return self.dataset not in data.NAMES

    @property
    def reads_own_data(self) -> bool:
        """Return whether any dataset of the run is a file or folder."""
        return self.data_are_own

    _names: dict[str, str] = PrivateAttr(default_factory=dict)  # of files that have moved, by place

    @property
    def dataset_name(self) -> str:
        """Return the dataset's name, or the name of the user's file without its suffix.

        A file that has moved since its run began keeps its name, by which prompts are drawn.
        """
        if not self.data_are_own:
            return self.dataset
        if self.dataset in self._names:
            return self._names[self.dataset]
        name = tables.name_of(Path(self.dataset))
        return f"own-{name}" if name in data.NAMES else name

    @field_serializer("dataset", "template", "test_file", when_used="json")
    def _save_absolute_path(self, value: str | Path | None) -> str | None:
        return None if value is None else absolute_place(str(value))

    @model_validator(mode="before")
    @classmethod
    def _set_k_of_boxes(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            name = data.resolve_name(str(given.get("dataset")))
        except UserError:
            return given  # a file, or a mistake that the field's own check names
        return {"k": data.BOXES[name], **given} if name in data.BOXES else given

    @model_validator(mode="after")
    def _check_boxes(self) -> Self:
        if self.dataset not in data.BOXES:
            return self
        boxes = data.BOXES[self.dataset]
        if self.k != boxes:
            others = ", ".join(name for name in data.BOXES if name != self.dataset)
            raise ValueError(
                f"--k {self.k}: {self.dataset} has {boxes} boxes in each prompt: leave --k out, or "
                f"use {others}"
            )
        for name, (allowed, why) in _OF_BOXES.items():
            value = getattr(self, name, None)  # some are options of one subclass
            if value is not None and value not in allowed:
                raise ValueError(
                    f"{flag(name)} {value}: {self.dataset} {why}: leave {flag(name)} out"
                )
        return self

    @model_validator(mode="after")
    def _check_own_data(self) -> Self:
        fields = DrawnPromptOptions.model_fields
        own = ("text_column", "label_column", "delimiter", "template", "test_file")
        split = ("test_share", "split_seed")
        given = [n for n in (*own, *split) if getattr(self, n) != fields[n].default]
        without_own = ("test_file",) if self.reads_own_data else (*own, *split)
        unwanted = [name for name in given if name in without_own]
        if unwanted and not self.data_are_own:
            raise ValueError(
                f"{flag(unwanted[0])} is for your own data, and {self.dataset} is "
                f"{data.origin(self.dataset)}: "
                "leave the option out, or name a file with --dataset"
            )
        if self.test_file is not None and given[-1] in split:
            raise ValueError(
                f"{flag(given[-1])}: --test-file gives all test rows: leave this option out"
            )
        return self

    @model_validator(mode="after")
    def _check_test_type(self) -> Self:
        if "TempSensitivity" in self.test_types and self.data_are_own:
            raise ValueError(
                f"--test-type TempSensitivity: {self.dataset} has no alternate templates; use "
                "another --test-type"
            )
        of_demonstrations = ("GLER", "DemoSensitivity", "LabelFollowing")
        changing = [test for test in self.test_types if test in of_demonstrations]
        if changing and self.k == 0:
            raise ValueError(
                f"--k 0: {changing[0]} changes demonstrations, so it needs at least one of them"
            )
        if "GLER" in self.test_types and self.k % 4:
            raise ValueError(
                f"--k {self.k}: GLER makes 0, 25, 50, 75 and 100 % of the labels wrong, so k must "
                "be a multiple of 4"
            )
        return self


class Options(ScoringOptions, DrawnPromptOptions):
    """Options that `train` and `eval` share."""

    _rules_of_effect: ClassVar[tuple[Rule, ...]] = EVALUATION

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        if "LabelFollowing" in self.test_types and self.calibration != "none":
            raise ValueError(
                f"--calibration {self.calibration} is for the dataset's own label words, but "
                "LabelFollowing tests others, too: leave --calibration out"
            )
        return self

    @property
    def without_effect(self) -> list[str]:
        """Return a line for each option that was changed but does nothing in this run."""
        return lines_without_effect(self, self._rules_of_effect)


class EvalConfig(Options):
    """Options of `abft-fast eval`."""

    adapter: list[str] = Field(
        [],
        description="PEFT adapter folder to load on the model. FOLDER=NUMBER gives it a "
        "coefficient. May be repeated, or several separated by commas: the model plus the sum of "
        "each coefficient times what its adapter learnt (paper, Eq. 2).",
    )
    stream: bool = Field(
        False,
        description="Read the model layer by layer, once, and keep one layer's weights in memory; "
        "hidden states of all test prompts wait in memory between layers.",
    )
    output: Path | None = Field(
        None, exclude=True, description="JSON file to write the metrics to."
    )

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """Return the adapter folders and their coefficients."""
        return parse_adapters(self.adapter)

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the adapters that the options name."""
        return [folder for folder, _ in self.adapters]

    @property
    def adapter_is_a_sum(self) -> bool:
        """Return whether adapters are to be added to weights rather than put on the model."""
        return [coefficient for _, coefficient in self.adapters] not in ([], [1.0])

    _check_adapter = field_validator("adapter", mode="before")(checked_adapters)

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream:
            check_stream_placement(self)
        if self.stream and self.adapter_is_a_sum:
            raise ValueError(
                f"--stream and --adapter {','.join(self.adapter)}, which is a sum: name one folder "
                "without a number, or leave --stream out"
            )
        return self

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        if self.quantized and self.adapter_is_a_sum:
            raise ValueError(
                f"--adapter {','.join(self.adapter)} is added to the model's weights, which "
                "--quantized has in 4 or 8 bits: leave --quantized out, or name one folder without "
                "a number"
            )
        return self
