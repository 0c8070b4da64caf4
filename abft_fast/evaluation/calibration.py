"""StaICC's calibrations of label probabilities, baselines in the paper's Table 1.

StaICC trains a calibration by running the model once for each prompt. Here a calibration is trained
twice: the first time its prompts are recorded; they are predicted together; the second time it gets
their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from StaICC.prefabricate_inference import standard_calibration

from abft_fast.data import Prompt
from abft_fast.evaluation.call import Call, Probabilities
from abft_fast.evaluation.staicc_adapter import PromptWriter, Triplet, quiet
from abft_fast.options import CalibrationType

_TRAINED = {
    "contextual": standard_calibration.contextual_calibration,  # Zhao et al. 2021
    "domain": standard_calibration.domain_calibration,  # Fei et al. 2023
}


class Calibration:
    """The calibration of one dataset's predictions, trained on prompts of its training examples.

    Attributes:
        call: the prompts whose predictions it learns from; None where it learns from none.
    """

    def __init__(self, kind: CalibrationType, triplet: Triplet, k: int, samples: int):
        """Record the prompts that the calibration learns from.

        Args:
            kind: which calibration.
            triplet: the dataset as StaICC sees it.
            k: demonstrations a prompt.
            samples: prompts to learn from.
        """
        self._kind, self._triplet, self._k, self._samples = kind, triplet, k, samples
        self.call: Call | None = None
        if kind in _TRAINED:
            words = len(triplet.template.label_words)
            prompts: list[Prompt] = []

            def note(prompt: Prompt, label_space: Sequence[str]) -> list[float]:
                prompts.append(prompt)
                return [1 / words] * words

            self._train(note)
            self.call = Call(triplet.template, prompts)

    def calibrate(
        self, predictions: Sequence[Probabilities], learnt_from: Probabilities | None
    ) -> Iterator[Probabilities]:
        """Yield the calibrated predictions of each call; prompts left out stay left out.

        Args:
            predictions: probabilities of the label words, by call.
            learnt_from: predictions of the prompts in `call`; None without a `call`.
        """
        if learnt_from is not None:
            remaining = iter(learnt_from)
            trained = self._train(lambda prompt, label_space: next(remaining))
        for rows in predictions:
            kept = [row for row in rows if row]
            if learnt_from is not None:
                kept = [trained(row, None, None) for row in kept]
            elif self._kind == "batch":  # Zhou et al. 2024
                kept = standard_calibration.batch_calibration(kept)
            calibrated = iter(kept)
            yield [next(calibrated) if row else row for row in rows]

    def _train(self, feedforward: Callable) -> standard_calibration.calibration:
        made = _TRAINED[self._kind](list(self._triplet.template.label_words))
        with quiet():
            made.train(
                PromptWriter(self._triplet).write_prompt_from_dataline,
                feedforward,
                self._triplet.calibration,
                self._samples,
                k=self._k,
            )
        return made
