"""Options that say which prompts a method trains on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from abft_fast import data
from abft_fast.data.tables import place_to_save
from abft_fast.errors import UserError
from abft_fast.options.base import flag
from abft_fast.options.data import absolute_place, dataset_or_file
from abft_fast.options.evaluate import Options
from abft_fast.options.methods import METHODS, MethodName

TrainingLabels = Literal["own", "permuted", "symbols", "mixed"]

OTHERS = "others"
"""The value of `--training-datasets` that leaves the tested dataset out."""

DATASET_LISTS = ("meta_datasets", "training_datasets")
"""Options that name several datasets, separated by commas."""


def listed_names(value: str | None) -> list[str]:
    """Return the names and paths in an option of `DATASET_LISTS`; none for `others`."""
    return value.split(",") if value and value != OTHERS else []


def spelled_method(value: Any) -> Any:
    """Return a method's name as `METHODS` spells it, or a value that names no method as it is."""
    names = {name.lower(): name for name in METHODS}
    return names.get(str(value).lower(), value)


class TrainingDataOptions(Options):
    """Options that say which prompts a method trains on."""

    k: int = Field(4, ge=1, description="Demonstrations in a prompt; boxes set it by their name.")
    method: MethodName = Field(
        "ABFT",
        description="What the loss is. ABFT: attention behavior. E2E: cross-entropy of the "
        "query's label. MetaICL: the same on other datasets (Min et al. 2022). PICL: a language "
        "model's loss on retrieved plain text (Gu et al. 2023).",
    )
    training_datasets: str | None = Field(
        None,
        description="Datasets that ABFT and E2E train on: names or files as for --dataset, "
        "separated by commas; or others, the paper's datasets that are not tested. Of a file, the "
        "rows that --test-share leaves to train on. Unset: the dataset of --dataset.",
    )
    mixture: Literal["equal", "proportional"] = Field(
        "equal",
        description="How many prompts each of --training-datasets or --meta-datasets gives. equal: "
        "the same number. "
        "proportional: by its number of training examples.",
    )
    training_labels: TrainingLabels = Field(
        "own",
        description="Label words of training prompts. own: the dataset's. permuted: the dataset's, "
        "in a new order in each prompt. symbols: words that mean nothing here, new ones in each "
        "prompt. mixed: own in some prompts, permuted in the others.",
    )
    own_labels_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability of own labels in a prompt, with --training-labels mixed.",
    )
    seen_labels_only: bool = Field(
        False,
        description="Train only on prompts in which a demonstration has the query's label. Unset: "
        "also on others, as in the paper. TREC has six labels: in 45 % of its prompts no "
        "demonstration has the query's.",
    )
    meta_datasets: str | None = Field(
        None,
        description="Datasets that MetaICL trains on: names or files as for --dataset, "
        "separated by commas. Unset: all datasets of StaICC that are not tested.",
    )
    plain_text: Path | None = Field(
        None,
        description="File of the paragraphs that PICL trains on, one a line. Unset: StaICC's "
        "texts, without labels and without test texts.",
    )
    train_samples: int = Field(512, ge=1, description="Number of training prompts.")

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        return spelled_method(value)

    @field_validator(*DATASET_LISTS)
    @classmethod
    def _check_datasets(cls, value: str | None) -> str | None:
        if value is None or value == OTHERS:
            return value
        names = [dataset_or_file(name.strip()) for name in value.split(",")]
        places = [absolute_place(name) for name in names]
        for name, place in zip(names, places, strict=True):
            if "," in place:
                raise ValueError(
                    f"{place} has a comma in a folder's name, and commas separate these names: "
                    "move the file"
                )
            if places.count(place) > 1:
                raise ValueError(f"{name} is named twice")
        return ",".join(names)

    @field_serializer(*DATASET_LISTS, when_used="json")
    def _save_absolute_paths(self, value: str | None) -> str | None:
        if value is None or value == OTHERS:
            return value
        return ",".join(map(absolute_place, value.split(",")))

    @field_serializer("plain_text", when_used="json")
    def _save_absolute_text_path(self, value: Path | None) -> str | None:
        return None if value is None else place_to_save(value)

    @model_validator(mode="after")
    def _check_data_of_method(self) -> Self:
        for method in METHODS.values():
            option = method.data_option
            if option is not None and method.name != self.method and getattr(self, option):
                raise ValueError(
                    f"{flag(option)} works with --method {method.name} only: add --method "
                    f"{method.name}, or leave {flag(option)} out"
                )
        own = METHODS[self.method].data_option
        if self.training_datasets is not None and own is not None:
            raise ValueError(
                f"--training-datasets works with ABFT and E2E, not {self.method}: use {flag(own)}"
            )
        if self.training_labels != "own" and own == "plain_text":
            raise ValueError(
                f"--training-labels {self.training_labels}: {self.method} trains on plain text, "
                "which has no labels: leave the option out"
            )
        if self.seen_labels_only and own == "plain_text":
            raise ValueError(
                f"--seen-labels-only: {self.method} trains on plain text, which has no labels: "
                "leave the option out"
            )
        if self.seen_labels_only and self.on_long_prompt == "fewer-demonstrations":
            raise ValueError(
                "--on-long-prompt fewer-demonstrations may leave out the one with the query's "
                "label, which --seen-labels-only asks for: use --on-long-prompt drop"
            )
        for option in DATASET_LISTS:
            boxes = [name for name in listed_names(getattr(self, option)) if name in data.BOXES]
            if boxes:
                raise ValueError(
                    f"{flag(option)} {boxes[0]}: its prompts have boxes in place of --k "
                    f"demonstrations: train on it by --dataset {boxes[0]}"
                )
        _ = self.training_dataset_names
        return self

    def moved_from(self, before: Mapping[str, Any]) -> Self:
        """Return the options with the names that the datasets had in a run's recorded options.

        Raises:
            UserError: a list of datasets names another number of them.
        """
        pairs = [(before["dataset"], self.dataset)]
        lists = {}
        for option in DATASET_LISTS:
            old, new = listed_names(before[option]), listed_names(getattr(self, option))
            if len(old) != len(new):
                raise UserError(f"{flag(option)}: the run has {len(old)} of them, not {len(new)}")
            pairs += zip(old, new, strict=True)
            if before["dataset"] in old:  # the tested dataset is still the same one as here
                new[old.index(before["dataset"])] = self.dataset
                lists[option] = ",".join(new)
        names = {
            place: self.model_copy(update={"dataset": was}).dataset_name
            for was, place in pairs
            if place != was
        }
        if replaced := set(names.values()) & set(data.NAMES):
            name = min(replaced)
            raise UserError(f"{name} is {data.origin(name)}, which no file replaces")
        moved = self.model_copy(update=lists)
        moved._names = names
        return moved

    @property
    def reads_own_data(self) -> bool:
        """Return whether any dataset of the run, tested or trained on, is a file or folder."""
        names = [name for option in DATASET_LISTS for name in listed_names(getattr(self, option))]
        return self.data_are_own or not set(names) <= set(data.NAMES)

    @property
    def training_dataset_names(self) -> list[str]:
        """Return the names or paths of the datasets that the training prompts come from.

        PICL, which trains on plain text, has none.

        Raises:
            UserError: test examples are among them.
        """
        option = METHODS[self.method].data_option or "training_datasets"
        if option == "plain_text":
            return []
        named = getattr(self, option)
        if named is None and option == "training_datasets":
            return [self.dataset]
        tested = {absolute_place(str(self.test_file))} if self.test_file else set()
        if named == OTHERS or option == "meta_datasets":
            tested.add(absolute_place(self.dataset))
            if self.generalization_test:
                tested.update(data.PAPER_DATASETS)
        if named is None or named == OTHERS:
            known = data.PAPER_DATASETS if named == OTHERS else data.DATASETS
            names = [name for name in known if name not in tested]
            if not names:
                raise UserError(
                    f"{flag(option)}: no dataset is left, as all are tested: name the datasets, or "
                    "drop --generalization-test"
                )
            return names
        own = absolute_place(self.dataset)  # one file may be spelled in two ways
        names = [self.dataset if absolute_place(n) == own else n for n in named.split(",")]
        for name in names:
            if tested & {absolute_place(name), *map(str, Path(absolute_place(name)).parents)}:
                raise UserError(f"{flag(option)} holds {name}, which is tested: leave {name} out")
        return names
