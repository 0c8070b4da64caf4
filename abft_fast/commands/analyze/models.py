"""Load what analyses share: a base with its tuned model, or what training added to its weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.analysis.pair import ModelPair, check_same_shapes
from abft_fast.analysis.patching import check_can_patch
from abft_fast.commands import adapter_origin
from abft_fast.commands.session import ModelOnDevice, PromptSession
from abft_fast.core.packing import EncodedPrompt
from abft_fast.data import Boxes, Dataset
from abft_fast.evaluation.call import Call
from abft_fast.evaluation.entity_tracking import EntityTracking
from abft_fast.evaluation.staicc_tests import StaiccTest
from abft_fast.models import loading
from abft_fast.models.base_identity import compare_adapter, describe_base
from abft_fast.models.files import refuse_biases
from abft_fast.models.merging import changes_of, untie
from abft_fast.options import (
    AnalyzeOptions,
    ComparedOnPromptsOptions,
    ComparedOptions,
    DrawnPromptOptions,
    PlaneConfig,
)
from abft_fast.prompts import EncodedPrompts
from abft_fast.runtime.progress import Progress


class MovableModel(ModelOnDevice):
    """Load a base whose weights are moved, and what trained models add to them."""

    def load_movable(self) -> None:
        """Read the base in training's dtype, then make it float32: adding a change rounds nothing.

        Adapters were trained on the rounded values of a quantized base, or of one in bfloat16.
        """
        self.load()
        if getattr(self.model.config, "quantization_config", None) is not None:
            self.model = self.model.dequantize()
        self.model = self.model.float()

    def changes_of_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Return what an adapter adds to the base's weights, by name.

        The LM head gets a parameter of its own, so that each weight can be moved alone.

        Raises:
            UserError: the adapter has another base, or PEFT cannot put it into weights.
        """
        base = describe_base(self.model, self.config.model)
        for line in compare_adapter(folder, base):
            self.progress.say(line)
        self.model, changes = changes_of(self.model, [(folder, 1.0)], lambda line: None)
        untie(self.model)
        return changes

    def changes_of_model(self, name: str) -> dict[str, Tensor]:
        """Return what another model's weights have more than the base's, by name.

        Raises:
            UserError: the model cannot be loaded, or has another shape.
        """
        tuned = self.load_other(name, torch.float32)
        check_same_shapes(self.model, tuned)
        untie(self.model)
        return _difference(self.model, tuned)

    def load_other(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        """Return another model, which is not quantized here.

        Raises:
            UserError: the model cannot be loaded.
        """
        self.progress.say(f"loading {name}")
        return loading.load(name, self.accelerator.device, dtype, None, self.placement)


class ComparedModels(MovableModel):
    """Load the base and the tuned model."""

    config: ComparedOptions

    def pair(self) -> ModelPair:
        """Return the two models; without a tuned one the base is both.

        Raises:
            UserError: a model cannot be loaded, or the two do not fit each other.
        """
        for folder in self.config.adapter_folders:  # PEFT would leave biases where it is off
            refuse_biases(folder, "`abft-fast merge` it and give the result by --tuned")
        self.load()
        if self.config.adapter is not None:
            self.load_adapter(self.config.adapter)
        tuned = None
        if self.config.tuned is not None:
            tuned = self.load_other(self.config.tuned, self.arithmetic.dtype)
        return ModelPair(self.model, tuned)

    def sides(self, pair: ModelPair) -> dict[str, Callable[[], AbstractContextManager]]:
        """Return what gives the models to compare: the base and, where there is one, the tuned."""
        has_tuned = self.config.adapter is not None or self.config.tuned is not None
        return {"before": pair.base, **({"after": pair.tuned} if has_tuned else {})}

    def changes(self) -> dict[str, Tensor]:
        """Load the base; return what training adds to its weights, by name.

        Raises:
            UserError: as `pair`, or PEFT cannot put the adapter into weights.
        """
        if self.config.tuned is not None:
            self.load_as(torch.float32)
            return self.changes_of_model(self.config.tuned)
        self.load_movable()
        assert self.config.adapter is not None  # the options are checked
        return self.changes_of_adapter(self.config.adapter)


class DrawnPrompts(PromptSession):
    """Add prompts that are drawn from a dataset's test.

    Attributes:
        drawn: the prompts.
        encoded: the prompts, tokenized.
    """

    config: AnalyzeOptions

    def __init__(self, config: AnalyzeOptions, progress: Progress):
        super().__init__(config, progress)
        self.drawn, self.encoded = self._draw()
        self.show_data(self.encoded.prompts)

    def _draw(self) -> tuple[Call, EncodedPrompts]:
        call = call_of_test(self.config, self.dataset)
        is_asked_once = isinstance(self.dataset, Boxes)
        queries = call.prompts if is_asked_once else [prompt.query for prompt in call.prompts]
        drawn = call.only(draw_queries(queries, self.config.prompts))
        encoded = drawn.encode(self.encoder)
        self.say_too_long(encoded, "test", "with fewer demonstrations")
        return drawn.only(encoded.kept), encoded


class AnalysisSession(DrawnPrompts, ComparedModels):
    """Hold prompts and the two models that are compared on them."""

    config: ComparedOnPromptsOptions

    def __init__(self, config: ComparedOnPromptsOptions, progress: Progress):
        super().__init__(config, progress)
        for line in adapter_origin.differences(config):
            progress.say(line)

    def check_can_patch(self, prompts: Sequence[EncodedPrompt], what: str = "output") -> None:
        """Refuse a model whose heads cannot be patched; see `analysis.patching`.

        Raises:
            UserError: the model is such a one.
        """
        label_ids, backend = self.encoder.label_ids, self.config.attention_backend
        with self.accelerator.autocast():
            check_can_patch(self.model, prompts, label_ids, what, backend)


class PlaneSession(DrawnPrompts, MovableModel):
    """Hold prompts and a base whose weights are moved."""

    config: PlaneConfig

    def __init__(self, config: PlaneConfig, progress: Progress):
        super().__init__(config, progress)


def draw_queries(queries: Sequence[Hashable], count: int) -> list[int]:
    """Return the indices, ascending, of prompts drawn at random, no two of the same query.

    StaICC's tests ask each query twice. The two answers are not independent, and heads must not be
    judged by a query that ranked them.

    Args:
        queries: what each prompt asks.
        count: prompts to draw; more than there are different queries draws one of each.
    """
    chosen: dict[Hashable, int] = {}
    for place in random.Random("analyze").sample(range(len(queries)), len(queries)):
        chosen.setdefault(queries[place], place)
    return sorted(list(chosen.values())[:count])


def call_of_test(config: DrawnPromptOptions, dataset: Dataset) -> Call:
    """Return all prompts of the test that the options name.

    Raises:
        UserError: the dataset does not allow the test.
    """
    if isinstance(dataset, Boxes):
        return EntityTracking(dataset).calls[0]
    (call,) = StaiccTest.of(config.test_type, dataset, config.k, config.prompt_form).calls
    return call


def _difference(base: PreTrainedModel, tuned: PreTrainedModel) -> dict[str, Tensor]:
    """Return what the tuned model has more than the base, of every weight that differs."""
    others = dict(tuned.named_parameters(remove_duplicate=False))
    changes = {}
    with torch.no_grad():
        for name, weight in base.named_parameters(remove_duplicate=False):
            change = others[name].to(weight) - weight
            if change.any():
                changes[name] = change
    return changes
