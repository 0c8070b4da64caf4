"""Label texts block by block; the beginning that all prompts share is computed once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from abft_fast.core.autocast import product_dtype
from abft_fast.core.backbone import attention_layers, prepare
from abft_fast.core.packed_forward import KeysAndValues, PackedForward
from abft_fast.core.packing import EncodedPrompt
from abft_fast.core.run_packed import run_packed
from abft_fast.errors import UserError
from abft_fast.models.preflight import relative_error, tolerance
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.float32_linear import fast_float32_linear
from abft_fast.runtime.token_budget import in_halves
from abft_fast.streaming.group import PromptGroup
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import Stage, run_block, run_inner


class Labelling(Stage):
    """Take prompts along that begin alike; afterwards their label words have logits.

    On each block the shared beginning runs first. Its keys and values are kept until all prompts
    have gone on from them. See `core.shared_prefix`, which does it on a whole model.

    Args:
        streamed: the model.
        accelerator: the device and the arithmetic.
        prompts: token ids of whole prompts.
        prefix: token ids that all prompts begin with; no prompt ends with them.
        label_ids: the label words' tokens.
        tokens: most tokens of a packed batch.
        attention_backend: which attention runs.
        check: compare two prompts that go on from the prefix with the same prompts as a whole.

    Attributes:
        logits: (R, labels), of the label words after each prompt, complete after the walk.

    Raises:
        UserError: prompts are so long that the family cannot pack them.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        accelerator: Accelerator,
        prompts: Sequence[list[int]],
        prefix: list[int],
        label_ids: list[int],
        tokens: int,
        attention_backend: str,
        check: bool,
    ):
        super().__init__(streamed, accelerator)
        streamed.check_length(max(map(len, prompts)))
        self._label_ids, self._backend = label_ids, attention_backend
        self.logits = torch.empty(len(prompts), len(label_ids))
        self._shared = len(prefix)
        self._prefix = _group([prefix]) if prefix else None
        own = [ids[len(prefix) :] for ids in prompts]
        self._batches = list(micro_batches(list(map(len, own)), tokens))
        self._queries = [_group([own[i] for i in batch]) for batch in self._batches]
        self._pair = []
        if prefix and check:
            pair = [min(prompts, key=len), max(prompts, key=len)]
            self._pair = [_group(pair), _group([ids[len(prefix) :] for ids in pair])]
        self.groups = [*([self._prefix] if self._prefix else []), *self._pair, *self._queries]

    @torch.no_grad()
    def run(self, block: range) -> None:
        """Run the prefix, then all prompts, through the block.

        Raises:
            UserError: hidden states after the prefix differ from those of whole prompts.
        """
        with fast_float32_linear(), self.accelerator.autocast():
            kept = self._run_prefix(block)
            if self._pair:
                self._compare(block, kept)
            for group, indices in zip(self._queries, self._batches, strict=True):
                group.enter(block)
                run = functools.partial(self._label, block, kept, group, indices)
                in_halves(run, range(len(indices)))
                group.leave()

    def _run_prefix(self, block: range) -> KeysAndValues | None:
        """Return the prefix's keys and values in the block's layers; None without a prefix."""
        if self._prefix is None:
            return None
        kept: KeysAndValues = {}
        inner = prepare(self.streamed.model)
        self._prefix.enter(block)
        last = max(attention_layers(inner))
        forward = self._forward(block, self._prefix, [0], stop_after=last, keep=kept)
        run_packed(inner, forward)
        self._prefix.store([0], forward.leaving)
        self._prefix.leave()
        return kept

    def _label(
        self,
        block: range,
        kept: KeysAndValues | None,
        group: PromptGroup,
        indices: Sequence[int],
        places: Sequence[int],
    ) -> None:
        forward = self._forward(block, group, places, prefix=kept)
        rows = run_block(self.streamed, block, forward, self._label_ids)
        if rows is not None:
            self.logits[[indices[place] for place in places]] = rows.float().cpu()
        group.store(places, forward.leaving)

    def _compare(self, block: range, kept: KeysAndValues | None) -> None:
        inner = prepare(self.streamed.model)
        states = []
        for group, prefix in zip(self._pair, (None, kept), strict=True):
            group.enter(block)
            forward = self._forward(block, group, (0, 1), prefix=prefix)
            left = run_inner(inner, forward)
            group.store((0, 1), forward.leaving)
            group.leave()
            states.append(left[0].split(group.lengths))
        whole, continued = states
        expected = [all_of[-len(own) :] for all_of, own in zip(whole, continued, strict=True)]
        difference = relative_error(torch.cat(continued), torch.cat(expected))
        if not difference <= tolerance(inner, product_dtype(continued[0])):
            raise UserError(
                f"{inner.config.model_type}: hidden states after the demonstrations differ by "
                f"{difference:.1%} from those of whole prompts: predict without --stream"
            )

    def _forward(
        self,
        block: range,
        group: PromptGroup,
        places: Sequence[int],
        prefix: KeysAndValues | None = None,
        **asked: Any,
    ) -> PackedForward:
        first = 0 if prefix is None else self._shared
        device = self.accelerator.device
        return group.forward(
            block, places, device, first, attention=self._backend, prefix=prefix, **asked
        )


def _group(prompts: Sequence[list[int]]) -> PromptGroup:
    return PromptGroup([EncodedPrompt(ids, [], []) for ids in prompts])
