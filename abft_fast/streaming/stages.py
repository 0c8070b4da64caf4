"""What is done on every block besides training: checks of the model, and tests."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core import attention, eager_attention
from abft_fast.core.autocast import product_dtype
from abft_fast.core.backbone import prepare
from abft_fast.core.label_logits import label_logits_of
from abft_fast.core.packed_forward import LossComplete, PackedForward
from abft_fast.core.packing import EncodedPrompt
from abft_fast.core.run_packed import run_packed
from abft_fast.errors import UnsupportedModel
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.evaluation_set import EvaluationSet, Outcome
from abft_fast.models.base_identity import (
    add_numbers,
    compare_bases,
    describe_name,
    described_layers,
    no_numbers,
    sample,
)
from abft_fast.models.preflight import (
    lines_on_attention,
    not_finite,
    relative_error,
    shortest_and_longest,
    tolerance,
    wrong_attention,
)
from abft_fast.prompts import EncodedPrompts
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.float32_linear import fast_float32_linear
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.tensor_file import with_prefix
from abft_fast.runtime.token_budget import in_halves
from abft_fast.streaming.group import PromptGroup
from abft_fast.streaming.model import StreamedModel


class Stage(ABC):
    """Something that is done on each block, while the block's weights are in memory.

    Attributes:
        groups: the prompts that it takes along.
        facts: what it finds on each block, for JSON: lists by block, or objects.
        results: what it finds after the last block, by prompt; 0 where another process finds it.
        waits_for_others: whether it does collectives.
    """

    waits_for_others = False

    def __init__(self, streamed: StreamedModel, accelerator: Accelerator):
        self.streamed, self.accelerator = streamed, accelerator
        self.groups: list[PromptGroup] = []
        self.facts: dict[str, Any] = {}
        self.results: list[Tensor] = []

    @abstractmethod
    def run(self, block: range) -> None:
        """Do it on one block."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint keeps of the stage: tensors by name, and facts for JSON."""
        tensors = {f"results.{index}": found for index, found in enumerate(self.results)}
        for place, group in enumerate(self.groups):
            tensors |= {f"masses.{place}.{name}": mass for name, mass in group.masses.items()}
        return tensors, self.facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take what `state` returned."""
        self.facts = facts
        for index, found in enumerate(self.results):
            found.copy_(tensors[f"results.{index}"])
        for place, group in enumerate(self.groups):
            group.masses = with_prefix(tensors, f"masses.{place}.")

    def check_restored(self) -> None:  # noqa: B027 - most stages have nothing to check
        """Refuse to go on where what was restored does not fit what is there."""


class StageInTurns(Stage):
    """A stage whose groups go through a block turn by turn; turns of other blocks may be between.

    Attributes:
        turns: the groups of each turn.
        saved_between_turns: whether a pipeline saves its walk between turns of this stage.
    """

    saved_between_turns = False

    @property
    def turns(self) -> list[list[PromptGroup]]:
        """Return the groups of each turn; unless a stage says otherwise, one group a turn."""
        return [[group] for group in self.groups]

    def run(self, block: range) -> None:
        """Take all turns on one block."""
        self.begin(block)
        for turn in range(len(self.turns)):
            self.take(block, turn)
        self.end(block)

    def begin(self, block: range) -> None:
        """Do what precedes the first turn on a block."""

    @abstractmethod
    def take(self, block: range, turn: int) -> None:
        """Run the groups of a turn through a block."""

    def end(self, block: range) -> None:
        """Do what follows the last turn on a block."""


class BaseIdentity(StageInTurns):
    """Take the numbers that identify the base, and compare them with those of an adapter or a run.

    Attributes:
        base: as `describe_base` describes it, complete after the walk.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        accelerator: Accelerator,
        progress: Progress,
        expected: dict[str, Any] | None = None,
        what: str = "",
    ):
        super().__init__(streamed, accelerator)
        self.facts = no_numbers()
        self._progress, self._expected, self._what = progress, expected, what
        self._said: list[str] = []

    @property
    def base(self) -> dict[str, Any]:
        """Return what is known of the base so far."""
        return {**describe_name(self.streamed.name, self.streamed.is_quantized), **self.facts}

    def begin(self, block: range) -> None:
        """Take the numbers of the block's layers, if they are among those that identify a model.

        Raises:
            UserError: the base is another one than expected.
        """
        for index in set(block) & set(described_layers(self.streamed.layers)):
            for name, module, own in self.streamed.parameters_of(index):
                add_numbers(self.facts, f"layers.{index}.{name}", module, own)
            self._compare(f"layers.{index}.")

    def take(self, block: range, turn: int) -> None:
        """Do nothing: there are no prompts."""

    def check_restored(self) -> None:
        """Compare the first layer's vectors with those of the walk that was saved.

        Raises:
            UserError: the base is another one.
        """
        vectors = {f"layers.0.{n}": sample(v) for n, v in self.streamed.vectors_of(0)}
        known = self.facts["vectors"]
        before = {name: numbers for name, numbers in known.items() if name in vectors}
        now = {**self.base, "vectors": vectors, "matrices": {}}
        compare_bases({**now, "vectors": before}, now, self._what)

    def _compare(self, layer: str) -> None:
        if self._expected is None:
            return
        expected = dict(self._expected)
        for kind in ("vectors", "matrices"):
            there = expected[kind].items()
            expected[kind] = {name: row for name, row in there if name.startswith(layer)}
        for line in compare_bases(expected, self.base, self._what):
            if line not in self._said:
                self._progress.say(line)
                self._said.append(line)


class AttentionCheck(StageInTurns):
    """Compare packed attention with the model's own, block by block, on two prompts.

    See `preflight.check_attention`, which does it on a whole model.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        accelerator: Accelerator,
        prompts: Sequence[EncodedPrompt],
        attention_backend: str,
        progress: Progress,
    ):
        super().__init__(streamed, accelerator)
        pair = shortest_and_longest(prompts)
        self.groups = [PromptGroup(pair, False) for _ in ("packed", "eager")]
        self._backend, self._progress = attention_backend, progress

    @property
    def turns(self) -> list[list[PromptGroup]]:
        """Return both groups as one turn."""
        return [self.groups]

    def take(self, block: range, turn: int) -> None:
        """Compare the two after this block.

        Raises:
            UserError: they differ.
            UnsupportedModel: the packed forward cannot run.
        """
        model, device = self.streamed.model, self.accelerator.device
        inner = prepare(model)
        packed, eager = self.groups
        for group in self.groups:
            group.enter(block)
        with torch.no_grad(), fast_float32_linear(), self.accelerator.autocast():
            both = range(len(packed.prompts))
            forward = packed.forward(block, both, device, attention=self._backend)
            try:
                left = run_inner(inner, forward)
            except ValueError as error:  # as where the attention asked for cannot run here
                raise UnsupportedModel(str(error)) from error
            packed.store(both, forward.leaving)
            inner.set_attn_implementation(eager_attention.NAME)
            try:
                expected = [self._alone(inner, eager, place, block) for place in both]
            finally:
                inner.set_attn_implementation(attention.NAME)
            dtype = product_dtype(left)
        for group in self.groups:
            group.leave()
        wanted = torch.cat(expected, dim=1)[0]
        if not wanted.isfinite().all():
            layers = f"model {self.streamed.name}: layers {block.start} to {block.stop - 1}"
            raise not_finite(layers, dtype)
        difference = relative_error(left[0], wanted)
        if not difference <= tolerance(inner, dtype):
            raise wrong_attention(inner, difference)
        if block.start == 0:
            for line in lines_on_attention(forward.attentions):
                self._progress.say(line)

    def _alone(self, inner: Any, group: PromptGroup, place: int, block: range) -> Tensor:
        """Return the hidden states of one prompt after the block, by the model's own attention."""
        device = self.accelerator.device
        forward = group.forward(block, [place], device)
        inputs = {"inputs_embeds": forward.entering}
        if forward.entering is None:
            inputs = {"input_ids": forward.on(device).input_ids[None]}
        try:
            left = inner(**inputs, use_cache=False, abft=forward).last_hidden_state
        except LossComplete:
            assert forward.leaving is not None
            left = forward.leaving
            group.store([place], left)
        return left


class Evaluating(StageInTurns):
    """Take the prompts of tests along; afterwards the tests have their predictions.

    Args:
        streamed: the model.
        accelerator: the device and the arithmetic.
        tests: the tests.
        tokens: most tokens of a packed batch.
        attention_backend: which attention runs.
        sharing: processes of which each takes a share of the prompts.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        accelerator: Accelerator,
        tests: Sequence[EvaluationSet],
        tokens: int,
        attention_backend: str,
        sharing: int = 1,
    ):
        super().__init__(streamed, accelerator)
        self._tests, self._backend, self._tokens = tests, attention_backend, tokens
        self._parts: dict[int, _Part] = {}
        for test in tests:
            for encoded in test.encoded:
                part = _Part(encoded, tokens * sharing)
                self._parts[id(encoded)] = part
                self.groups += part.groups
        parts = self._parts.values()
        self.results = [part.logits for part in parts]
        self._batches = [(part, indices) for part in parts for indices in part.indices]

    @torch.no_grad()
    def take(self, block: range, turn: int) -> None:
        """Run the prompts of a group through the block, of several processes each its share."""
        group, (part, indices) = self.groups[turn], self._batches[turn]
        own = group.own
        if not own:  # then there are no hidden states either
            return
        run = functools.partial(self._forward, block, part, group, indices)
        group.enter(block)
        for batch in micro_batches([group.lengths[place] for place in own], self._tokens):
            in_halves(run, [own[i] for i in batch])
        group.leave()

    def _forward(
        self,
        block: range,
        part: _Part,
        group: PromptGroup,
        indices: Sequence[int],
        places: Sequence[int],
    ) -> None:
        device = self.accelerator.device
        forward = group.forward(block, places, device, attention=self._backend)
        with fast_float32_linear(), self.accelerator.autocast():
            rows = run_block(self.streamed, block, forward, part.label_ids)
        if rows is not None:
            part.logits[[indices[place] for place in places]] = rows.float().cpu()
        group.store(places, forward.leaving)
        group.observe(block, places, forward.behavior())

    def outcomes(self) -> list[tuple[EvaluationSet, Outcome]]:
        """Return what each test found, after the last block.

        Raises:
            FloatingPointError: a label's logit is not finite.
        """
        return [(test, test.run(self._predicted)) for test in self._tests]

    def _predicted(self, encoded: EncodedPrompts, behavior: bool) -> tuple[Tensor, BehaviorMean]:
        part = self._parts[id(encoded)]
        if not part.logits.isfinite().all():
            raise FloatingPointError("the model's logits of the label words are not finite")
        heads = BehaviorMean()
        for group in part.groups if behavior else ():
            heads.join(group.behavior())
        return encoded.of_answers(part.logits), heads


def run_inner(inner: PreTrainedModel, forward: PackedForward) -> Tensor:
    """Run a decoder without LM head; return the hidden states after its block, (1, T, width)."""
    output = run_packed(inner, forward)
    return output.last_hidden_state if forward.leaving is None else forward.leaving


def run_block(
    streamed: StreamedModel, block: range, forward: PackedForward, label_ids: Sequence[int]
) -> Tensor | None:
    """Run R prompts through a block.

    Returns:
        Behind the last layer the label words' logits, (R, labels); None before it.
    """
    if block.stop < streamed.layers:
        run_packed(prepare(streamed.model), forward)
        return None
    return label_logits_of(streamed.model, forward, label_ids)


class _Part:
    """The prompts of one part of a test in groups of so many tokens, and the predictions."""

    def __init__(self, encoded: EncodedPrompts, tokens: int):
        lengths = [len(prompt) for prompt in encoded.prompts]
        self.indices = list(micro_batches(lengths, tokens))
        self.groups = [PromptGroup([encoded.prompts[i] for i in batch]) for batch in self.indices]
        self.label_ids = encoded.label_ids
        self.logits = torch.zeros(len(lengths), len(encoded.label_ids))
