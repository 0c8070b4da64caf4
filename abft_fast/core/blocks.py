"""Gradients that stay inside a block of consecutive layers (`gradient="local"` or N).

The hidden states that enter a block are detached. As soon as the block's last attention is done,
its losses become gradients and its graph is freed: no graph is longer than a block, and none holds
what comes after that attention in its layer. Where a layer is checkpointed, graphs are kept to the
end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abft_fast.core.behavior import LayerResults
from abft_fast.errors import UnsupportedModel

_SCALE = 2.0**12
"""Factor of a float16 block's loss: small gradients would be 0; a GradScaler acts too late."""


class BlockGradients:
    """The gradients of one packed forward, found block by block.

    Args:
        size: layers a block.
        results: where the attention function stores each layer's losses.
    """

    def __init__(self, size: int, results: LayerResults):
        self.size = size
        self._results = results
        self._grad_enabled = torch.is_grad_enabled()
        self._keep_graph = False
        self._is_float16 = False
        self._parameters: list[nn.Parameter] = []  # of the block that runs
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # of the blocks before

    def enter_layer(self, index: int, layer: nn.Module, *, checkpointed: bool) -> bool:
        """Begin a decoder layer; return whether a block begins, whose input is to be detached."""
        # What autograd saves inside a checkpointed layer cannot be read before that layer ends.
        self._keep_graph |= checkpointed
        begins = index % self.size == 0
        if begins:
            self.finish_block()
            self._parameters = []
            torch.set_grad_enabled(self._grad_enabled)
        parameters = list(layer.parameters())
        self._parameters += [p for p in parameters if p.requires_grad]
        self._is_float16 |= any(p.dtype == torch.float16 for p in parameters)
        return begins

    def finish_layer(self, index: int) -> None:
        """Finish the block after its last layer; turn gradients off until the next block begins."""
        if (index + 1) % self.size == 0 and not self._keep_graph:
            self.finish_block()
            torch.set_grad_enabled(False)

    def finish_block(self) -> None:
        """Replace the graphs of the block's losses by the gradients of its parameters."""
        layers = self._results.with_graph()
        parameters = list(dict.fromkeys(self._parameters))
        if not layers or not parameters or self._keep_graph:
            return
        loss = self._results.mean_loss(layers)
        kind = loss.device.type
        casts = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        is_scaled = casts or self._is_float16
        with torch.autocast(kind, enabled=False):
            gradients = torch.autograd.grad(
                loss * _SCALE if is_scaled else loss, parameters, allow_unused=True
            )
        found = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        self._gradients += [(p, g / _SCALE if is_scaled else g) for p, g in found.items()]
        self._results.drop_graphs()

    def attach(self, loss: Tensor) -> Tensor:
        """Return the loss; its backward hands out the gradients that were found."""
        if not self._gradients:
            return loss
        parameters, gradients = zip(*self._gradients, strict=True)
        return _WithGradients.apply(loss, gradients, *parameters)


class _WithGradients(torch.autograd.Function):
    """A scalar, and the gradients of parameters that were found on the way to it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: nn.Parameter
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return grad_loss, None, *(g * grad_loss.to(g.device) for g in ctx.gradients)


class Away:
    """Stands for the forward of a decoder layer that is not to run now.

    The model's own forward runs: before the layers that are to run, hidden states pass by; after
    them the forward ends. See `PackedForward.layers_to_run`.
    """

    def __init__(self, index: int):
        self.index = index

    def __call__(
        self, hidden_states: Tensor, *args: Any, abft: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return the hidden states that the next layer gets."""
        if abft is None:
            raise RuntimeError(f"layer {self.index} is away: run this model on packed prompts")
        return abft.pass_by(self.index, hidden_states)


class BlockBoundary:
    """Forward pre-hook of a decoder layer: detach the hidden states that enter a block.

    The hook stays on the model, because some versions of transformers run it again when
    checkpointing computes a layer once more. The forward's keyword `abft` says what to do.
    """

    def __init__(self, index: int):
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Return the layer's new arguments, or None to leave them."""
        forward = kwargs.get("abft")
        if forward is not None and forward.layers_to_run is not None:
            _refuse_other_states(module, args, kwargs)
        if forward is None or not forward.enter_layer(self.index, module):
            return None
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}


def _refuse_other_states(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a layer that gets a second (1, T, width) tensor, as of the embedding.

    Where the layers before are away, that tensor would be made of the wrong hidden states.

    Raises:
        UnsupportedModel: the layer gets such a tensor.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    for other in (*args[1:], *kwargs.values()):
        is_tensor = isinstance(other, Tensor) and other is not hidden
        if is_tensor and other.is_floating_point() and other.ndim == 3:
            raise UnsupportedModel(
                f"{type(module).__name__} gets more than the hidden states of the layer before it, "
                "so its weights cannot be read block by block: train without --stream"
            )
