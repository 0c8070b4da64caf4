"""Label logits of prompts that begin alike; the shared beginning is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from abft_fast.core.backbone import attention_layers, must_run_alone, prepare
from abft_fast.core.label_logits import label_logits, only_label_logits
from abft_fast.core.packed_forward import KeysAndValues, PackedForward
from abft_fast.core.packing import EncodedPrompt, PackedPrompts, pack
from abft_fast.core.run_packed import run_packed


class SharedPrefix:
    """The first tokens of many prompts, with the keys and values that a model computes for them.

    Keys and values depend only on the tokens before them, so every later prompt attends to the ones
    that were kept. The first call computes them, in evaluation mode, with the model as it is then.
    In some models they depend on more (layers without attention, RoPE that depends on a prompt's
    length): such a model runs on whole prompts.

    Attributes:
        ids: its tokens.
        computed: tokens the model has run on so far.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], attention: str = "auto"):
        self.ids = list(ids)
        self.model, self.attention = model.eval(), attention
        self.computed = 0
        self._kept: KeysAndValues = {}

    def shorten(self, length: int) -> None:
        """Keep only the first `length` tokens; nothing is computed again."""
        self.ids = self.ids[:length]
        kept = {i: (k[:length], v[:length]) for i, (k, v) in self._kept.items()}
        self._kept = kept if self.ids else {}

    def can_share(self, longest: int) -> bool:
        """Return whether prompts of `longest` tokens, prefix included, can use the kept keys."""
        return not must_run_alone(prepare(self.model), longest)

    @torch.no_grad()
    def label_logits(self, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]) -> Tensor:
        """Return the logits of the label words after each prompt, (R, labels).

        Args:
            prompts: token ids of whole prompts, all longer than the prefix they begin with.
            label_ids: the label words' tokens.

        Raises:
            ValueError: a prompt does not begin with the prefix, or ends with it.
        """
        own = self._own(prompts)
        if not self.can_share(max(map(len, prompts))):
            self.computed += sum(map(len, prompts))
            whole = [EncodedPrompt(list(prompt), [], []) for prompt in prompts]
            return label_logits(self.model, whole, label_ids, self.attention)[0]
        last = own.cu_seqlens[1:].long() - 1
        with only_label_logits(self.model, label_ids) as columns:
            return self._run(self.model, own, logits_to_keep=last).logits[0][:, columns]

    @torch.no_grad()
    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the last layer's states of each prompt's n tokens after the prefix, (n, width).

        Raises:
            ValueError: as `label_logits`, or these prompts cannot share a prefix.
        """
        own = self._own(prompts)
        hidden = self._run(prepare(self.model), own).last_hidden_state[0]
        return list(hidden.split(own.cu_seqlens.diff().tolist()))

    def _own(self, prompts: Sequence[Sequence[int]]) -> PackedPrompts:
        """Return the prompts without the prefix, packed."""
        length = len(self.ids)
        for i, prompt in enumerate(prompts):
            if list(prompt[:length]) != self.ids or len(prompt) == length:
                raise ValueError(f"prompts[{i}] does not continue the prefix of {length} tokens")
        own = pack([EncodedPrompt(list(prompt[length:]), [], []) for prompt in prompts])
        return replace(own, position_ids=own.position_ids + length)

    def _run(self, model: PreTrainedModel, own: PackedPrompts, **kwargs: Any) -> ModelOutput:
        if self.ids and not self._kept:
            self._kept = self._compute()
        self.computed += len(own.input_ids)
        forward = PackedForward(own, attention=self.attention, prefix=self._kept or None)
        return run_packed(model, forward, **kwargs)

    def _compute(self) -> KeysAndValues:
        last = max(attention_layers(self.model))
        kept: KeysAndValues = {}
        packed = pack([EncodedPrompt(self.ids, [], [])])
        forward = PackedForward(packed, attention=self.attention, stop_after=last, keep=kept)
        run_packed(prepare(self.model), forward)
        self.computed += len(self.ids)
        return kept


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Return the longest shared beginning that leaves every prompt a token of its own."""
    first, last = min(prompts), max(prompts)  # in their order those furthest apart
    pairs = itertools.islice(zip(first, last, strict=False), min(map(len, prompts)) - 1)
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
