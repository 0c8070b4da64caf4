"""One attention layer's packed prompts, and the ways to its output and to the loss of last rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from abft_kernels import (
    LastRowLoss,
    Scores,
    explicit_attention,
    flash_attention_with_last_row_loss,
    last_row_loss,
    reference,
)
from abft_kernels.attention.separate import visible_keys
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.exactness import DTYPE, assert_exact
from benchmarks.record import DEVICE, GPU

if GPU:
    from torch.nn.attention.varlen import varlen_attn

    # Older versions take fewer key heads without being told.
    _GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

LABELS = 16
FACTORS = {  # on the device, as in training
    "penalty": torch.full((), 0.5, device=DEVICE),
    "reward": torch.ones((), device=DEVICE),
}


@dataclass(frozen=True)
class Shape:
    """Prompts of one length, and heads.

    Attributes:
        length: tokens of each prompt, n.
        tokens: of all prompts together, about; at least one prompt.
        heads: query heads, key heads and their width D.
    """

    length: int
    tokens: int
    heads: tuple[int, int, int] = (32, 8, 128)

    @property
    def prompts(self) -> int:
        return max(1, self.tokens // self.length)

    def columns(self) -> dict[str, object]:
        """Cells of a row."""
        query_heads, key_heads, width = self.heads
        return {
            "dtype": str(DTYPE).removeprefix("torch."),
            "n": self.length,
            "prompts": self.prompts,
            "heads": f"{query_heads}/{key_heads}x{width}",
        }

    def __str__(self) -> str:
        return "-".join(str(self.columns()[name]) for name in ("n", "heads"))


class Results(NamedTuple):
    """Output, losses and filter of a layer, and the gradients of query, key and value, if any."""

    out: Tensor
    loss: Tensor
    is_induction: Tensor
    gradients: tuple[Tensor, ...]


class Layer:
    """Random queries, keys and values; one key head in eight, at least one, is an induction head's.

    Those with an output take `gradient`: whether a backward is to follow.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        query_heads, key_heads, width = shape.heads
        self.rows, self.length = shape.prompts, shape.length
        tokens = self.rows * self.length
        draw = {"device": DEVICE, "dtype": DTYPE}
        self.key, self.value = (torch.randn(tokens, key_heads, width, **draw) for _ in range(2))
        self.query = torch.randn(tokens, query_heads, width, **draw)
        self.bounds = torch.arange(self.rows + 1, dtype=torch.int32, device=DEVICE) * self.length
        count = min(LABELS, self.length)
        inside = torch.arange(count, device=DEVICE) * max(1, (self.length - 1) // LABELS)
        self.label_positions = inside
        self.positions = (self.bounds[:-1, None] + inside).flatten().int()
        self.offsets = torch.arange(self.rows + 1, dtype=torch.int32, device=DEVICE) * count
        is_correct = torch.arange(count) % 2 == 0
        self.correct = is_correct.to(DEVICE).repeat(self.rows)
        # Numbers, as a mask of bools would make the host wait for the GPU.
        self.right, self.wrong = (m.nonzero()[:, 0].to(DEVICE) for m in (is_correct, ~is_correct))
        group = query_heads // key_heads
        last = self.last_query.unflatten(1, (key_heads, group))[:, ::8, 0]
        self.key.unflatten(0, (self.rows, -1))[:, inside, ::8] += 2 * last[:, None]

    @property
    def last_query(self) -> Tensor:
        """(prompts, Hq, D)."""
        return self.query[self.bounds[1:].long() - 1]

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of every loss here."""
        return self.positions, self.offsets, self.correct

    def leaves(self, gradient: bool) -> list[Tensor]:
        """Query, key and value as inputs of their own; the last ones stay as `inputs`."""
        self.inputs = [
            t.detach().requires_grad_(gradient) for t in (self.query, self.key, self.value)
        ]
        return self.inputs

    def loss(self, query: Tensor, key: Tensor, backend: str = "auto") -> LastRowLoss:
        """Ours, alone, of (prompts, Hq, D) last queries and all keys."""
        rows = self.bounds[:-1], self.bounds[1:]
        return last_row_loss(query, key, *rows, *self.labels(), **FACTORS, backend=backend)

    def specification(self) -> LastRowLoss:
        """The reference in float64, of the first prompt and the last."""
        found = []
        for row in {0, self.rows - 1}:
            tokens = slice(row * self.length, (row + 1) * self.length)
            whole = torch.tensor([0, self.length], device=DEVICE)
            count = torch.tensor([0, len(self.label_positions)], device=DEVICE)
            found.append(
                reference.last_row_loss(
                    self.last_query[row : row + 1].double(), self.key[tokens].double(),
                    whole[:1], whole[1:], self.label_positions, count,
                    self.correct[: len(self.label_positions)], **FACTORS,
                )
            )  # fmt: skip
        return LastRowLoss(*(torch.cat(field) for field in zip(*found, strict=True)))

    def check_losses(self, found: LastRowLoss) -> None:
        """Losses, masses and filter are the specification's, of the first prompt and the last."""
        truth, ends = self.specification(), sorted({0, self.rows - 1})
        same = found.is_induction[ends] == truth.is_induction
        assert same.float().mean() >= 0.99, "the filter picks other heads"
        assert 0 < truth.is_induction.float().mean() <= 0.5, "no head, or nearly each, has a loss"
        for name in ("label_mass", "correct_mass", "loss"):
            error = (getattr(found, name)[ends].double() - getattr(truth, name))[same].abs().max()
            assert error <= 1e-3 * len(self.label_positions), f"{name} is off by {error:.1e}"

    def results(self, dtype: torch.dtype) -> Results:
        """By plain torch, prompt by prompt, from the same numbers in another dtype."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.query, self.key, self.value)]
        query, key, value = leaves
        group = query.shape[1] // key.shape[1]
        of_heads = (query, *(t.repeat_interleave(group, dim=1) for t in (key, value)))
        outs = [
            F.scaled_dot_product_attention(*prompt, is_causal=True)
            for prompt in self._prompts(list(of_heads))
        ]
        out = self._packed(outs)
        loss, is_induction = self.plain_loss(query[self.bounds[1:].long() - 1], key)
        gradients = torch.autograd.grad(total(out, loss), leaves)
        return Results(out.detach(), loss.detach(), is_induction, gradients)

    def results_of(self, way: Callable[[], tuple]) -> Results:
        """Of a way; without gradients where no backward can follow."""
        out, loss, is_induction = way()
        gradients = ()
        if out.requires_grad:
            gradients = torch.autograd.grad(total(out, loss), self.inputs)
        return Results(out.detach(), loss.detach(), is_induction, gradients)

    def check_results(self, name: str, found: Results, plain: Results, exact: Results) -> float:
        """The largest error of a way's results, none of which is far from the exact ones."""
        same = found.is_induction == exact.is_induction
        assert same.float().mean() >= 0.99, f"{name}: the filter picks other heads"
        parts = {"output": (found.out, plain.out, exact.out)}
        parts["loss"] = tuple(torch.where(same, r.loss, 0.0) for r in (found, plain, exact))
        if found.gradients:
            gradients = zip(found.gradients, plain.gradients, exact.gradients, strict=True)
            parts |= dict(zip(("query", "key", "value"), gradients, strict=True))
        return max(assert_exact(f"{name}: {part}", *three) for part, three in parts.items())

    def plain_loss(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and filter, (prompts, Hq) each, in the few lines of torch one writes first.

        All probabilities of the last rows are computed; prompts have one length.
        """
        key = key.unflatten(0, (self.rows, self.length))
        query = query.unflatten(1, (key.shape[2], -1))
        scores = torch.einsum("rhgd,rnhd->rhgn", query, key) * query.shape[-1] ** -0.5
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return self.loss_of_rows(wide.softmax(-1).flatten(1, 2))

    def loss_of_rows(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the last rows' probabilities, (prompts, Hq, n)."""
        on_labels = alpha[..., self.label_positions]
        loss = FACTORS["penalty"] * on_labels[..., self.wrong].sum(-1)
        loss = loss + FACTORS["reward"] * (1 - on_labels[..., self.right]).sum(-1)
        k = len(self.label_positions)
        is_induction = on_labels.sum(-1) > k / (k + math.log(self.length))
        return torch.where(is_induction, loss, 0.0), is_induction

    def fused(self, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Ours: output, losses, filter."""
        out, found = flash_attention_with_last_row_loss(
            *self.leaves(gradient), self.bounds, *self.labels(), longest=self.length, **FACTORS
        )
        return out, found.loss, found.is_induction

    def attention(self, gradient: bool = False) -> tuple[Tensor]:
        """The same flash attention by its public entry, with nothing of ours: output alone."""
        leaves = self.leaves(gradient)
        if GPU:
            bounds = self.bounds, self.bounds, self.length, self.length
            return (varlen_attn(*leaves, *bounds, window_size=(-1, 0), **_GROUPED),)
        outs = [
            F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)
            for prompt in self._prompts(leaves)
        ]
        return (self._packed(outs),)

    def eager(self, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Every attention matrix written out, one prompt at a time, and the loss of last rows."""
        scores = Scores(self.query.shape[-1] ** -0.5, None, None)
        mask = visible_keys(self.length, None, self.query.device)
        outs, last_rows = [], []
        for prompt in self._prompts(self.leaves(gradient)):
            out, alpha = explicit_attention(*prompt, mask, scores)
            outs.append(out)
            last_rows.append(alpha[:, :, -1].float())
        return self._packed(outs), *self.loss_of_rows(torch.cat(last_rows))

    def flex(self, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """FlexAttention, compiled, on the packed prompts; their last rows computed once more."""
        query, key, value = self.leaves(gradient)
        heads_first = (t.transpose(0, 1)[None] for t in (query, key, value))
        out = _flex_attention(*heads_first, block_mask=self.block_mask, enable_gqa=True)
        last = query[self.bounds[1:].long() - 1]
        return out[0].transpose(0, 1), *self.plain_loss(last, key)

    @property
    def block_mask(self):
        """FlexAttention's, made once a layer's shape, as a model would make it once a batch."""
        if not hasattr(self, "_block_mask"):
            prompt = torch.arange(len(self.query), device=DEVICE) // self.length

            def same_prompt(batch, head, query, key):
                return (prompt[query] == prompt[key]) & (query >= key)

            size = len(self.query)
            self._block_mask = create_block_mask(
                same_prompt, None, None, size, size, device=DEVICE, _compile=GPU
            )
        return self._block_mask

    def _prompts(self, tensors: list[Tensor]) -> zip:
        """Each prompt's tensors as (1, heads, n, D)."""
        shaped = (t.unflatten(0, (self.rows, 1, self.length)).transpose(2, 3) for t in tensors)
        return zip(*shaped, strict=True)

    def _packed(self, outs: list[Tensor]) -> Tensor:
        return torch.cat(outs).transpose(1, 2).flatten(0, 1)


def total(out: Tensor, loss: Tensor | None = None, *_) -> Tensor:
    """What a backward of a way's results begins with."""
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    return wide.sum() + (0.0 if loss is None else loss.sum())


def there_and_back(way: Callable[[], tuple]) -> None:
    """A forward and a backward."""
    total(*way()).backward()


_flex_attention = torch.compile(flex_attention, dynamic=False)
