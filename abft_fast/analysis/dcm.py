"""Desiderata-based component masking (DCM): learn which heads carry one kind of information.

A mask over heads says how much of each head's output at the last row is the source's. It is learnt
by gradient descent on -log p(target) + cost * (sum of the mask), from a mask of zeros. p is over
the label words.
Source: Prakash et al. 2024, "Fine-tuning enhances existing mechanisms", section 5. The paper uses
the target's logit, which also rewards heads that raise the logits of all labels alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.analysis.last_row import LastRow
from abft_fast.analysis.patching import patched_logits
from abft_fast.core.packing import EncodedPrompt


@dataclass(frozen=True)
class Case:
    """One prompt, what is put into it, and what it should answer then.

    Attributes:
        prompt: the original prompt.
        original: the model's forward on it; its keys and values stay as they are.
        source: (layers, Hq, D), the heads' outputs at the last row of the source prompt.
        target: index of the label word that is expected.
        label_ids: the tokens of what may answer.
    """

    prompt: EncodedPrompt
    original: LastRow
    source: Tensor
    target: int
    label_ids: Sequence[int]


@dataclass(frozen=True)
class MaskLearning:
    """How a mask is learnt.

    Attributes:
        head_cost: what a head in use costs, in nats.
        learning_rate: Adam's.
        steps: how many.
        batch_size: cases of a step, drawn anew for each.
        attention: which attention runs.
    """

    head_cost: float = 0.01
    learning_rate: float = 0.1
    steps: int = 50
    batch_size: int = 16
    attention: str = "auto"

    def learn(
        self,
        model: PreTrainedModel,
        cases: Sequence[Case],
        on_case: Callable[[int, int], None] = lambda cases, tokens: None,
    ) -> Tensor:
        """Return the mask, (layers, Hq) in 0 to 1; a head is chosen above 0.5.

        Args:
            model: a decoder with LM head; its weights are not changed.
            cases: one or more.
            on_case: called after each use of a case with 1 and the number of its tokens that ran.

        Raises:
            FloatingPointError: a logit or a gradient is not finite.
        """
        mask = torch.zeros(cases[0].source.shape[:2], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([mask], lr=self.learning_rate)
        draw = random.Random("dcm")
        for _ in range(self.steps):
            batch = draw.sample(cases, min(self.batch_size, len(cases)))
            mask.grad = torch.full_like(mask, self.head_cost)
            for case in batch:
                logits = self._answers(model, case, mask[None])[0].double()
                loss = -logits.log_softmax(dim=0)[case.target]
                (gradient,) = torch.autograd.grad(loss / len(batch), mask)
                if not (loss.isfinite() and gradient.isfinite().all()):
                    raise FloatingPointError("the logits of the label words are not finite")
                mask.grad += gradient
                on_case(1, 1)
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        return mask.detach()

    @torch.no_grad()
    def answers_target(self, model: PreTrainedModel, case: Case, masks: Tensor) -> Tensor:
        """Return whether a case answers its target under each of R masks, (R,) bool.

        Args:
            model: as in `learn`.
            case: one that no mask was learnt from.
            masks: (R, layers, Hq) bool, the heads that are patched.
        """
        return self._answers(model, case, masks).argmax(dim=1).cpu() == case.target

    def _answers(self, model: PreTrainedModel, case: Case, masks: Tensor) -> Tensor:
        return patched_logits(
            model, case.prompt, case.original, case.source, masks, case.label_ids, self.attention
        )
