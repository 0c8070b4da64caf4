"""The attention function transformers calls: packed prompts, each attending to itself alone.

It is registered once under a name of its own. What a forward needs beyond tensors (where prompts
end, where labels are, where to put the losses) travels with the call as the keyword `abft`, so
there is no global state and checkpointing's second run of a layer sees the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from abft_kernels import (
    LastRowLoss,
    Scores,
    attention_after_prefix,
    choose_attention,
    choose_backend,
    explicit_attention,
    flash_attention_with_last_row_loss,
    last_row_loss,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from abft_fast.core.packing import PackedPrompts

NAME = "abft"
NO_LOSS = {"penalty": 0.0, "reward": 0.0}  # options of a forward that asks for attention alone


class AttentionBehavior(NamedTuple):
    """What a model's attention does on a batch of R prompts.

    Attributes:
        loss: scalar, sum over layers and heads, mean over prompts. Differentiable.
        label_mass: (layers, R, Hq) attention of the last row on all labels, S in the paper.
        correct_mass: (layers, R, Hq) the part on labels that are the query's own.
        is_induction: (layers, R, Hq) bool, S > T, whether or not the filter was on.
    """

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor


class LossComplete(Exception):  # noqa: N818 - no error
    """Raised in the last layer's attention to leave the forward: the loss needs nothing after."""


@dataclass
class PackedForward:
    """One packed forward: its batch, what to ask of the last rows, and their answers by layer.

    With `block`, a block's losses yield their gradients as soon as its last attention is done, and
    its graph is freed: no graph is longer than a block, and none holds what comes after that
    attention in its layer. Where a layer is checkpointed, graphs are kept to the end.

    Attributes:
        packed: the batch.
        loss_options: penalty, reward and, where it is not the default, head_filter.
        attention: what is to compute attention; see `abft_kernels.choose_attention`.
        block: layers a gradient may cross; None is all of them.
        stop_after: layer whose attention ends the forward; None runs it to its end.
        keep: filled with each layer's keys and values, (T, Hkv, D), where it is given.
        prefix: what an earlier forward kept of the beginning of all these prompts; positions of
            `packed` go on after it, it has no labels, and no loss is found.
        layers: filled by the attention function, one entry a layer, None where no loss is found.
        attentions: filled by it too: (attention, backend of the loss) it ran on, and why not on
            a faster attention.
    """

    packed: PackedPrompts
    loss_options: dict
    attention: str = "auto"
    block: int | None = None
    stop_after: int | None = None
    keep: dict[int, tuple[Tensor, Tensor]] | None = None
    prefix: dict[int, tuple[Tensor, Tensor]] | None = None
    layers: dict[int, LastRowLoss | None] = field(default_factory=dict)
    attentions: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bounds = self.packed.cu_seqlens.tolist()
        self.longest = max(b - a for a, b in itertools.pairwise(self.bounds))
        self.context = self.longest  # keys of the longest prompt's last row
        if self.prefix is not None:
            key, _ = next(iter(self.prefix.values()))
            self.context += len(key)
        self._by_device: dict[torch.device, tuple[PackedPrompts, dict]] = {}
        self._checkpointed = self._keep_graph = False
        self._grad_enabled = torch.is_grad_enabled()
        self._block_parameters: list[nn.Parameter] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def on(self, device: torch.device) -> PackedPrompts:
        """The batch on a layer's device; layers may live on several."""
        return self._moved(device)[0]

    def loss_options_on(self, device: torch.device) -> dict:
        """The loss's options, its factors as tensors, so that no layer has to copy them."""
        return self._moved(device)[1]

    def _moved(self, device: torch.device) -> tuple[PackedPrompts, dict]:
        if device not in self._by_device:
            factors = {
                name: torch.as_tensor(self.loss_options[name], device=device)
                for name in ("penalty", "reward")
            }
            self._by_device[device] = self.packed.to(device), {**self.loss_options, **factors}
        return self._by_device[device]

    def enter(self, index: int, layer: nn.Module) -> bool:
        """A decoder layer begins; whether a block does, whose input is to be detached."""
        begins = self.block is not None and index % self.block == 0
        # What autograd saves inside a checkpointed layer cannot be read before that layer ends.
        self._checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        self._keep_graph |= self._checkpointed
        if begins:
            self.finish_block()
            self._block_parameters = []
            torch.set_grad_enabled(self._grad_enabled)
        if self.block is not None:
            self._block_parameters += [p for p in layer.parameters() if p.requires_grad]
        return begins

    def attended(self, index: int, result: LastRowLoss | None) -> None:
        """Keep a layer's losses, or that it came by.

        Raises:
            LossComplete: this was the last layer the loss needs.
        """
        if index in self.layers:  # checkpointing's second run, which only rebuilds
            return
        self.layers[index] = result
        if self.block is not None and (index + 1) % self.block == 0 and not self._keep_graph:
            self.finish_block()
            torch.set_grad_enabled(False)  # until the next block begins
        if self.ends_in(index):
            raise LossComplete

    def ends_in(self, index: int) -> bool:
        """Whether nothing of a layer is needed but the scores of its last rows."""
        return index == self.stop_after and not self._checkpointed

    def finish_block(self) -> None:
        """Replace the graph of losses that still have one by the gradients of their parameters."""
        pending = [index for index, found in self.layers.items() if found.loss.requires_grad]
        parameters = list(dict.fromkeys(self._block_parameters))
        if not pending or not parameters or self._keep_graph:
            return
        with torch.autocast(self.layers[pending[0]].loss.device.type, enabled=False):
            gradients = torch.autograd.grad(self._mean_loss(pending), parameters, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        self._gradients += [(p, gradient) for p, gradient in pairs if gradient is not None]
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        self.layers = {
            index: found._replace(loss=found.loss.detach()) for index, found in self.layers.items()
        }

    def _mean_loss(self, indices: list[int]) -> Tensor:
        losses = [self.layers[index].loss.sum() for index in indices]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / len(self.packed)

    def behavior(self) -> AttentionBehavior:
        """All layers' answers together, on the first layer's device."""
        if self.block is not None:
            self.finish_block()
        indices = sorted(self.layers)
        loss = self._mean_loss(indices)
        if self._gradients:
            parameters, gradients = zip(*self._gradients, strict=True)
            loss = _WithGradients.apply(loss, gradients, *parameters)
        self._drop_graphs()  # a checkpoint's closure holds this object: the cycle is never freed
        layers = [self.layers[index] for index in indices]
        return AttentionBehavior(
            loss,
            *(
                torch.stack([getattr(layer, name).to(loss.device) for layer in layers])
                for name in ("label_mass", "correct_mass", "is_induction")
            ),
        )


class _WithGradients(torch.autograd.Function):
    """A scalar, and the gradients of parameters that were found on the way to it."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return grad_loss, None, *(g * grad_loss.to(g.device) for g in ctx.gradients)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    abft: PackedForward | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (1, H, T, D) packed prompts; without `abft`, of an ordinary batch.

    `s_aux` are attention sinks (transformers' name). Returns (1, T, H, D), and
    weights only for an ordinary batch that asks for them.

    Raises:
        ValueError: the layer is said to be windowed but its window did not arrive.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if abft is None:
        return _ordinary_attention(
            module, query, key, value, attention_mask, scale, dropout, softcap, s_aux, **kwargs
        )
    _check_window(module, sliding_window, abft.context)
    packed = abft.on(query.device)
    # Under autocast RoPE leaves queries and keys in float32, values come in 16 bits.
    query, key, value = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    scores = {"scale": scale, "softcap": softcap, "window": sliding_window, "sinks": s_aux}
    if abft.prefix is not None:
        before = abft.prefix[module.layer_idx]
        out = attention_after_prefix(
            query,
            key,
            value,
            *before,
            packed.cu_seqlens,
            longest=abft.longest,
            attention=abft.attention,
            **scores,
        )
        abft.attended(module.layer_idx, None)
        return out[None], None
    if abft.keep is not None:
        abft.keep[module.layer_idx] = key, value
    options = {**scores, **abft.loss_options_on(query.device)}
    labels = packed.label_positions, packed.label_offsets, packed.label_is_correct
    if abft.ends_in(module.layer_idx):
        starts, ends = packed.cu_seqlens[:-1], packed.cu_seqlens[1:]
        result = last_row_loss(query[ends.long() - 1], key, starts, ends, *labels, **options)
        abft.attended(module.layer_idx, result)
    name, reasons = choose_attention(
        query, softcap=softcap, dropout=dropout, requested=abft.attention
    )
    abft.attentions[name, choose_backend(query)] = reasons
    out, result = flash_attention_with_last_row_loss(
        query,
        key,
        value,
        packed.cu_seqlens,
        *labels,
        longest=abft.longest,
        dropout=dropout,
        attention=name,
        **options,
    )
    abft.attended(module.layer_idx, result)
    return out[None], None


def _check_window(module: nn.Module, window: int | None, longest: int) -> None:
    """Refuse a layer whose mask is windowed but whose window does not arrive as an argument."""
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types:
        layer_type = layer_types[module.layer_idx]
    else:
        masked = getattr(module.config, "sliding_window", None)
        layer_type = "sliding_attention" if masked and longest > masked else "full_attention"
    if layer_type == "chunked_attention" or (layer_type == "sliding_attention" and window is None):
        raise ValueError(
            f"{type(module).__name__}: layer {module.layer_idx} is {layer_type} "
            "but does not hand its window to the attention function; this family is not supported"
        )


def _ordinary_attention(
    module, query, key, value, mask, scale, dropout, softcap, sinks, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """What a model set to this attention does outside this library, `generate` for one."""
    wanted = kwargs.get("output_attentions", module.config.output_attentions)
    if softcap is None and sinks is None and not wanted:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs
        )
    if mask is None:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        mask = mask.tril(columns - rows)
    scores = Scores(scale, softcap, window=None)  # the mask has it
    out, alpha = explicit_attention(query, key, value, mask, scores, sinks, dropout)
    return out.transpose(1, 2).contiguous(), alpha if wanted else None


# Without a mask function of the same name transformers hands over no mask at all.
AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
