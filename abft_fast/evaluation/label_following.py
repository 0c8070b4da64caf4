"""Test whether a model follows the labels of its demonstrations, or what the words mean.

The same test prompts are predicted three times: with the dataset's own label words, with these
words rotated in all demonstrations (the expected answer rotates along), and with words that mean
nothing here, new ones in each prompt. A model that reads its context answers all three alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from abft_fast.data import Dataset
from abft_fast.errors import UserError
from abft_fast.evaluation.call import Call, Probabilities
from abft_fast.evaluation.intervals import wilson
from abft_fast.evaluation.staicc_adapter import Triplet
from abft_fast.prompts.symbols import draw_symbols, with_labels

_TIMES_ASKED = 2  # each query, with other demonstrations


class LabelFollowing:
    """The test on one dataset.

    Args:
        dataset: queries and demonstrations are from it, as in StaICC's test `Normal`.
        k: demonstrations a prompt.
        form: `ours` or `staicc`.
        words: words that may stand for labels; see `PromptEncoder.symbols`.

    Attributes:
        calls: the prompts with own, rotated and new label words.
        triplet: the dataset as StaICC sees it.
        answer_words: the dataset's own label words.

    Raises:
        UserError: the dataset has one label, or there are too few words.
    """

    def __init__(self, dataset: Dataset, k: int, form: str, words: Sequence[str]):
        labels = len(dataset.label_words)
        if labels < 2:
            raise UserError(f"LabelFollowing: {dataset.name} has one label, so nothing can rotate")
        self.triplet = Triplet(dataset, form)
        template = self.triplet.template
        self.answer_words = template.label_words
        own = dataset.test_prompts(k)
        rotation = [(label + 1) % labels for label in range(labels)]
        rotated = [with_labels(prompt, rotation) for prompt in own]
        drawn = draw_symbols(own, labels, words, f"{dataset.name}-test")
        symbols = [with_labels(*pair) for pair in zip(own, drawn, strict=True)]
        self.calls = [
            Call(template, own),
            Call(template, rotated, shows_behavior=False),
            Call(
                replace(template, label_words=tuple(words)),
                symbols,
                shows_behavior=False,
                answers=drawn,
            ),
        ]

    def score(self, predictions: Iterable[Probabilities]) -> dict[str, float | None]:
        """Return shares of the prompts that were predicted, each with its 95 % interval.

        `own`, `rotated` and `symbols` are accuracies. `override_rate` and `prior_rate` are of the
        rotated prompts whose query is answered correctly with own labels: the part answered by the
        demonstrations, and the part still answered by the own label. `one_label_share` is the part
        of the prompts whose demonstrations all have one label.
        """
        answers = [list(map(_answer, rows)) for rows in predictions]
        wanted = [call.labels for call in self.calls]
        metrics: dict[str, float | None] = {}
        for name, given, right in zip(("own", "rotated", "symbols"), answers, wanted, strict=True):
            pairs = zip(given, right, strict=True)
            metrics |= _share(name, [g == r for g, r in pairs if g is not None])
        known = [
            (answer, before, after)
            for answer_before, before, answer, after in zip(
                answers[0], wanted[0], answers[1], wanted[1], strict=True
            )
            if answer_before == before and answer is not None
        ]
        metrics |= _share("override_rate", [answer == after for answer, _, after in known])
        metrics |= _share("prior_rate", [answer == before for answer, before, _ in known])
        alike = [len({d.label for d in p.demonstrations}) == 1 for p in self.calls[0].prompts]
        return metrics | {"one_label_share": sum(alike) / len(alike)}


def _answer(row: Sequence[float]) -> int | None:
    """Return the most probable of a prompt's answers; None for a prompt left out."""
    return max(range(len(row)), key=row.__getitem__) if len(row) else None


def _share(name: str, is_so: Sequence[bool]) -> dict[str, float | None]:
    """Return a share and its interval; an answer counts as half a trial, as queries come twice."""
    if not is_so:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    share, low, high = wilson(sum(is_so) / len(is_so), len(is_so) / _TIMES_ASKED)
    return {name: share, f"{name}_low": low, f"{name}_high": high}
