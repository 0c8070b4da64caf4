"""Prompts that walk through the model together, a block at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, pack
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.runtime import processes
from abft_fast.runtime.batching import balanced_shares
from abft_fast.streaming.states import HiddenStates

_FIELDS = ("label_mass", "correct_mass", "is_induction")


@dataclass(frozen=True)
class WalkingPrompt(EncodedPrompt):
    """A prompt that knows its place in its group; its token ids are rows of the embedding."""

    place: int


class PromptGroup:
    """The prompts of one training step, or of one part of a test.

    After `settle`, a block runs them between `enter` and `leave`, some prompts at a time: `forward`
    gives them the hidden states that enter the block, and `store` takes those that leave it.

    Args:
        prompts: in the order in which their hidden states lie end to end.
        shared: whether processes that hold the same block divide the prompts.

    Attributes:
        prompts: the same; after `settle`, their ids are rows of the embedding.
        lengths: tokens of each prompt.
        own: places of the prompts that this process computes, after `settle`.
        own_tokens: of these prompts.
        masses: what the heads did, by field and first layer of a block: (layers, R, Hq) each.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], shared: bool = True):
        self.prompts: Sequence[EncodedPrompt] = prompts
        self._shared = shared
        self.lengths = [len(prompt) for prompt in prompts]
        self.masses: dict[str, Tensor] = {}
        self._entering: Tensor | None = None
        self._leaving: Tensor | None = None

    def shares(self, processes: int) -> list[list[int]]:
        """Return the places of the prompts that each of several processes computes."""
        if not self._shared:
            return [list(range(len(self.prompts)))] * processes
        return balanced_shares(self.lengths, processes)

    def settle(self, number: int, states: HiddenStates, rows: dict[int, int]) -> None:
        """Give the group its hidden states, and its prompts the embedding's rows.

        Args:
            number: by which `states` knows the group.
            states: hidden states of all groups.
            rows: rows of the embedding by token.
        """
        self._number, self._states = number, states
        self.own = self.shares(processes.count())[processes.rank()]
        ends = list(itertools.accumulate((self.lengths[place] for place in self.own), initial=0))
        self._starts, self.own_tokens = dict(zip(self.own, ends, strict=False)), ends[-1]
        self.prompts = [
            WalkingPrompt(
                [rows[token] for token in prompt.input_ids],
                prompt.label_positions,
                prompt.label_is_correct,
                place,
            )
            for place, prompt in enumerate(self.prompts)
        ]

    def enter(self, block: range) -> None:
        """Read the hidden states that enter a block; the first block's are the embedding's."""
        self._entering = self._states.read(self._number) if block.start > 0 else None

    def entering(self, places: Sequence[int], device: torch.device) -> Tensor | None:
        """Return the hidden states of some prompts that enter the block, (1, T, width)."""
        if self._entering is None:
            return None
        return self._entering[self._rows(places)][None].to(device)

    def forward(
        self,
        block: range,
        places: Sequence[int],
        device: torch.device,
        first_position: int = 0,
        **options: Any,
    ) -> PackedForward:
        """Return the forward of some prompts through a block.

        Args:
            block: the layers.
            places: the prompts' places in the group.
            device: where the model is.
            first_position: of each prompt's first token; above 0 behind a shared prefix.
            options: further arguments of `PackedForward`.
        """
        packed = pack([self.prompts[place] for place in places])
        if first_position:
            packed = replace(packed, position_ids=packed.position_ids + first_position)
        entering = self.entering(places, device)
        return PackedForward(packed, layers_to_run=block, entering=entering, **options)

    def store(self, places: Sequence[int], leaving: Tensor | None) -> None:
        """Store the hidden states of some prompts that leave the block, (1, T, width)."""
        if leaving is None:
            return
        states = leaving[0].to(self._states.device)
        if self._leaving is None:
            self._leaving = states.new_empty(self.own_tokens, states.shape[1])
        self._leaving[self._rows(places)] = states

    def observe(self, block: range, places: Sequence[int], behavior: AttentionBehavior) -> None:
        """Store what the heads of a block's layers did on some prompts."""
        for name in _FIELDS:
            own = getattr(behavior, name).cpu()
            self.take_masses(places, {f"{name}.{block.start}": own})

    def masses_of(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return what the heads did on some prompts."""
        return {name: mass[:, list(places)] for name, mass in self.masses.items()}

    def take_masses(self, places: Sequence[int], masses: dict[str, Tensor]) -> None:
        """Store what the heads did on some prompts, as another process returned it."""
        for name, own in masses.items():
            if name not in self.masses:
                self.masses[name] = own.new_empty(len(own), len(self.prompts), own.shape[2])
            self.masses[name][:, list(places)] = own

    def leave(self) -> None:
        """Hand on the hidden states that left the block."""
        if self._leaving is not None:
            self._states.write(self._number, self._leaving)
        self._entering = self._leaving = None

    def arrive(self, states: Tensor) -> None:
        """Take the hidden states of the own prompts from another process; they enter a block."""
        self._states.write(self._number, states.to(self._states.device))

    def depart(self) -> Tensor:
        """Return the hidden states of the own prompts that left a block, for another process."""
        return self._states.read(self._number)

    def behavior(self) -> BehaviorMean:
        """Return what the heads of all layers did; an empty mean if they were not observed."""
        mean = BehaviorMean()
        if self.masses:
            masses = [torch.cat([self.masses[key] for key in self._keys(name)]) for name in _FIELDS]
            mean.add(AttentionBehavior(torch.zeros(()), *masses), pack(self.prompts))
        return mean

    def _keys(self, name: str) -> list[str]:
        keys = [key for key in self.masses if key.startswith(f"{name}.")]
        return sorted(keys, key=lambda key: int(key.rpartition(".")[2]))

    def _rows(self, places: Sequence[int]) -> Tensor:
        spans = ((self._starts[place], self.lengths[place]) for place in places)
        return torch.cat([torch.arange(start, start + count) for start, count in spans])
