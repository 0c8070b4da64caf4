"""One test of one dataset: tokenized once, then predicted and scored as often as needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from StaICC.util import functional
from torch import Tensor

from abft_fast.core.packing import EncodedPrompt
from abft_fast.data import Boxes, Dataset, Example, Prompt
from abft_fast.errors import UserError
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.calibration import Calibration
from abft_fast.evaluation.call import Test
from abft_fast.evaluation.entity_tracking import EntityTracking
from abft_fast.evaluation.label_following import LabelFollowing
from abft_fast.evaluation.staicc_tests import StaiccTest
from abft_fast.options import Options
from abft_fast.prompts import EncodedPrompts, PromptEncoder

Predict = Callable[[EncodedPrompts, bool], tuple[Tensor, BehaviorMean]]
"""Return answers' logits, (prompts, answers), and what heads do if the flag asks for it."""


@dataclass(frozen=True)
class Outcome:
    """What one run of a test found.

    Attributes:
        metrics: metrics by name; None where one is undefined.
        behavior: what the heads did on prompts whose query has a label.
        queries: the number of each prompt's query, in the test's first call.
        labels: its true label, an index of its answers.
        probabilities: what was predicted for them, after calibration; empty for a prompt left out.
    """

    metrics: dict[str, float | None]
    behavior: BehaviorMean
    queries: list[int]
    labels: list[int]
    probabilities: list[list[float]]


class EvaluationSet:
    """A dataset's test prompts, by the protocol and the calibration of the options.

    Args:
        options: how prompts are made and calibrated.
        dataset: the dataset.
        encoder: its encoder.
        test_type: one test of `options.test_types`.

    Attributes:
        dataset: the dataset's name.
        test_type: the test.
        label_words: the names of the answers.
        encoded: its prompts, tokenized, as they are to be predicted, those of the test first.

    Raises:
        UserError: the dataset does not allow the test, or its prompts cannot be tokenized.
    """

    def __init__(self, options: Options, dataset: Dataset, encoder: PromptEncoder, test_type: str):
        self.dataset, self.test_type = dataset.name, test_type
        if options.test_samples is not None:
            dataset = dataset.with_queries(options.test_samples)
        form = options.prompt_form
        self._test: Test
        if test_type == "LabelFollowing":
            words = encoder.symbols.test
            self._test = LabelFollowing(dataset, options.k, form, words)
        elif isinstance(dataset, Boxes):
            self._test = EntityTracking(dataset)
        else:
            self._test = StaiccTest.of(test_type, dataset, options.k, form)
        self.label_words = list(self._test.answer_words)
        self._calibration = Calibration(
            options.calibration, self._test.triplet, options.k, options.calibration_samples
        )
        calls = list(self._test.calls)
        if self._calibration.call is not None:
            calls.append(self._calibration.call)
        numbers: dict[Example | Prompt, int] = {}
        asked = [  # a box is no query without its prompt
            prompt if isinstance(dataset, Boxes) else prompt.query for prompt in calls[0].prompts
        ]
        self._queries = [numbers.setdefault(query, len(numbers)) for query in asked]
        self._labels = calls[0].labels
        self._sizes = [len(call.prompts) for call in calls]
        self._measures = [call.measures_behavior for call in calls]
        self.encoded = [call.encode(encoder) for call in calls]
        self._check_all_kept(options)

    @property
    def prompts(self) -> list[EncodedPrompt]:
        """Return the prompts of the test's first call."""
        return self.encoded[0].prompts

    @property
    def label_ids(self) -> set[int]:
        """Return the tokens of all its label words."""
        return {token for encoded in self.encoded for token in encoded.label_ids}

    def run(self, predict: Predict) -> Outcome:
        """Predict every prompt and score the predictions."""
        predictions, behavior = [], BehaviorMean()
        for encoded, size, measures in zip(self.encoded, self._sizes, self._measures, strict=True):
            logits, heads = predict(encoded, measures)
            behavior.join(heads)
            rows: list[list[float]] = [[] for _ in range(size)]
            for i, row in zip(encoded.kept, logits.tolist(), strict=True):
                rows[i] = functional.softmax(row)
            predictions.append(rows)
        learnt_from = predictions.pop() if self._calibration.call is not None else None
        calibrated = list(self._calibration.calibrate(predictions, learnt_from))
        first = [[float(value) for value in row] for row in calibrated[0]]
        metrics = self._test.score(calibrated)
        return Outcome(metrics, behavior, self._queries, self._labels, first)

    def _check_all_kept(self, options: Options) -> None:
        """Refuse dropped or shortened prompts where StaICC needs every one, or all of it."""
        needs_all = self.test_type.endswith("Sensitivity")
        if needs_all and any(encoded.dropped for encoded in self.encoded):
            self._refuse(f"--test-type {self.test_type} compares all predictions of a query")
        if self.test_type == "GLER" and any(encoded.shortened for encoded in self.encoded):
            raise UserError(
                f"{self.dataset}: --test-type GLER counts wrong labels among {options.k} "
                "demonstrations, and some prompts are too long for all of them: lower --k, or pass "
                "--on-long-prompt drop"
            )
        if self._calibration.call is not None and self.encoded[-1].dropped:
            self._refuse(f"--calibration {options.calibration} learns from every prompt")

    def _refuse(self, why: str) -> None:
        raise UserError(
            f"{self.dataset}: {why}, and some prompts are longer than the model's context: "
            "lower --k, or pass --on-long-prompt fewer-demonstrations"
        )
