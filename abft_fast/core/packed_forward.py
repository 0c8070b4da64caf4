"""One packed forward: its batch, what is asked of its last rows, and their answers by layer.

The object travels with the model's forward as the keyword `abft`: there is no global state, and
checkpointing's second run of a layer sees the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from abft_kernels import LastRowLoss, Scores
from torch import Tensor, nn

from abft_fast.core.autocast import product_dtype
from abft_fast.core.behavior import AttentionBehavior, LayerResults
from abft_fast.core.blocks import BlockGradients
from abft_fast.core.packing import PackedPrompts

KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Each layer's keys and values, (T, Hkv, D), by layer index."""


class LastQueries(NamedTuple):
    """What one layer's last rows ask of its keys.

    Attributes:
        query: (R, Hq, D), one row a prompt, after RoPE.
        scores: how a query and a key become a score.
        sinks: (Hq,) attention sinks, or None.
    """

    query: Tensor
    scores: Scores
    sinks: Tensor | None


class LossComplete(Exception):  # noqa: N818 - no error
    """Raised to leave the forward: in the last layer's attention, or after the layers to run."""


def _no_loss() -> dict[str, Any]:
    return {"penalty": 0.0, "reward": 0.0}


def _scalar_on(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a tensor; a number becomes one without a copy, which would wait."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, device=device)


@dataclass
class PackedForward:
    """The state of one packed forward.

    Attributes:
        packed: the batch.
        loss_options: penalty, reward and, where they are not the default, head_filter, objective
            and hold. By default both factors are 0: the forward asks for attention alone.
        attention: what is to compute attention; see `abft_kernels.choose_attention`.
        block: layers that a gradient may cross; None for all of them.
        stop_after: layer whose attention ends the forward; None runs the forward to its end.
        keep: where it is given, each layer's keys and values are stored in it.
        queries: where it is given, the queries of each layer's last rows are stored in it.
        prefix: keys and values of the prompts' common beginning, from an earlier forward's `keep`.
            Positions of `packed` continue after the prefix; the batch has no labels, and no loss is
            computed.
        layers_to_run: the layers that run, where the others are away; None for all layers.
        entering: (1, T, width) hidden states that enter the first layer of `layers_to_run`; None
            where they are the embedding's.
        leaving: (1, T, width) hidden states after the last layer of `layers_to_run`, where it is
            not the model's last; stored by the next layer.
        longest: tokens of the longest prompt of `packed`.
        context: the same with the prefix's tokens.
        results: losses and masses by layer, stored by the attention function.
        attentions: which attention ran, stored by the attention function: (attention, backend of
            the loss) -> why no faster attention ran.
    """

    packed: PackedPrompts
    loss_options: dict[str, Any] = field(default_factory=_no_loss)
    attention: str = "auto"
    block: int | None = None
    stop_after: int | None = None
    keep: KeysAndValues | None = None
    queries: dict[int, LastQueries] | None = None
    prefix: KeysAndValues | None = None
    layers_to_run: range | None = None
    entering: Tensor | None = None
    leaving: Tensor | None = field(default=None, init=False)
    attentions: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.longest = self.packed.longest
        self.context = self.longest
        if self.prefix is not None:
            key, _ = next(iter(self.prefix.values()))
            self.context += len(key)
        self.results = LayerResults(len(self.packed))
        self._blocks = None if self.block is None else BlockGradients(self.block, self.results)
        self._checkpointed = False  # the layer that runs
        self._by_device: dict[torch.device, tuple[PackedPrompts, dict[str, Any]]] = {}

    def on(self, device: torch.device) -> PackedPrompts:
        """Return the batch on a layer's device; layers may live on several devices."""
        return self._moved(device)[0]

    def loss_options_on(self, device: torch.device) -> dict[str, Any]:
        """Return the loss's options; the factors are tensors, so that no layer has to copy them."""
        return self._moved(device)[1]

    def _moved(self, device: torch.device) -> tuple[PackedPrompts, dict[str, Any]]:
        if device not in self._by_device:
            names = ["penalty", "reward"]
            if self.loss_options.get("objective") == "share":
                names.append("hold")
            factors = {name: _scalar_on(self.loss_options[name], device) for name in names}
            self._by_device[device] = self.packed.to(device), {**self.loss_options, **factors}
        return self._by_device[device]

    def enter_layer(self, index: int, layer: nn.Module) -> bool:
        """Begin a decoder layer; return whether its input is to be detached."""
        if self.layers_to_run is not None and index not in self.layers_to_run:
            return False
        self._checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        if self._blocks is None:
            return False
        return self._blocks.enter_layer(index, layer, checkpointed=self._checkpointed)

    def pass_by(self, index: int, hidden_states: Tensor) -> Tensor:
        """Return what a layer that is away hands on; the next layer ends the forward."""
        if self.layers_to_run is None or index in self.layers_to_run:
            raise RuntimeError(f"layer {index} is to run, but its forward is replaced")
        if index == self.layers_to_run.stop:
            self.leaving = hidden_states.detach().to(product_dtype(hidden_states))
            raise LossComplete
        if index == self.layers_to_run.start - 1 and self.entering is not None:
            return self.entering
        return hidden_states

    def ends_in(self, index: int) -> bool:
        """Whether nothing of a layer is needed but the scores of its last rows."""
        return index == self.stop_after and not self._checkpointed

    def store(self, index: int, result: LastRowLoss | None) -> None:
        """Store the layer's losses, or None to record that it ran."""
        if index in self.results:  # checkpointing's second run, which only rebuilds
            return
        self.results.store(index, result)
        if self._blocks is not None:
            self._blocks.finish_layer(index)

    def behavior(self) -> AttentionBehavior:
        """Return the results of all layers, on the first layer's device.

        Call it once: it frees the graphs of the losses.
        """
        if self._blocks is not None:
            self._blocks.finish_block()
        loss = self.results.mean_loss()
        if self._blocks is not None:
            loss = self._blocks.attach(loss)
        self.results.drop_graphs()  # a checkpoint's closure holds this object in a cycle
        return self.results.behavior(loss)
