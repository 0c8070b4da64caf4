"""StaICC's tests: the prompts that are predicted, and the metrics of the predictions.

StaICC's experimentors draw the prompts and score the predictions; the model runs in between.
Source: StaICC 0.1.1; for unseen labels, Cho et al. 2025, A.4.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from StaICC.util import experimentor, functional
from StaICC.util.experimentor import single_experimentor

from abft_fast.data import Dataset, Prompt
from abft_fast.errors import UserError
from abft_fast.evaluation.call import Call, Probabilities
from abft_fast.evaluation.staicc_adapter import Triplet, install, quiet

_ERROR_RATES = 5  # of GLER: 0, 25, ..., 100 % of the demonstrations' labels are wrong
_TEMPLATE_QUERIES = 100
_SAMPLES_A_QUERY = 8  # demonstrations drawn for each query of DemoSensitivity
_MOST_DRAWS = 10**7  # 2 minutes


@dataclass
class _Experiment:
    """An experimentor, and what names its results."""

    experimentor: single_experimentor
    named_results: Callable[[dict], dict[str, float]]
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        def record(prompt: list[Prompt], label_space: list[str]) -> list[list[float]]:
            self.calls.append(Call(self.experimentor.prompt_former.template, prompt))
            return [[1 / len(label_space)] * len(label_space)] * len(prompt)

        self.run(record)

    def run(self, inference: Callable) -> dict[str, float | None]:
        made = self.experimentor
        made.predictions = []  # of the run before: TempSensitivity would go on from them
        with quiet():
            results, _ = made.auto_run(inference, batched_inference=True)
        return {
            name: value if math.isfinite(value) else None
            for name, value in self.named_results(results).items()
        }


class StaiccTest:
    """One of StaICC's tests on one dataset.

    Attributes:
        calls: the prompts, in the order in which predictions are wanted.
        triplet: the dataset as StaICC sees it.
        answer_words: the names of the answers.
    """

    def __init__(self, triplet: Triplet, experiments: Sequence[_Experiment]):
        self.triplet = triplet
        self._experiments = experiments
        self.calls = [call for each in experiments for call in each.calls]
        self.answer_words = triplet.template.label_words

    @staticmethod
    def of(test_type: str, dataset: Dataset, k: int, form: str = "ours") -> StaiccTest:
        """Draw the prompts of a test.

        Args:
            test_type: which test.
            dataset: queries and demonstrations are from it.
            k: demonstrations a prompt.
            form: `ours` or `staicc`, which may have other label words.

        Raises:
            UserError: the dataset does not allow the test with so many demonstrations.
        """
        dataset.check_test(k)
        with quiet():
            return _MAKERS[test_type](dataset, k, form)

    def score(self, predictions: Iterable[Probabilities]) -> dict[str, float | None]:
        """Return StaICC's metrics by name, given each call's predictions; None where undefined."""
        remaining = iter(predictions)

        def replay(prompt: Prompt, label_space: Sequence[str]) -> list[list[float]]:
            return [list(row) for row in next(remaining)]

        return {
            name: value for each in self._experiments for name, value in each.run(replay).items()
        }


def _made(
    kind: type[single_experimentor], triplet: Triplet, k: int, **options: Any
) -> single_experimentor:
    return kind(triplet_dataset=triplet, k=k, **options)


def _normal(dataset: Dataset, k: int, form: str, *, unseen: bool = False) -> StaiccTest:
    triplet = Triplet(dataset, form)
    made = _made(single_experimentor, triplet, k, metrics=METRICS)
    install(made, dataset.test, 2 * len(dataset.test))
    if unseen:
        _check_unseen(dataset, k)
        made.set_out_of_domain_mode()
    return StaiccTest(triplet, [_Experiment(made, dict)])


def _check_unseen(dataset: Dataset, k: int) -> None:
    """Refuse what StaICC would draw forever: it draws until no demonstration has the label."""
    pool = Counter(example.label for example in dataset.demonstrations)
    size, draws = len(dataset.demonstrations), 0.0
    for label, queries in Counter(example.label for example in dataset.test).items():
        others = size - pool[label]
        if others < k:
            raise UserError(
                f"UnseenLabel: {dataset.name} has {others} demonstrations of labels other than "
                f"{dataset.label_words[label]!r}: lower --k to {others}"
            )
        chance = math.prod((others - i) / (size - i) for i in range(k))
        draws += 2 * queries * (1 - chance) / chance
    if draws > _MOST_DRAWS:
        raise UserError(
            f"UnseenLabel: k={k} demonstrations of {dataset.name} rarely lack a label, so the "
            f"test would take {draws:.0e} draws: lower --k"
        )


def _gler(dataset: Dataset, k: int, form: str) -> StaiccTest:
    _check_demonstrations("GLER", k)
    triplet = Triplet(dataset, form)
    made = _made(
        experimentor.GLER_experimentor, triplet, k, sensitivity_test=_ERROR_RATES, metrics=METRICS
    )

    def names(results: dict) -> dict[str, float]:
        named: dict[str, float] = {}
        for metric, (slope, intercept) in results["sensitivity"].items():
            named |= {f"{metric}_slope": slope, f"{metric}_intercept": intercept}
        for i in range(_ERROR_RATES):
            percent = 100 * i // (_ERROR_RATES - 1)
            for metric, value in results[str(i)].items():
                named[f"{metric}_at_{percent}_percent_wrong"] = value
        return named

    return StaiccTest(
        triplet, [_Experiment(install(made, dataset.test, 2 * len(dataset.test)), names)]
    )


def _template_sensitivity(dataset: Dataset, k: int, form: str) -> StaiccTest:
    if dataset.alternate_template is None:
        raise UserError(
            f"TempSensitivity: {dataset.name} has no alternate templates; use another --test-type"
        )
    triplet = Triplet(dataset, form)
    test = dataset.test[:_TEMPLATE_QUERIES]
    made = _made(
        experimentor.template_sensitivity_experimentor, triplet, k, metrics=_consistency(len(test))
    )
    return StaiccTest(triplet, [_Experiment(install(made, test, len(test)), _sensitivity)])


def _demonstration_sensitivity(dataset: Dataset, k: int, form: str) -> StaiccTest:
    _check_demonstrations("DemoSensitivity", k)
    triplet = Triplet(dataset, form)
    test = dataset.test[: 2 * len(dataset.test) // _SAMPLES_A_QUERY]
    if not test:
        raise UserError(
            f"DemoSensitivity: {dataset.name} has {len(dataset.test)} test examples, but the test "
            f"needs {_SAMPLES_A_QUERY // 2} or more"
        )
    made = _made(
        experimentor.demonstration_sensitivity_experimentor,
        triplet,
        k,
        metrics=_consistency(len(test)),
        sensitivity_test=_SAMPLES_A_QUERY,
    )
    return StaiccTest(
        triplet, [_Experiment(install(made, test, 2 * len(dataset.test)), _sensitivity)]
    )


def _triplet_bias(dataset: Dataset, k: int, form: str) -> StaiccTest:
    triplet = Triplet(dataset, form)
    parts = []
    # A triplet for each: StaICC's experimentors and `install` change theirs.
    for bias in ("contextual", "domain"):
        metrics = {
            "entropy": _kept(functional.bias_mean_entropy_metric),
            "distribution": _kept(functional.bias_mean_metric),
        }
        kind = experimentor.prior_bias_experimentor
        made = _made(kind, Triplet(dataset, form), k, metrics=metrics, bias_type=bias)
        parts.append((made, bias))
    metrics = {
        "divergence": _kept(functional.post_bias_dl_metric),
        "distribution": _kept(functional.post_bias_dis_metric),
    }
    kind = experimentor.post_bias_experimentor
    parts.append((_made(kind, Triplet(dataset, form), k, metrics=metrics), "post"))

    def names(bias: str, results: dict) -> dict[str, float]:
        named = {f"{bias}_{name}": v for name, v in results.items() if name != "distribution"}
        words = zip(triplet.template.label_words, results["distribution"], strict=True)
        return named | {f"{bias}_distribution_{word}": value for word, value in words}

    return StaiccTest(
        triplet,
        [
            _Experiment(
                install(made, dataset.test, 2 * len(dataset.test)), functools.partial(names, bias)
            )
            for made, bias in parts
        ],
    )


_MAKERS: dict[str, Callable[[Dataset, int, str], StaiccTest]] = {
    "Normal": _normal,
    "UnseenLabel": functools.partial(_normal, unseen=True),
    "GLER": _gler,
    "TempSensitivity": _template_sensitivity,
    "DemoSensitivity": _demonstration_sensitivity,
    "TripletBias": _triplet_bias,
}


def _check_demonstrations(test_type: str, k: int) -> None:
    if k == 0:
        raise UserError(
            f"--k 0: {test_type} changes demonstrations, so it needs at least one of them"
        )


def _sensitivity(results: dict) -> dict[str, float]:
    return results["sensitivity"]


def _consistency(queries: int) -> dict[str, Callable]:
    return {"consistency": functools.partial(functional.consistency, loop_length=queries)}


def _kept(metric: Callable) -> Callable:
    """Return StaICC's metric over the prompts that were not left out; nan where it is undefined."""

    def of_kept(truth: list[int], predictions: Probabilities) -> float | Sequence[float]:
        pairs = [(t, row) for t, row in zip(truth, predictions, strict=True) if len(row)]
        try:
            return metric([t for t, _ in pairs], [row for _, row in pairs])
        except (ValueError, ZeroDivisionError):  # fewer prompts than bins; a label no query has
            return math.nan

    return of_kept


METRICS = {
    "accuracy": _kept(functional.accuracy),
    "macro_f1": _kept(functional.macro_F1),
    "true_label_likelihood": _kept(functional.averaged_truelabel_likelihood),
    "expected_calibration_error": _kept(functional.expected_calibration_error_1),
}
"""StaICC's four metrics (its `util.functional`)."""
