"""Word and document vectors from co-occurrence, to start the built-in model's embedding from.

PPMI of tokens within a window, factored by a truncated SVD (Levy & Goldberg 2014), weighted by
smooth inverse frequency (Arora et al. 2017). Only texts are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_WINDOW = 8
_SIF = 1e-3


def token_vectors(documents: Sequence[Sequence[int]], vocabulary: int, size: int) -> np.ndarray:
    """Return PPMI-SVD vectors with SIF weights, (vocabulary, size)."""
    flat = np.zeros(vocabulary * vocabulary, dtype=np.float64)
    for distance in range(1, _WINDOW + 1):
        left = np.concatenate([np.asarray(d[:-distance], dtype=np.int64) for d in documents])
        right = np.concatenate([np.asarray(d[distance:], dtype=np.int64) for d in documents])
        flat += np.bincount(left * vocabulary + right, minlength=flat.size)
    counts = flat.reshape(vocabulary, vocabulary)
    counts += counts.T.copy()
    total = counts.sum()
    frequency = counts.sum(axis=1) / total
    context = frequency**0.75
    context /= context.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.log(counts / total / (frequency[:, None] * context[None, :]))
    ppmi = np.where(np.isfinite(ppmi) & (ppmi > 0), ppmi, 0.0)
    u, s, _ = torch.svd_lowrank(torch.from_numpy(ppmi).float(), q=size + 32, niter=4)
    vectors = (u * s.sqrt()).numpy()[:, :size]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-8
    unigram = np.bincount(np.concatenate([np.asarray(d) for d in documents]), minlength=vocabulary)
    return vectors * (_SIF / (_SIF + unigram / unigram.sum()))[:, None]


def document_vectors(
    documents: Sequence[Sequence[int]], vectors: np.ndarray, size: int
) -> np.ndarray:
    """Return whitened means of token vectors, (documents, size): mean 0 and variance 1."""
    means = np.stack([vectors[np.asarray(d)].mean(axis=0) for d in documents])
    means -= means.mean(axis=0)
    u, _, _ = np.linalg.svd(means, full_matrices=False)
    return (u[:, :size] * np.sqrt(len(documents))).astype(np.float32)
