"""Test whether a model finds the object in the box that is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from abft_fast.data import Boxes
from abft_fast.evaluation.call import Call, Probabilities
from abft_fast.evaluation.staicc_adapter import Triplet
from abft_fast.evaluation.staicc_tests import METRICS


class EntityTracking:
    """The test of generated boxes.

    A prompt is answered by one of its own objects. An answer is the number of the object's box, in
    the order of the prompt, so answers of all prompts can be counted together.

    Attributes:
        calls: the prompts.
        triplet: the dataset as StaICC sees it.
        answer_words: `box 1`, `box 2`, ...

    Raises:
        UserError: there are fewer objects than boxes.
    """

    def __init__(self, dataset: Boxes):
        self.triplet = Triplet(dataset, "ours")
        prompts = dataset.test_prompts(dataset.boxes)
        answers = [[box.label for box in prompt.demonstrations] for prompt in prompts]
        self.calls = [Call(self.triplet.template, prompts, answers=answers)]
        self.answer_words = [f"box {number}" for number in range(1, dataset.boxes + 1)]

    def score(self, predictions: Iterable[Probabilities]) -> dict[str, float | None]:
        """Return StaICC's four metrics by name; None where one is undefined."""
        (rows,) = predictions
        metrics = {name: metric(self.calls[0].labels, rows) for name, metric in METRICS.items()}
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
