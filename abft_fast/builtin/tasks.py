"""Pseudo-tasks: classification problems made from unlabelled texts, a new one a sequence.

Nothing but the context tells which word names which class, so only a model that matches a text
with the demonstrations before it can answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """Tokenized texts with their whitened document vectors and the data set each came from."""

    documents: list[list[int]]
    vectors: np.ndarray  # (documents, dimensions)
    source: np.ndarray  # (documents,)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that a prompt's template is made of."""

    label_words: Sequence[int]
    input_fields: Sequence[tuple[list[int], list[int]]]  # at the start of a prompt, after a newline
    label_fields: Sequence[list[int]]
    newline: int


@dataclass(frozen=True)
class PseudoTask:
    """One pseudo-task written out as one token sequence."""

    input_ids: list[int]
    query_positions: list[int]  # the ':' before each label
    label_positions: list[int]
    documents: list[int]
    seen: list[bool]  # whether this label's class was demonstrated before


def sample_sequence(
    corpus: Corpus, vocabulary: Vocabulary, length: int, random: np.random.Generator
) -> PseudoTask:
    """Draw a task and write as many demonstrations of it as fit `length` tokens."""
    classes = _sample_classes(corpus, random)
    words = random.choice(vocabulary.label_words, size=len(classes), replace=False)
    prior = _sample_prior(len(classes), random)
    first, following = vocabulary.input_fields[int(random.integers(len(vocabulary.input_fields)))]
    label_field = vocabulary.label_fields[int(random.integers(len(vocabulary.label_fields)))]
    ids: list[int] = []
    queries, labels, documents, seen, shown = [], [], [], [], set()
    used: set[int] = set()
    while True:
        c = int(random.choice(len(classes), p=prior))
        document = int(random.choice(classes[c]))
        if document in used and len(used) < min(len(members) for members in classes):
            continue
        field = following if ids else first
        piece = [*field, *corpus.documents[document], *label_field]
        if len(ids) + len(piece) + 2 > length:
            break
        used.add(document)
        ids += piece
        queries.append(len(ids) - 1)
        labels.append(len(ids))
        ids += [int(words[c]), vocabulary.newline]
        documents.append(document)
        seen.append(c in shown)
        shown.add(c)
    return PseudoTask(ids, queries, labels, documents, seen)


def _sample_classes(corpus: Corpus, random: np.random.Generator) -> list[np.ndarray]:
    sources = corpus.source.max() + 1
    kind = random.random()
    if kind < 0.1:
        chosen = random.choice(sources, size=2, replace=False)
        return [np.flatnonzero(corpus.source == s) for s in chosen]
    pool = np.flatnonzero(corpus.source == random.integers(sources))
    vectors = corpus.vectors[pool]
    if kind < 0.6:
        # Both ends along a random direction, more often along the leading components.
        direction = random.normal(size=vectors.shape[1:])
        if random.random() < 0.5:
            direction *= 1 / np.sqrt(1 + np.arange(vectors.shape[1]))
        order = np.argsort(vectors @ direction)
        end = max(12, int(len(pool) * random.uniform(1 / 40, 1 / 10)))
        return [pool[order[:end]], pool[order[-end:]]]
    count = int(random.integers(2, 7))
    anchors = vectors[random.choice(len(pool), size=count, replace=False)]
    unit = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-8)
    similarity = unit @ (anchors / (np.linalg.norm(anchors, axis=1, keepdims=True) + 1e-8)).T
    nearest = similarity.argmax(axis=1)
    members = int(random.integers(12, 60))
    classes = []
    for c in range(count):
        own = np.flatnonzero(nearest == c)
        classes.append(pool[own[np.argsort(-similarity[own, c])[:members]]])
    return [members for members in classes if len(members) >= 4] or _sample_classes(corpus, random)


def _sample_prior(classes: int, random: np.random.Generator) -> np.ndarray:
    kind = random.random()
    if kind < 0.6 or classes == 1:
        return np.full(classes, 1 / classes)
    if kind < 0.97:
        return random.dirichlet(np.full(classes, 1.5))
    only = np.zeros(classes)
    only[random.integers(classes)] = 1.0
    return only
