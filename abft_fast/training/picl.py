"""Make in-context learning tasks of plain text by retrieving similar paragraphs (PICL).

Gu et al. (2023) retrieve with an encoder that they trained on 80 million paragraphs. This module
retrieves with BM25, so that any text can be used, and filters out no paragraph.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

from abft_fast import data
from abft_fast.data.text_lines import read_lines
from abft_fast.errors import UserError

_SPARE = 8  # neighbours retrieved beyond k, because the paragraph itself is left out


def paragraphs(file: Path | None) -> list[str]:
    """Return the distinct lines of a file, or StaICC's texts without labels and test texts.

    Raises:
        UserError: the file cannot be read or has no line.
    """
    if file is None:
        datasets = [data.load(name) for name in data.DATASETS]
        tested = {data.text_key(e.text) for d in datasets for e in d.test}
        texts = [e.text.strip() for d in datasets for e in (*d.training, *d.demonstrations)]
        texts = [text for text in texts if text and data.text_key(text) not in tested]
    else:
        texts = read_lines("--plain-text", file)
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        raise UserError(f"--plain-text {file} holds no text: write one paragraph a line")
    return distinct


def check(texts: Sequence[str], k: int) -> None:
    """Refuse paragraphs that are too few, or a missing bm25s.

    Raises:
        UserError: there are fewer than k + 1 paragraphs, or bm25s is not installed.
    """
    if len(texts) < k + 1:
        raise UserError(
            f"k={k}: there are {len(texts)} paragraphs, so k is at most {len(texts) - 1}"
        )
    if importlib.util.find_spec("bm25s") is None:
        raise UserError("--method PICL needs bm25s: `pip install 'abft-fast[picl]'`")


def intrinsic_tasks(texts: Sequence[str], k: int, count: int, seed: int) -> list[list[str]]:
    """Draw paragraphs by seed; put the k most similar others before each, nearest last.

    Raises:
        UserError: as `check`.
    """
    check(texts, k)
    import bm25s

    generator = random.Random(f"picl-{seed}")
    anchors = [generator.randrange(len(texts)) for _ in range(count)]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), show_progress=False), show_progress=False)
    queries = bm25s.tokenize([texts[i] for i in anchors], show_progress=False)
    wanted = min(k + 1 + _SPARE, len(texts))
    neighbours, _ = index.retrieve(queries, k=wanted, show_progress=False)
    tasks = []
    for anchor, similar in zip(anchors, neighbours.tolist(), strict=True):
        others = [i for i in similar if i != anchor][:k]
        tasks.append([texts[i] for i in (*reversed(others), anchor)])
    return tasks
