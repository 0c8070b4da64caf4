"""`abft-fast analyze dcm`: which heads carry the label word, the position, and the query's text."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.analysis.dcm import Case, MaskLearning
from abft_fast.analysis.desiderata import DESIDERATA
from abft_fast.analysis.last_row import LastRow, run_prompt
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import AnalysisSession
from abft_fast.commands.analyze.results import Results
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.evaluation.intervals import Interval, wilson
from abft_fast.options import DcmConfig
from abft_fast.runtime.progress import Progress


class Pair(NamedTuple):
    """An original prompt by its index, the source, and the label expected."""

    original: int
    source: EncodedPrompt
    target: int


class Learnt(NamedTuple):
    """What one mask is, and what it does to prompts that it was not learnt from.

    Attributes:
        mask: (layers, Hq), 0 to 1.
        chosen: (layers, Hq) bool, the heads above 0.5.
        answered: part of the prompts that answer the target with no head patched (`none`), the
            chosen heads (`chosen`) and all heads (`all`).
        prompts: how many prompts were tested.
    """

    mask: NDArray[np.float64]
    chosen: NDArray[np.bool_]
    answered: dict[str, Interval]
    prompts: int


def dcm(config: DcmConfig, progress: Progress) -> Results:
    """Learn a mask over heads for each desideratum, in the base and in the tuned model.

    Masks are learnt on one half of the prompts and tested on the other half.

    Raises:
        UserError: the options, the models or the data do not allow it.
    """
    session = AnalysisSession(config, progress)
    pairs = {name: _pairs(session, name) for name in config.chosen}
    pair = session.pair()
    sources = [each.source for some in pairs.values() for each in some]
    prompts = [*session.encoded.prompts, *sources]
    session.check_attention(prompts)
    session.check_can_patch(prompts)
    pair.keep_label_rows(session.encoder.label_ids)
    sides = session.sides(pair)
    learning = MaskLearning(
        config.head_cost,
        config.learning_rate,
        config.steps,
        config.batch_size,
        config.attention_backend,
    )
    learnt: dict[tuple[str, str], Learnt] = {}
    uses = sum(
        learning.steps * min(learning.batch_size, len(some[::2])) + len(some[1::2])
        for some in pairs.values()
    )
    with progress.bar(
        "masks",
        len(sides) * (len(prompts) + uses),
        len(sides) * (sum(map(len, prompts)) + uses),
    ) as advance:
        for side, model_of in sides.items():
            with model_of() as model, session.accelerator.autocast():
                by_name = _learn(session, model, pairs, learning, advance)
            learnt |= {(name, side): one for name, one in by_name.items()}
    results = Results(config.output_dir, "dcm")
    results.table([row for key, one in learnt.items() for row in _rows(*key, pair.layers, one)])
    results.picture(pictures.masks, pair.layers, learnt)
    for (name, side), one in learnt.items():
        progress.say(_summary(name, side, one))
    return results


def _pairs(session: AnalysisSession, name: str) -> list[Pair]:
    """Return the prompts that a desideratum can be made of.

    Raises:
        UserError: they are fewer than two.
    """
    draw = random.Random(f"dcm-{name}")
    prompts, labels = session.drawn.prompts, range(len(session.dataset.label_words))
    answers = session.drawn.answers or [labels] * len(prompts)
    queries = [prompt.query for prompt in prompts]
    made = []
    for index, prompt in enumerate(prompts):
        # Another prompt's query asks for what is not here where prompts have answers of their own.
        others = queries if session.drawn.answers is None else prompt.demonstrations
        desideratum = DESIDERATA[name](prompt, answers[index], others, draw)
        if desideratum is not None:
            made.append((index, desideratum))
    pairs = []
    if made:
        sources = [desideratum.source for _, desideratum in made]
        encoded = session.encoder.encode(sources, session.drawn.template)
        for i, source in zip(encoded.kept, encoded.prompts, strict=True):
            index, (_, target) = made[i]
            if len(source.label_positions) == len(session.encoded.prompts[index].label_positions):
                pairs.append(Pair(index, source, answers[index].index(target)))
    if len(pairs) < 2:
        raise UserError(
            f"{name}: {len(pairs)} of the {len(queries)} prompts can be used, and two are needed: "
            "use more --prompts, another --k, or leave it out of --desiderata"
        )
    left = len(queries) - len(pairs)
    if left:
        session.progress.say(
            f"{name}: {left} of {len(queries)} prompts are left out; their demonstrations do not "
            "allow the exchange"
        )
    return pairs


def _learn(
    session: AnalysisSession,
    model: PreTrainedModel,
    pairs: Mapping[str, Sequence[Pair]],
    learning: MaskLearning,
    advance: Callable[[int, int], None],
) -> dict[str, Learnt]:
    """Learn and test one model's masks."""
    encoded, backend = session.encoded, session.config.attention_backend

    def run(prompt: EncodedPrompt, index: int) -> LastRow:
        row = run_prompt(model, prompt, encoded.answer_ids(index), backend)
        advance(1, len(prompt))
        return row

    originals = [run(prompt, index) for index, prompt in enumerate(encoded.prompts)]
    learnt = {}
    for name, some in pairs.items():
        cases = [
            Case(
                encoded.prompts[at],
                originals[at],
                run(source, at).outputs,
                target,
                encoded.answer_ids(at),
            )
            for at, source, target in some
        ]
        mask = learning.learn(model, cases[::2], advance)
        chosen = mask > 0.5
        masks = torch.stack([torch.zeros_like(chosen), chosen, torch.ones_like(chosen)])
        right = []
        for case in cases[1::2]:
            right.append(learning.answers_target(model, case, masks))
            advance(1, 1)
        learnt[name] = Learnt(mask.numpy(), chosen.numpy(), _shares(torch.stack(right)), len(right))
    return learnt


def _shares(right: Tensor) -> dict[str, Interval]:
    shares = right.double().mean(dim=0).tolist()
    return {
        name: wilson(share, len(right))
        for name, share in zip(("none", "chosen", "all"), shares, strict=True)
    }


def _rows(name: str, side: str, layers: Sequence[int], one: Learnt) -> list[dict[str, Any]]:
    """Return a row for each head, and one for each group of heads that was tested together."""
    columns = (
        "group", "layer", "head", "mask", "heads", "prompts",
        "answered", "answered_low", "answered_high",
    )  # fmt: skip
    start: dict[str, Any] = {"model": side, "desideratum": name, **dict.fromkeys(columns)}
    rows = [
        start | {"group": "head", "layer": layers[index], "head": head, "mask": value}
        for (index, head), value in np.ndenumerate(one.mask)
    ]
    counts = {"none": 0, "chosen": int(one.chosen.sum()), "all": one.chosen.size}
    for group, (share, low, high) in one.answered.items():
        tested = {"group": group, "heads": counts[group], "prompts": one.prompts}
        rows.append(
            start | tested | {"answered": share, "answered_low": low, "answered_high": high}
        )
    return rows


def _summary(name: str, side: str, one: Learnt) -> str:
    none, chosen, every = (100 * one.answered[group].value for group in ("none", "chosen", "all"))
    return (
        f"{name}, {side}: {one.chosen.sum()} of {one.chosen.size} heads; {chosen:.0f} % of "
        f"{one.prompts} prompts answer the target ({none:.0f} % unpatched, {every:.0f} % with all "
        "heads)"
    )
