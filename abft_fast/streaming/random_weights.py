"""Make random weights by name, a tensor or some of its rows at a time, for models without files."""

from __future__ import annotations

import copy
import math
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_DRAWN = 2**22  # numbers of a matrix that are drawn; more would take longer than reading a file


class RandomWeights:
    """The weights of a synthetic model, made anew whenever they are read.

    A matrix is normal with the family's deviation; beyond 4 million numbers it repeats them.
    Vectors, such as norms', are those that the family begins with.

    Args:
        model: the model without weights.

    Attributes:
        read_bytes: always empty, because no file is read.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._modules = dict(model.named_modules())
        self._deviation = model.config.get_text_config(decoder=True).initializer_range
        self.read_bytes: Counter[tuple[str, str]] = Counter()

    def read(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """Return a tensor, or as many of its rows, in the model's dtype; the same at each call."""
        module_name, _, own_name = name.rpartition(".")
        module = self._modules[module_name]
        empty = getattr(module, own_name)
        shape = empty.shape if rows is None else (len(rows), *empty.shape[1:])
        if len(shape) == 1:
            return self._vector(module, own_name)
        numbers = math.prod(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(min(numbers, _DRAWN)).normal_(0, self._deviation, generator=generator)
        repeated = drawn.to(self._model.dtype).repeat(math.ceil(numbers / _DRAWN))
        return repeated[:numbers].view(shape)

    def _vector(self, module: nn.Module, own_name: str) -> Tensor:
        alone = copy.copy(module)  # what else the module has is not to change
        for kind in ("_parameters", "_buffers"):
            own = getattr(module, kind).items()
            setattr(alone, kind, {name: x if x is None else self._empty(x) for name, x in own})
        vector = torch.empty(getattr(module, own_name).shape, dtype=self._model.dtype)
        is_parameter = own_name in alone._parameters
        setattr(alone, own_name, nn.Parameter(vector, False) if is_parameter else vector)
        self._model._init_weights(alone)
        return getattr(alone, own_name).detach()

    def _empty(self, tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=self._model.dtype, device="meta")
        return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
