"""Prompts laid end to end in one flat batch: no padding token is ever computed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from abft_fast.core.transfer import on_device


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized prompt; its last token is the query row of the loss.

    Attributes:
        input_ids: n token ids.
        label_positions: index of each demonstration's label token, below n.
        label_is_correct: whether that label is the query's own.
    """

    input_ids: list[int]
    label_positions: list[int]
    label_is_correct: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PackedPrompts:
    """R prompts laid end to end, T tokens in all.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, restarting at 0 in every prompt.
        cu_seqlens: (R + 1,) int32, prompt r is `input_ids[cu_seqlens[r]:cu_seqlens[r + 1]]`.
        label_positions: (M,) int32, absolute indices into `input_ids`.
        label_offsets: (R + 1,) int32, prompt r owns `label_positions[offsets[r]:offsets[r + 1]]`.
        label_is_correct: (M,) bool.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Return `cu_seqlens` as numbers; they are read before the batch moves to a GPU."""
        return self.cu_seqlens.tolist()

    @property
    def longest(self) -> int:
        """Return the tokens of the longest prompt."""
        return max(end - start for start, end in itertools.pairwise(self.bounds))

    def to(self, device: torch.device | str) -> PackedPrompts:
        """Return the same batch on another device; the host does not wait for a GPU."""
        bounds = self.bounds
        moved = PackedPrompts(*on_device([getattr(self, f.name) for f in fields(self)], device))
        moved.__dict__["bounds"] = bounds
        return moved

    def unpack(self) -> list[EncodedPrompt]:
        """Return the prompts that were packed."""
        labels = self.label_offsets.tolist()
        ids, positions = self.input_ids.tolist(), self.label_positions.tolist()
        correct = self.label_is_correct.tolist()
        return [
            EncodedPrompt(ids[a:b], [p - a for p in positions[c:d]], correct[c:d])
            for (a, b), (c, d) in zip(
                itertools.pairwise(self.bounds), itertools.pairwise(labels), strict=True
            )
        ]


def pack(prompts: Sequence[EncodedPrompt]) -> PackedPrompts:
    """Lay prompts end to end in one flat batch.

    Three prompts of 2, 4 and 3 tokens have `cu_seqlens` [0, 2, 6, 9].

    Raises:
        ValueError: there is no prompt, one is empty, or a label position is not inside its prompt,
            named twice, or without its `label_is_correct`.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to pack")
    for i, prompt in enumerate(prompts):
        positions = prompt.label_positions
        if not prompt.input_ids:
            raise ValueError(f"prompts[{i}].input_ids is empty")
        if len(positions) != len(prompt.label_is_correct):
            raise ValueError(
                f"prompts[{i}] has {len(positions)} label_positions "
                f"and {len(prompt.label_is_correct)} label_is_correct"
            )
        if any(not 0 <= p < len(prompt) for p in positions):
            raise ValueError(f"prompts[{i}].label_positions must lie in 0..{len(prompt) - 1}")
        if len(set(positions)) != len(positions):
            raise ValueError(f"prompts[{i}].label_positions names a position twice")
    starts = list(itertools.accumulate(map(len, prompts), initial=0))
    labels = itertools.accumulate((len(p.label_positions) for p in prompts), initial=0)
    return PackedPrompts(
        input_ids=torch.tensor([i for p in prompts for i in p.input_ids]),
        position_ids=torch.cat([torch.arange(len(p)) for p in prompts]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        label_positions=torch.tensor(
            [s + i for s, p in zip(starts, prompts, strict=False) for i in p.label_positions],
            dtype=torch.int32,
        ),
        label_offsets=torch.tensor(list(labels), dtype=torch.int32),
        label_is_correct=torch.tensor(
            [c for p in prompts for c in p.label_is_correct], dtype=torch.bool
        ),
    )
