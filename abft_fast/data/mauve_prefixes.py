"""Read the beginnings of the texts that MAUVE compares."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from abft_fast.data.dataset import Dataset
from abft_fast.data.text_lines import read_lines
from abft_fast.errors import UserError

_FEWEST = 50  # prefixes; k-means makes a bucket of every ten texts
_PREFIX_WORDS = 8


def check_installed() -> None:
    """Refuse a run that could not compute its MAUVE score.

    Raises:
        UserError: mauve-text is not installed.
    """
    if importlib.util.find_spec("mauve") is None:
        raise UserError("--mauve-test needs mauve-text: `pip install 'abft-fast[mauve]'`")


def read_prefixes(file: Path) -> list[str]:
    """Read prefixes from a file, one a line.

    Raises:
        UserError: the file cannot be read or has too few lines.
    """
    return _enough(read_lines("--mauve-prefix", file), str(file))


def prefixes(file: Path | None, dataset: Dataset) -> list[str]:
    """Read prefixes from a file, or take the first words of a dataset's test texts.

    Raises:
        UserError: there are too few prefixes, or the file cannot be read.
    """
    if file is not None:
        return read_prefixes(file)
    beginnings = (" ".join(example.text.split()[:_PREFIX_WORDS]) for example in dataset.test)
    return _enough([text for text in beginnings if text], dataset.name)


def _enough(texts: list[str], source: str) -> list[str]:
    """Return the prefixes of a source, or refuse too few of them."""
    if len(texts) < _FEWEST:
        raise UserError(
            f"--mauve-prefix {source}: {len(texts)} prefixes are too few for a score, use "
            f"{_FEWEST} or more, one a line"
        )
    return texts
