"""Put head outputs of one forward into another at a prompt's last row, many ways at once.

A head's output at the last row changes nothing before that row. So every earlier key and value is
computed once, and each way to patch costs one token. Source: cross-model activation patching of
Prakash et al. 2024, "Fine-tuning enhances existing mechanisms".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft_fast.analysis.last_row import LastRow, run_prompt, run_rows
from abft_fast.core.autocast import product_dtype
from abft_fast.core.backbone import backbone, must_run_alone, output_projections, prepare
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.models.preflight import relative_error, tolerance


@torch.no_grad()
def check_can_patch(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    label_ids: Sequence[int],
    what: str = "output",
    attention: str = "auto",
) -> None:
    """Refuse a model in which a head's output at the last row cannot be replaced alone.

    The test: with its own outputs in no head and in all heads the model must be as it is. For
    `pattern` and `values` the outputs must be attention times values, which a gate or a norm behind
    them changes.

    Args:
        model: a decoder with LM head.
        prompts: what is to be patched; the shortest one is tested.
        label_ids: the label words' tokens.
        what: see `replacement`.
        attention: which attention runs.

    Raises:
        UserError: keys depend on more than the tokens before them, or the test fails.
    """
    inner = prepare(model)
    family = backbone(model).config.model_type
    if must_run_alone(inner, max(map(len, prompts))):
        raise UserError(
            f"{family}: keys depend on the whole prompt (layers without attention, or RoPE that "
            "depends on length), so its last row cannot be patched alone"
        )
    prompt = min(prompts, key=len)
    row = run_prompt(model, prompt, label_ids, attention)
    none_and_all = torch.tensor([False, True]).expand(*row.outputs.shape[:2], 2).movedim(-1, 0)
    logits = patched_logits(model, prompt, row, row.outputs, none_and_all, label_ids, attention)
    made = replacement(row, row, "output" if what == "output" else "pattern")
    allowed = tolerance(inner, product_dtype(row.outputs))
    same_logits = relative_error(logits, row.logits.expand_as(logits)) <= allowed
    if not (same_logits and relative_error(made.flatten(1), row.outputs.flatten(1)) <= allowed):
        raise UserError(
            f"{family}: something changes what heads read before the output projection, so "
            f"{what} cannot be patched"
        )


def replacement(source: LastRow, target: LastRow, what: str) -> Tensor:
    """Return what is put into the target's heads, (layers, Hq, D).

    Args:
        source: the forward that gives.
        target: the forward that receives.
        what: `output`, the source's head outputs; `pattern`, the source's attention over the
            target's values; `values`, the target's attention over the source's values.
    """
    if what == "output":
        return source.outputs
    rows, values = (source, target) if what == "pattern" else (target, source)
    mixed = torch.einsum(
        "lhn,lhnd->lhd", rows.attention().to(values.outputs.dtype), values.values()
    )
    return mixed.to(target.outputs.dtype)


def patched_logits(
    model: PreTrainedModel,
    prompt: EncodedPrompt,
    target: LastRow,
    outputs: Tensor,
    masks: Tensor,
    label_ids: Sequence[int],
    attention: str = "auto",
) -> Tensor:
    """Return the label words' logits with head outputs replaced, a row for each mask.

    Args:
        model: the model that receives.
        prompt: the prompt.
        target: the model's own forward on the prompt, which has its keys and values.
        outputs: (layers, Hq, D), or (R, layers, Hq, D) where rows get different ones.
        masks: (R, layers, Hq), which heads each row replaces: bool, or the part of each head's
            output that is replaced, 0 to 1, under autograd.
        label_ids: the label words' tokens.
        attention: which attention runs.

    Returns:
        (R, labels).
    """
    tokens = [prompt.input_ids[-1]] * len(masks)
    before = target.before_last()
    with replaced(model, outputs, masks):
        return run_rows(model, tokens, len(prompt) - 1, before, label_ids, attention)[0]


@contextmanager
def replaced(model: PreTrainedModel, outputs: Tensor, masks: Tensor) -> Iterator[None]:
    """Replace head outputs of R one-token rows for the block; arguments as in `patched_logits`."""
    rows, _, heads = masks.shape
    new = outputs if outputs.ndim == 4 else outputs[None]

    def put(index: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            own = inputs[0].view(rows, heads, -1)
            mask = masks[:, index, :, None].to(own.device)
            source = new[:, index].to(own)
            if mask.dtype == torch.bool:
                mixed = torch.where(mask, source, own)
            else:
                mixed = torch.lerp(own, source, mask.to(own.dtype))
            return mixed.view_as(inputs[0]), *inputs[1:]

        return hook

    projections = output_projections(model)
    handles = [
        projections[layer].register_forward_pre_hook(put(index))
        for index, layer in enumerate(sorted(projections))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
