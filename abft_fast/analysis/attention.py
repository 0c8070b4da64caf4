"""Mean attention of every head to labels and to the first token (paper, Figs 4 and 10-14)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from abft_fast.analysis.last_row import induction_threshold
from abft_fast.core.attention_rows import attention_rows
from abft_fast.core.backbone import must_run_alone, prepare
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, PackedPrompts, pack
from abft_fast.core.run_packed import run_packed
from abft_fast.runtime.batching import micro_batches


@dataclass(frozen=True)
class HeadMeans:
    """Means over prompts, by layer and head; every array is (layers, Hq).

    Attributes:
        label_mass: S, the last row's attention to all labels.
        above_threshold: S - T.
        correct_mass: the part of S on labels that are the query's own.
        induction: share of the prompts for which the head is an induction head, S > T.
        first_token: attention to the first token, the sink.
    """

    label_mass: NDArray
    above_threshold: NDArray
    correct_mass: NDArray
    induction: NDArray
    first_token: NDArray

    @property
    def correct_share(self) -> NDArray:
        """Return the part of the mean label mass that is on correct labels."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.correct_mass / self.label_mass


@torch.no_grad()
def head_means(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    token_budget: int,
    attention: str = "auto",
    on_batch: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> HeadMeans:
    """Run the model once on all prompts and average what the heads do at their last rows.

    Args:
        model: a decoder of transformers.
        prompts: with at least one label each.
        token_budget: tokens a packed batch, at most.
        attention: which attention runs.
        on_batch: called after each batch with the numbers of its prompts and tokens.
    """
    inner = prepare(model)
    lengths = [len(prompt) for prompt in prompts]
    alone = must_run_alone(inner, max(lengths))
    totals: NDArray | None = None
    for batch in micro_batches(lengths, 1 if alone else token_budget):
        packed = pack([prompts[i] for i in batch])
        figures = _figures(inner, packed, attention)
        totals = figures if totals is None else totals + figures
        on_batch(len(batch), len(packed.input_ids))
    assert totals is not None
    return HeadMeans(*(totals / len(prompts)))


def _figures(inner: PreTrainedModel, packed: PackedPrompts, attention: str) -> NDArray:
    """Return the five figures, summed over the batch, (5, layers, Hq)."""
    forward = PackedForward(packed, attention=attention, keep={}, queries={})
    run_packed(inner, forward)
    assert forward.keep is not None and forward.queries is not None
    behavior = forward.behavior()
    counts = (packed.label_offsets.diff().tolist(), packed.cu_seqlens.diff().tolist())
    threshold = torch.tensor([*map(induction_threshold, *counts)], dtype=torch.float64)
    mass = behavior.label_mass.double().cpu()
    first = [_first_token(forward, layer, packed.bounds) for layer in sorted(forward.keep)]
    by_prompt = (
        mass,
        mass - threshold[None, :, None],
        behavior.correct_mass.double().cpu(),
        behavior.is_induction.double().cpu(),
        torch.stack(first).double(),
    )
    return torch.stack([figure.sum(dim=1) for figure in by_prompt]).numpy()


def _first_token(forward: PackedForward, layer: int, bounds: Sequence[int]) -> torch.Tensor:
    """Return each last row's attention to its prompt's first token, (R, Hq)."""
    assert forward.keep is not None and forward.queries is not None
    key, queries = forward.keep[layer][0], forward.queries[layer]
    rows = []
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        one = queries._replace(query=queries.query[row : row + 1])
        rows.append(attention_rows(one, key[start:end])[0, :, 0])
    return torch.stack(rows).cpu()
