"""Read StaICC's datasets from the files of the installed StaICC, with StaICC's splits.

The files are pickles, so each is checked against a pinned SHA-256 before it is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_fast.data.dataset import Dataset, Example
from abft_fast.errors import UserError


@dataclass(frozen=True)
class Source:
    """A dataset's file in the installed StaICC, and how to read it.

    Attributes:
        loader: a class in StaICC.util.hgf_dataset_loader.
        file: the name of the pickle.
        sha256: the digest of the pickle that this version was tested with.
        label_words: the paper's label words (Table 5).
        split: the numbers of calibration, demonstration and test examples.
    """

    loader: str
    file: str
    sha256: str
    label_words: tuple[str, ...]
    split: tuple[int, int, int] = (1024, 4096, 512)


SOURCES = {
    "sst2": Source(
        "glue_sst2",
        "sst2.dataset",
        "f0a59696d7e246904c705f5ddacd41f1bc69fcc5a568c8bb5a51f877f6b02fd7",
        ("negative", "positive"),
    ),
    "mr": Source(
        "rotten_tomatoes",
        "rotten_tomatoes.dataset",
        "7211bc8efab9506a09f6e409a9cfee652953937d0fdac82e5cb61453158993e0",
        ("negative", "positive"),
    ),
    "fp": Source(
        "financial_phrasebank",
        "financial_phrasebank.dataset",
        "0400683c58512ec5cd38c5df10798d903e754051d30082d7fc1b467f09bd0b2a",
        ("negative", "neutral", "positive"),
        (1024, 512, 512),
    ),
    "sst5": Source(
        "sst5",
        "sst5.dataset",
        "bad620ddcceecc755eb02e847c85979c1456409034a61f87491f3f0eeaeb83e5",
        ("poor", "bad", "neutral", "good", "great"),
    ),
    "trec": Source(
        "trec",
        "trec.dataset",
        "368eb2b7862b057f892211dcac3124e7b858c9021a96a32bd9d0666ac904d555",
        ("short", "entity", "description", "person", "location", "number"),
    ),
    "subj": Source(
        "subjective",
        "subjective.dataset",
        "ae2abcfb4bb4088ba2e361d456f27c0072a8cdcd737d487286157776e5aa3310",
        ("objective", "subjective"),
    ),
    "tee": Source(
        "tweet_eval_emotion",
        "tweet_eval_emotion.dataset",
        "9b559793b1cc445a20ae0ac08b1943e55e27549d8a948bf950f91aab6cabf4f3",
        ("anger", "joy", "positive", "sad"),
        (1024, 3192, 512),
    ),
    "teh": Source(
        "tweet_eval_hate",
        "tweet_eval_hate.dataset",
        "ecc16e8689335dc225230218e87296ba221937d1a073193314a6369b3854a795",
        ("normal", "hate"),
    ),
    "agnews": Source(
        "agnews",
        "agnews.dataset",
        "db7c87509aa2958e55c8b3722034af8094083eaa763154eb9fb216d2e239125b",
        ("world", "sports", "business", "science"),
    ),
    "hate_speech_18": Source(
        "hate_speech_18",
        "hate_speech_18.dataset",
        "717e23089caff8d87186ed55c7f3b7de05153c1256f2b70272db88d2079cb93d",
        ("normal", "hate", "skip", "relation"),
    ),
}

PAPER_DATASETS = ("sst2", "mr", "fp", "sst5", "trec", "subj", "tee", "teh")
"""The eight datasets of the paper, in its order."""

STAICC_ORDER = (
    "sst2", "mr", "fp", "sst5", "trec", "agnews", "subj", "tee", "teh", "hate_speech_18",
)  # fmt: skip
"""The datasets in the order of StaICC's Normal; the position is the original's index."""

DATASETS = tuple(SOURCES)


def read(name: str) -> Dataset:
    """Read a dataset out of the installed StaICC, after checking its file's SHA-256.

    Args:
        name: one of `DATASETS`.

    Raises:
        UserError: StaICC is missing, or the file is not the pinned one.
    """
    source = SOURCES[name]
    if not hash_is_pinned(name):
        raise UserError(
            f"{_data_file(source)} is not the file of StaICC 0.1.1 (its SHA-256 differs): "
            "reinstall it with `pip install --force-reinstall StaICC==0.1.1`"
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
    """Return whether the installed data file is the one this version was tested with."""
    source = SOURCES[name]
    return hashlib.sha256(_data_file(source).read_bytes()).hexdigest() == source.sha256


def _data_file(source: Source) -> Path:
    package = importlib.util.find_spec("StaICC")
    if package is None or package.origin is None:
        raise UserError("StaICC is not installed: `pip install StaICC==0.1.1`")
    return Path(package.origin).parent / "cached_dataset" / source.file


def _examples(part: Any) -> tuple[Example, ...]:
    words: Sequence[str] = part.get_label_space()
    return tuple(
        Example(part.get_input_text(i)[0], words.index(part.get_label(i))) for i in range(len(part))
    )
