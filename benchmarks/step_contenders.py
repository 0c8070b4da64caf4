"""The ways to a step's gradient: the original's, transformers' own, ours, and E2E by others.

Each is a function of a `Step` that leaves the gradient of its loss, mean over prompts.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.core.attention import NAME
from abft_fast.core.backbone import backbone, decoder_layers
from abft_fast.core.language_model_loss import TargetedPrompt, language_model_loss
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.run_packed import run_packed
from benchmarks import stored
from benchmarks.record import DEVICE, GPU
from benchmarks.steps import DTYPE, Contender, Step

IGNORED = -100  # transformers' label of a token without a loss


def loss_of_matrices(last_rows: Tensor, prompt: EncodedPrompt, head_filter: bool) -> Tensor:
    """A prompt's loss from its last rows of attention, (layers, heads, n)."""
    on_labels = last_rows[..., prompt.label_positions].float()
    correct = torch.tensor(prompt.label_is_correct, device=last_rows.device)
    loss = 0.5 * on_labels[..., ~correct].sum(-1) + (1 - on_labels[..., correct]).sum(-1)
    k, n = len(prompt.label_positions), len(prompt)
    if head_filter:
        loss = loss * (on_labels.sum(-1) > k / (k + math.log(n)))
    return loss.sum()


def one_by_one(step: Step) -> None:
    """The original's way."""
    for prompt in step.prompts:
        ids = torch.tensor([prompt.input_ids], device=DEVICE)
        attentions = step.model(ids, output_attentions=True, use_cache=False).attentions
        last_rows = torch.stack([matrix[0, :, -1] for matrix in attentions])
        loss = loss_of_matrices(last_rows, prompt, step.case.head_filter)
        (loss / len(step.prompts)).backward()


class Padded(NamedTuple):
    """Prompts as rows of one length, filled up on the left."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, rows: list[list[int]]) -> Padded:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=DEVICE)
        lengths = torch.tensor([[len(row)] for row in rows], device=DEVICE)
        position = torch.arange(longest, device=DEVICE) - (longest - lengths)
        return cls(ids, (position >= 0).long(), position.clamp_min(0))


def padded(step: Step) -> None:
    """The same on all prompts at once."""
    batch = Padded.of([prompt.input_ids for prompt in step.prompts])
    attentions = step.model(**batch._asdict(), output_attentions=True, use_cache=False).attentions
    last_rows = torch.stack([matrix[:, :, -1] for matrix in attentions], dim=1)
    losses = [
        loss_of_matrices(rows[..., -len(prompt) :], prompt, step.case.head_filter)
        for rows, prompt in zip(last_rows, step.prompts, strict=True)
    ]
    torch.stack(losses).mean().backward()


def padded_without_loss(step: Step) -> None:
    """transformers' own pass, forward and backward, of all prompts at once."""
    batch = Padded.of([prompt.input_ids for prompt in step.prompts])
    inner = backbone(step.model)
    inner(**batch._asdict(), use_cache=False).last_hidden_state.mean().backward()


# Ours.


def packed(step: Step, gradient: str | int) -> None:
    """The loss of this library."""
    for prompts, share in step.micro_batches():
        behavior = attention_behavior_loss(
            step.model, pack(prompts), head_filter=step.case.head_filter, gradient=gradient
        )
        (behavior.loss * share).backward()


def ours(gradient: str | int, checkpointing: bool = False, tokens: int = 0) -> Contender:
    """`packed`, as one of the contenders."""
    run = functools.partial(packed, gradient=gradient)
    return Contender(NAME, run, checkpointing, tokens)


def packed_without_loss(step: Step) -> None:
    """The packed pass with nothing of ours in it but the packing."""
    packed_pass(step).mean().backward()


def packed_pass(step: Step) -> Tensor:
    """The packed forward alone: last hidden states."""
    unlabeled = [EncodedPrompt(prompt.input_ids, [], []) for prompt in step.prompts]
    forward = PackedForward(pack(unlabeled))
    return run_packed(backbone(step.model), forward).last_hidden_state


def packed_end_to_end(step: Step) -> None:
    """`--method E2E`."""
    for prompts, share in step.micro_batches():
        (language_model_loss(step.model, prompts).loss * share).backward()


# End-to-end fine-tuning by others.


def _with_label(prompt: TargetedPrompt) -> list[int]:
    return [*prompt.input_ids, *prompt.targets]


def padded_end_to_end(step: Step) -> None:
    """PEFT's LoRA in a plain loop of transformers: its own loss, on the label alone."""
    step.model(**label_batch(step.prompts), use_cache=False).loss.backward()


def label_batch(prompts: list[TargetedPrompt]) -> dict[str, Tensor]:
    """Arguments of a causal language model whose loss is that of prompts' labels."""
    batch = Padded.of([_with_label(prompt) for prompt in prompts])
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[:, -1] = batch.input_ids[:, -1]
    return {**batch._asdict(), "labels": labels}


def trl(step: Step) -> Callable[[Step], None]:
    """TRL's SFTTrainer with packing into its default length: its dataset, collator and loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": _with_label(prompt), "completion_mask": [0] * len(prompt) + [1]}
        for prompt in step.prompts
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=step.model,
            args=SFTConfig(
                output_dir=folder, packing=True, completion_only_loss=True,
                max_length=max(1024, *(len(row["input_ids"]) for row in rows)),
                per_device_train_batch_size=1, gradient_checkpointing=False, report_to=[],
                use_cpu=not GPU, bf16=False, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=stored.read_tokenizer(stored.BUILTIN),
        )  # fmt: skip
        batches = list(trainer.get_train_dataloader())

    def run(step: Step) -> None:
        for batch in batches:
            share = (batch["labels"] != IGNORED).sum() / len(step.prompts)
            (trainer.compute_loss(step.model, dict(batch)) * share).backward()

    return run


# What cannot be left out.


def products(step: Step, block: int) -> Callable[[Step], None]:
    """A function that does the matrix products of the frozen layers and nothing else.

    Forward: every linear layer on every token, but in the last decoder layer, of which the loss
    needs W_K alone (and W_Q on last tokens). Backward, in blocks of so many layers: the gradient of
    each one's input, but of what a block begins with, which nothing learnt comes before, and of
    what follows its last scores.
    """
    layers = decoder_layers(backbone(step.model))
    pairs = []
    for index, layer in enumerate(layers):
        first, last = index % block == 0, (index + 1) % block == 0 or index + 1 == len(layers)
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear) or "lora" in name:
                continue
            query_key, value = ("q_proj" in name or "k_proj" in name), "v_proj" in name
            returns = not ((query_key or value) and first) and (query_key or not last)
            if index + 1 < len(layers) or "k_proj" in name:
                pairs.append((module.weight.detach(), returns))
    widths = {size for weight, _ in pairs for size in weight.shape}
    tokens = sum(step.lengths)
    source, result = (
        {size: torch.randn(tokens, size, device=DEVICE, dtype=DTYPE) for size in widths}
        for _ in range(2)
    )

    def run(step: Step) -> None:
        for weight, _ in pairs:
            out_width, in_width = weight.shape
            torch.mm(source[in_width], weight.t(), out=result[out_width])
        for weight, returns in reversed(pairs):
            if returns:
                out_width, in_width = weight.shape
                torch.mm(source[out_width], weight, out=result[in_width])

    return run


def contenders(step: Step) -> dict[str, Contender]:
    """All of them by name; those of one prompt alone are not padded."""
    layers = len(decoder_layers(backbone(step.model)))
    blocks = {"products, local": 1, "products, N = 2": 2, "products, full": layers}
    found = {
        **{name: Contender("sdpa", products(step, block)) for name, block in blocks.items()},
        "ABFT, local": ours("local"),
        "ABFT, N = 2": ours(2),
        "ABFT, full": ours("full"),
        "packed, no loss": Contender(NAME, packed_without_loss),
        "padded, no loss": Contender("sdpa", padded_without_loss),
        "eager, one by one": Contender("eager", one_by_one),
        "E2E, packed": Contender(NAME, packed_end_to_end),
        "E2E, padded": Contender("sdpa", padded_end_to_end),
    }
    if step.case.model not in stored.REAL:  # Gemma's gradient by TRL is off by 9e-5, in float64 too
        found["E2E, TRL"] = Contender("sdpa", trl(step))
    if len(step.prompts) > 1:
        found["eager, padded"] = Contender("eager", padded)
    return found


def floor_of(contender: str) -> str:
    """The products of a contender's flow; of all that go the whole way, `full`'s."""
    flow = contender.removeprefix("ABFT, ").removeprefix("products, ")
    return f"products, {flow if flow in ('local', 'N = 2') else 'full'}"
