"""StaICC's datasets: its files, its splits, its demonstration samples.

The files are pickles, so each is checked against a pinned SHA-256 before it is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from abft_fast.data import tables
from abft_fast.errors import UserError


@dataclass(frozen=True)
class Example:
    """One labelled text; `label` indexes the dataset's label words, or is `NO_LABEL`."""

    NO_LABEL: ClassVar[int] = -1

    text: str
    label: int


@dataclass(frozen=True)
class Prompt:
    """k demonstrations and a query, before any text is rendered."""

    demonstrations: tuple[Example, ...]
    query: Example


@dataclass(frozen=True)
class _Source:
    loader: str  # class in StaICC.util.hgf_dataset_loader
    file: str
    sha256: str
    label_words: tuple[str, ...]  # paper, Table 5
    split: tuple[int, int, int] = (1024, 4096, 512)  # calibration, demonstration, test


_SOURCES = {
    "sst2": _Source(
        "glue_sst2",
        "sst2.dataset",
        "f0a59696d7e246904c705f5ddacd41f1bc69fcc5a568c8bb5a51f877f6b02fd7",
        ("negative", "positive"),
    ),
    "mr": _Source(
        "rotten_tomatoes",
        "rotten_tomatoes.dataset",
        "7211bc8efab9506a09f6e409a9cfee652953937d0fdac82e5cb61453158993e0",
        ("negative", "positive"),
    ),
    "fp": _Source(
        "financial_phrasebank",
        "financial_phrasebank.dataset",
        "0400683c58512ec5cd38c5df10798d903e754051d30082d7fc1b467f09bd0b2a",
        ("negative", "neutral", "positive"),
        (1024, 512, 512),
    ),
    "sst5": _Source(
        "sst5",
        "sst5.dataset",
        "bad620ddcceecc755eb02e847c85979c1456409034a61f87491f3f0eeaeb83e5",
        ("poor", "bad", "neutral", "good", "great"),
    ),
    "trec": _Source(
        "trec",
        "trec.dataset",
        "368eb2b7862b057f892211dcac3124e7b858c9021a96a32bd9d0666ac904d555",
        ("short", "entity", "description", "person", "location", "number"),
    ),
    "subj": _Source(
        "subjective",
        "subjective.dataset",
        "ae2abcfb4bb4088ba2e361d456f27c0072a8cdcd737d487286157776e5aa3310",
        ("objective", "subjective"),
    ),
    "tee": _Source(
        "tweet_eval_emotion",
        "tweet_eval_emotion.dataset",
        "9b559793b1cc445a20ae0ac08b1943e55e27549d8a948bf950f91aab6cabf4f3",
        ("anger", "joy", "positive", "sad"),
        (1024, 3192, 512),
    ),
    "teh": _Source(
        "tweet_eval_hate",
        "tweet_eval_hate.dataset",
        "ecc16e8689335dc225230218e87296ba221937d1a073193314a6369b3854a795",
        ("normal", "hate"),
    ),
    "agnews": _Source(
        "agnews",
        "agnews.dataset",
        "db7c87509aa2958e55c8b3722034af8094083eaa763154eb9fb216d2e239125b",
        ("world", "sports", "business", "science"),
    ),
    "hate_speech_18": _Source(
        "hate_speech_18",
        "hate_speech_18.dataset",
        "717e23089caff8d87186ed55c7f3b7de05153c1256f2b70272db88d2079cb93d",
        ("normal", "hate", "skip", "relation"),
    ),
}

PAPER_DATASETS = ("sst2", "mr", "fp", "sst5", "trec", "subj", "tee", "teh")
"""The eight datasets of the paper; a position here is the original's --ICL_dataset_index."""

DATASETS = tuple(_SOURCES)


@dataclass(frozen=True)
class Dataset:
    """A classification dataset with StaICC's split; `own_data.OwnDataset` has one of the user's.

    Attributes:
        name: the paper's short name, e.g. `"sst2"`.
        input_prefix: what stands before a text, e.g. `"sentence: "`.
        label_prefix: what stands before a label, e.g. `"sentiment: "`.
        label_words: single-token label words (paper, Table 5).
        staicc_label_words: the words StaICC itself uses; they differ for `subj`.
        training: StaICC's 1,024 calibration examples; only these are trained on.
        demonstrations: the pool test prompts draw their demonstrations from.
        test: the 512 test queries.
        files: path and SHA-256 of each file it was made of, where they are the user's own.
        alternate_template: three values of each of four parts of the template, by StaICC's names;
            None where there are none.
    """

    name: str
    input_prefix: str
    label_prefix: str
    label_words: tuple[str, ...]
    staicc_label_words: tuple[str, ...]
    training: tuple[Example, ...]
    demonstrations: tuple[Example, ...]
    test: tuple[Example, ...]
    files: tuple[tuple[str, str], ...] = ()
    alternate_template: Mapping[str, Sequence] | None = None

    def check_training(self, k: int) -> None:
        """Make sure that prompts of k demonstrations can be drawn to train on.

        Raises:
            UserError: k + 1 is more than the training examples there are.
        """
        if k + 1 > len(self.training):
            raise UserError(
                f"k={k}: {self.name} has {len(self.training)} training examples, "
                f"so k is at most {len(self.training) - 1}"
            )

    def check_test(self, k: int) -> None:
        """The same to test on.

        Raises:
            UserError: k is more than the pool of demonstrations.
        """
        if k > len(self.demonstrations):
            raise UserError(
                f"k={k}: {self.name} has {len(self.demonstrations)} demonstrations to draw from"
            )

    def training_prompts(self, k: int, count: int, seed: int) -> list[Prompt]:
        """`count` prompts of k + 1 distinct training examples each (paper, A.1).

        Raises:
            UserError: as `check_training`.
        """
        self.check_training(k)
        generator = random.Random(f"{self.name}-{seed}")
        prompts = []
        for _ in range(count):
            *demonstrations, query = generator.sample(self.training, k + 1)
            prompts.append(Prompt(tuple(demonstrations), query))
        return prompts

    def test_prompts(self, k: int) -> list[Prompt]:
        """The test queries, StaICC's 512, twice, each time with its own k demonstrations.

        Raises:
            UserError: k is more than the pool of demonstrations.
        """
        from abft_fast.evaluation.protocols import Protocol

        [call] = Protocol.of("Normal", self, k).calls
        return call.prompts


def resolve_name(name: str) -> str:
    """A dataset's name from its name or the original's index 0-7.

    Raises:
        UserError: there is no such dataset.
    """
    lowered = name.strip().lower()
    if lowered.isdigit() and int(lowered) < len(PAPER_DATASETS):
        return PAPER_DATASETS[int(lowered)]
    if lowered not in _SOURCES:
        raise UserError(
            f"dataset {name!r} is unknown: use one of {', '.join(DATASETS)}, an index 0-7, or "
            f"data of your own ({tables.FORMATS}){tables.closest(lowered, DATASETS)}"
        )
    return lowered


@cache
def load(name: str) -> Dataset:
    """Read a dataset out of the installed StaICC, after checking its file's SHA-256.

    Raises:
        UserError: the name is unknown, StaICC is missing, or the file is not the pinned one.
    """
    name = resolve_name(name)
    source = _SOURCES[name]
    if not hash_is_pinned(name):
        raise UserError(
            f"{_data_file(source)} is not the file of StaICC 0.1.1 (SHA-256 differs), not read: "
            "reinstall with `pip install --force-reinstall StaICC==0.1.1`"
        )
    from StaICC.util import dataset_interface, hgf_dataset_loader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # StaICC warns that FP and TEE have splits of their own
        original = getattr(hgf_dataset_loader, source.loader)()
        split = dataset_interface.triplet_dataset(original, *source.split)
    return Dataset(
        name=name,
        input_prefix=original.get_input_text_prefixes()[0],
        label_prefix=original.get_label_prefix(),
        label_words=source.label_words,
        staicc_label_words=tuple(original.get_label_space()),
        training=_examples(split.calibration),
        demonstrations=_examples(split.demonstration),
        test=_examples(split.test),
        alternate_template=original.get_alternate_template(),
    )


def hash_is_pinned(name: str) -> bool:
    """Whether the installed data file is the one this version was tested with."""
    source = _SOURCES[name]
    return hashlib.sha256(_data_file(source).read_bytes()).hexdigest() == source.sha256


def _data_file(source: _Source) -> Path:
    package = importlib.util.find_spec("StaICC")
    if package is None or package.origin is None:
        raise UserError("StaICC is not installed: `pip install StaICC==0.1.1`")
    return Path(package.origin).parent / "cached_dataset" / source.file


def _examples(part) -> tuple[Example, ...]:
    words: Sequence[str] = part.get_label_space()
    return tuple(
        Example(part.get_input_text(i)[0], words.index(part.get_label(i))) for i in range(len(part))
    )
