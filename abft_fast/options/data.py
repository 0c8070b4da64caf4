"""Options that say which data are read and which prompts are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from abft_fast import data
from abft_fast.data import tables
from abft_fast.errors import UserError, closest
from abft_fast.options.model import ModelOptions

TestType = Literal[
    "Normal",
    "TempSensitivity",
    "DemoSensitivity",
    "GLER",
    "TripletBias",
    "UnseenLabel",
    "LabelFollowing",
]
CalibrationType = Literal["none", "contextual", "domain", "batch"]

_TESTS: tuple[str, ...] = get_args(TestType)


def _tests(value: Any) -> str:
    """Return tests' names, given as a list or separated by commas, in the order of `TestType`.

    Raises:
        ValueError: a name is no test's, or is given twice.
    """
    names = [str(part).strip() for part in (value if isinstance(value, list) else [value])]
    names = [part.strip() for name in names for part in name.split(",")]
    for name in names:
        if name not in _TESTS:
            tests = ", ".join(_TESTS)
            raise ValueError(
                f"{name!r} is no test: use one or several, by commas, of {tests}"
                f"{closest(name, _TESTS)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"the test {name} is named twice")
    return ",".join(sorted(names, key=_TESTS.index))


def listed_tests(test_type: str) -> list[str]:
    """Return the tests that a value of `--test-type` names."""
    return test_type.split(",")


def of_one_test(content: Mapping[str, Any], test_type: str, test: str) -> dict[str, Any]:
    """Return what a file keeps about one test.

    A run with several tests keeps an entry for each; a run with one keeps what the entry has.

    Args:
        content: one side of evaluation.json, for instance; it may be empty.
        test_type: the run's `--test-type`.
        test: one of its tests.
    """
    return dict(content if test_type == test else content.get(test, {}))


def dataset_or_file(name: str) -> str:
    """Return the name of a dataset, or the path of the user's own data as given.

    Raises:
        UserError: the name is neither.
    """
    try:
        return data.resolve_name(str(name))
    except UserError:
        if str(name) and tables.is_table(str(name)):
            return str(name)
        raise


def absolute_place(name: str) -> str:
    """Return the name of a dataset as it is, or the absolute path of a file, or `-`."""
    return name if name in data.NAMES else tables.place_to_save(Path(name))


class DatasetOptions(ModelOptions):
    """The option that names the dataset."""

    dataset: Annotated[str, BeforeValidator(dataset_or_file)] = Field(
        "subj",
        description=f"One of {', '.join(data.NAMES)}; an index 0-9 as in the original "
        f"implementation; or your own data in a file ({tables.FORMATS}); `-` reads standard "
        "input.",
    )


class ColumnOptions(ModelOptions):
    """Options that describe the user's own files."""

    text_column: str = Field("text", description="Column that holds the texts of your own data.")
    label_column: str = Field("label", description="Column that holds the labels of your own data.")
    delimiter: str | None = Field(
        None,
        description="Character that separates the columns of your own CSV and TSV files, or "
        "`tab`. Unset: a comma, in .tsv a tab, or what the header shows.",
    )
    template: Path | None = Field(
        None,
        description="YAML file that says how prompts of your own data are written: "
        "`input_prefix`, `label_prefix`, and `labels`, which maps values of the label column to "
        "label words. Unset: `text: `, `label: `, and the values themselves.",
    )

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value in ("tab", r"\t"):
            return "\t"
        if value is not None and (len(value) != 1 or value in '"\r\n'):
            raise ValueError("use one character, such as ';', or tab")
        return value

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.text_column == self.label_column:
            raise ValueError(f"--text-column and --label-column are both {self.text_column}")
        return self


class SamplingOptions(ModelOptions):
    """Options that say how prompts are drawn from the data and what is tested with them."""

    test_file: Path | None = Field(
        None,
        description="Your own test examples, in a file as for --dataset. Unset: the part `test` "
        "of a DatasetDict, or else a share of the dataset (see --test-share).",
    )
    test_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of each label's rows to test on, if there are no other test examples.",
    )
    split_seed: int = Field(0, ge=0, description="Seed that chooses the rows of --test-share.")
    k: int = Field(4, ge=0, description="Demonstrations in a prompt; boxes set it by their name.")
    test_type: Annotated[str, BeforeValidator(_tests)] = Field(
        "Normal",
        description="Test of StaICC, or several, separated by commas. Normal: accuracy. "
        "TempSensitivity, DemoSensitivity: consistency of predictions under other templates or "
        "demonstrations. GLER: accuracy when labels of the demonstrations are wrong. TripletBias: "
        "bias. UnseenLabel: accuracy when no demonstration has the query's label (paper, A.4). "
        "LabelFollowing, which is not StaICC's: accuracy when the label words change places, and "
        "with new words.",
    )

    @property
    def test_types(self) -> list[str]:
        """Return the tests that `test_type` names."""
        return listed_tests(self.test_type)


class ScoringOptions(ModelOptions):
    """Options that say on which datasets a test is scored, and after which calibration."""

    generalization_test: bool = Field(
        False,
        description="Test on all 8 datasets of the paper; --dataset is the in-domain one "
        "(paper, Table 2).",
    )
    test_samples: int | None = Field(
        None,
        ge=1,
        description="Number of test queries, drawn at random but always the same ones, where a "
        "dataset has more. StaICC has 512, and asks each twice. Unset: all.",
    )
    calibration: CalibrationType = Field(
        "none", description="How to calibrate the predictions of a test, as StaICC does it."
    )
    calibration_samples: int = Field(
        512,
        ge=1,
        description="Number of prompts, made of training examples, from which contextual and "
        "domain calibration learn.",
    )
