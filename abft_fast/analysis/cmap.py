"""Cross-model activation patching (CMAP): which heads of the tuned model carry the gain.

The tuned model's head outputs at the last row are put into the base, group by group.
Source: Prakash et al. 2024, "Fine-tuning enhances existing mechanisms", section 5.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abft_fast.analysis.effects import Floats, Recovered, is_right, log_odds, recovered
from abft_fast.analysis.last_row import LastRow, is_induction, run_prompt
from abft_fast.analysis.pair import ModelPair
from abft_fast.analysis.patching import patched_logits, replacement
from abft_fast.core.packing import EncodedPrompt
from abft_fast.prompts import EncodedPrompts

BY_PROMPT = ("induction", "other")
"""Groups whose heads differ from prompt to prompt."""

Head = tuple[int, int]
"""Index among the layers that have attention, and query head."""


class Way(NamedTuple):
    """A group of heads that are patched together.

    Attributes:
        group: `head`, `layer`, `induction`, `other`, `none`, `all`, `top`, `random` or `chosen`.
        heads: the group's heads; None where they depend on the prompt.
        draw: which random draw.
    """

    group: str
    heads: frozenset[Head] | None
    draw: int | None = None


@dataclass(frozen=True)
class Effects:
    """Figures of P prompts for each of W ways to patch.

    Attributes:
        ways: the groups.
        log_odds: (P, W), of the right label against all others.
        right: (P, W), 1 where the right label has the largest logit.
        receiver: (P, 2), log-odds and right, of the model that receives as it is.
        giver: (P, 2), those of the model that gives.
        heads: (P, W), how many heads were patched.
    """

    ways: Sequence[Way]
    log_odds: Floats
    right: Floats
    receiver: Floats
    giver: Floats
    heads: Floats

    def recovered(self) -> list[tuple[Recovered, Recovered]]:
        """Return each way's recovered share of the log-odds and of the accuracy."""
        odds = recovered(self.log_odds, self.receiver[:, 0], self.giver[:, 0])
        right = recovered(self.right, self.receiver[:, 1], self.giver[:, 1])
        return list(zip(odds, right, strict=True))

    def recovered_of(self, way: Way) -> Recovered:
        """Return one way's recovered share of the log-odds."""
        column = self.ways.index(way)
        return recovered(self.log_odds[:, [column]], self.receiver[:, 0], self.giver[:, 0])[0]

    def of_prompts(self, which: slice) -> Effects:
        """Return the same of some prompts only."""
        fields = (self.log_odds, self.right, self.receiver, self.giver, self.heads)
        return Effects(self.ways, *(field[which] for field in fields))

    def ranking(self) -> list[Head]:
        """Return the heads of the group `head`, the one that moves the log-odds most first.

        The direction of the move is that from the receiving model to the giving one.
        """
        sign = -1.0 if self.giver[:, 0].mean() < self.receiver[:, 0].mean() else 1.0
        moved = sign * (self.log_odds - self.receiver[:, :1]).mean(axis=0)
        singles = [
            (-moved[i], head)
            for i, way in enumerate(self.ways)
            if way.group == "head"
            for head in way.heads or ()
        ]
        return [head for _, head in sorted(singles)]


@dataclass(frozen=True)
class Patcher:
    """How patching is done.

    Attributes:
        pair: the base and the tuned model.
        what: see `patching.replacement`.
        reverse: put the base's heads into the tuned model.
        attention: which attention runs.
        autocast: context manager around each forward.
    """

    pair: ModelPair
    what: str = "output"
    reverse: bool = False
    attention: str = "auto"
    autocast: Callable[[], AbstractContextManager] = field(default=nullcontext)

    def measure(
        self,
        encoded: EncodedPrompts,
        ways: Sequence[Way],
        on_prompt: Callable[[int, int], None] = lambda prompts, tokens: None,
    ) -> Effects:
        """Patch every prompt in every way.

        Args:
            encoded: prompts with the labels of their queries.
            ways: the groups of heads.
            on_prompt: called after each prompt with 1 and the number of its tokens.

        Raises:
            FloatingPointError: a label's logit is not finite.
        """
        columns: list[list[Floats]] = [[] for _ in range(5)]
        for i, (prompt, label) in enumerate(zip(encoded.prompts, encoded.labels, strict=True)):
            receiver, giver, logits, masks = self._patch(prompt, ways, encoded.answer_ids(i))
            both = torch.stack([receiver.logits, giver.logits])
            if not (both.isfinite().all() and logits.isfinite().all()):
                raise FloatingPointError("the model's logits of the label words are not finite")
            ends = np.stack([log_odds(both, label), is_right(both, label)], axis=1)
            counts = masks.sum(dim=(1, 2)).double().numpy()
            figures = (log_odds(logits, label), is_right(logits, label), *ends, counts)
            for column, figure in zip(columns, figures, strict=True):
                column.append(figure)
            on_prompt(1, len(prompt))
        return Effects(ways, *(np.stack(column) for column in columns))

    def _patch(
        self, prompt: EncodedPrompt, ways: Sequence[Way], label_ids: Sequence[int]
    ) -> tuple[LastRow, LastRow, Tensor, Tensor]:
        receives, gives = self.pair.base, self.pair.tuned
        if self.reverse:
            receives, gives = gives, receives
        with torch.no_grad(), self.autocast():
            with gives() as model:
                giver = run_prompt(model, prompt, label_ids, self.attention)
            with receives() as model:
                receiver = run_prompt(model, prompt, label_ids, self.attention)
                induction = is_induction(receiver, prompt) | is_induction(giver, prompt)
                masks = torch.stack([_mask(way, induction) for way in ways])
                outputs = replacement(giver, receiver, self.what)
                logits = patched_logits(
                    model, prompt, receiver, outputs, masks, label_ids, self.attention
                )
        return receiver, giver, logits, masks


def _mask(way: Way, induction: Tensor) -> Tensor:
    if way.heads is None:
        return induction if way.group == "induction" else ~induction
    mask = torch.zeros_like(induction)
    for layer, head in way.heads:
        mask[layer, head] = True
    return mask


def ways_of(groups: Sequence[str], layers: int, heads: int) -> list[Way]:
    """Return the ways of these groups, after `none` and `all`."""
    all_heads = [(layer, head) for layer in range(layers) for head in range(heads)]
    ways = [Way("none", frozenset()), Way("all", frozenset(all_heads))]
    for group in groups:
        if group in BY_PROMPT:
            ways.append(Way(group, None))
        elif group == "layer":
            ways += [
                Way(group, frozenset((layer, head) for head in range(heads)))
                for layer in range(layers)
            ]
        else:
            ways += [Way(group, frozenset([head])) for head in all_heads]
    return ways


def curve_ways(ranking: Sequence[Head], draws: int, seed: int = 0) -> Iterator[Way]:
    """Yield the top n heads of a ranking and as many random ones, n = 1, 2, 4, ... all."""
    generator = random.Random(seed)
    for count in counts_of_curve(len(ranking)):
        yield Way("top", frozenset(ranking[:count]))
        if count < len(ranking):
            for draw in range(draws):
                chosen = generator.sample(list(ranking), count)
                yield Way("random", frozenset(chosen), draw)


def counts_of_curve(heads: int) -> list[int]:
    """Return 1, 2, 4, ... and the number of heads."""
    return [2**i for i in range(math.ceil(math.log2(heads)))] + [heads] if heads > 1 else [1]


def halves(encoded: EncodedPrompts) -> tuple[EncodedPrompts, EncodedPrompts]:
    """Split prompts in two, so that heads are not ranked by the prompts that judge them."""
    first, second = (
        EncodedPrompts(
            encoded.prompts[i::2],
            encoded.labels[i::2],
            encoded.kept[i::2],
            encoded.label_ids,
            encoded.answers[i::2],
        )
        for i in (0, 1)
    )
    return first, second
