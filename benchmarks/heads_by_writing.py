"""Trial: ABFT of the heads that write what they attend to; options are those of `abft-fast train`.

    python -m benchmarks.heads_by_writing --dataset subj --seed 0 --test-type Normal,LabelFollowing

The paper counts a head in the loss if it attends to labels, S > T. Here its output at the last row
must also raise the logit of the right label word against the wrong ones if it attends to right
labels more than to all alike, and lower it otherwise (direct logit attribution through the output
projection, the weight of the last norm and the LM head). A prompt with labels of one kind counts
all its induction heads. It is for models whose norms are ahead of their layers, with full gradient.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abft_fast.analysis.last_row import head_outputs
from abft_fast.cli import main
from abft_fast.core.backbone import backbone, output_projections, prepare, without_peft
from abft_fast.core.label_logits import label_columns
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt
from abft_fast.core.run_packed import run_packed
from abft_fast.training.methods import TRAINING_METHODS, loss_options


def right_against_wrong(model, prompts: Sequence[EncodedPrompt]) -> Tensor:
    """Directions of the last hidden state that raise the right label, (R, width); 0 without one."""
    head = without_peft(model).get_output_embeddings().weight
    rows = []
    for prompt in prompts:
        labels = [prompt.input_ids[i] for i in prompt.label_positions]
        pairs = list(zip(labels, prompt.label_is_correct, strict=True))
        words = [sorted({x for x, correct in pairs if correct is kind}) for kind in (True, False)]
        if not all(words):
            rows.append(torch.zeros_like(head[0]))
            continue
        right, wrong = (head[label_columns(model, tokens)].mean(dim=0) for tokens in words)
        rows.append(right - wrong)
    return torch.stack(rows) * backbone(model).norm.weight


@torch.no_grad()
def writes(model, prompts, packed) -> Tensor:
    """What each head adds to the right label's logit, (layers, R, Hq), up to the norm's factor."""
    last = packed.cu_seqlens[1:].long() - 1
    directions = right_against_wrong(model, prompts)
    with head_outputs(model) as outputs:
        run_packed(prepare(model), PackedForward(packed))
    projections = output_projections(model)
    return torch.stack(
        [
            _by_head(outputs[i][0, last], projections[i].weight, directions, model)
            for i in sorted(outputs)
        ]
    )


def _by_head(outputs: Tensor, weight: Tensor, directions: Tensor, model) -> Tensor:
    heads = backbone(model).config.num_attention_heads
    read = directions @ weight  # (R, Hq * D)
    return (outputs * read).view(len(outputs), heads, -1).sum(dim=-1)


def loss_of_writing_heads(model, prompts, packed, config, penalty):
    """ABFT's loss, with the further condition on heads."""
    effect = writes(model, prompts, packed)
    forward = PackedForward(packed, loss_options(config, penalty), config.attention_backend)
    run_packed(prepare(model), forward)
    losses = torch.stack([result.loss for result in forward.results.in_order()])
    behavior = forward.behavior()
    shares = [sum(p.label_is_correct) / len(p.label_positions) for p in prompts]
    chance = torch.tensor(shares)[:, None]
    prefers = behavior.correct_mass / behavior.label_mass - chance
    mixed = (chance > 0) & (chance < 1)
    counted = ~mixed | (prefers * effect > 0)
    return behavior._replace(loss=(losses * counted).sum() / len(prompts))


if __name__ == "__main__":
    TRAINING_METHODS["ABFT"] = replace(TRAINING_METHODS["ABFT"], loss=loss_of_writing_heads)
    sys.argv.insert(1, "train")
    main()
