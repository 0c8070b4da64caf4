"""Count the memory of a computation by running it on fake tensors, which have no memory.

The step's own code runs: shapes, dtypes and lifetimes are real, and nothing is computed. Memory
that one operation takes inside itself is counted where `inside` knows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from abft_fast.memory.inside import bytes_inside
from abft_fast.models.synthetic import is_quantized


def without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a model on the meta device into one of fake tensors, quantized layers included."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=dtype or tensor.dtype)

    new: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if is_quantized(module) and name == "weight":
                new[old] = _quantized(module, fake(old, torch.float16))
            elif old not in new:
                new[old] = nn.Parameter(fake(old), requires_grad=old.requires_grad)
            module.register_parameter(name, new[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake(buffer))
    return model


def _quantized(module: Any, weight: Tensor) -> nn.Parameter:
    """Quantize a weight as bitsandbytes does; its own parameter classes cannot be fake."""
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear8bitLt):
        data, scale, _ = bnb.functional.int8_vectorwise_quant(weight)
        attributes = {"CB": data, "SCB": scale}
        module.state.threshold = 0.0  # which columns are outliers depends on values
    else:
        old = module.weight
        data, state = bnb.functional.quantize_4bit(
            weight, compress_statistics=old.compress_statistics, quant_type=old.quant_type
        )
        state.dtype = module.compute_dtype
        module.support_avx512bf16_for_cpu = False
        attributes = {**vars(old), "quant_state": state}
    parameter = nn.Parameter(data, requires_grad=False)
    vars(parameter).update(attributes)
    return parameter


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors' storages, each counted once, with quantization statistics."""
    storages = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        parts = [tensor, getattr(tensor, "SCB", None)]
        while state is not None:
            parts += [state.absmax, state.code]
            state = state.state2
        for part in parts:
            if part is not None:
                storage = part.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class CannotCount(Exception):  # noqa: N818 - the user did nothing wrong
    """The memory cannot be counted, for example because shapes depend on values."""


TENSORS = "tensors"
"""The name of the peak of tensors alone, without what an operation takes inside itself."""


class _MemoryCount(TorchDispatchMode):
    """Count the bytes of the fake tensors that live at once."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.now = 0
        self.peaks = {TENSORS: 0}
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), counted=False)  # tensors from before the count
        result = function(*args, **kwargs)
        self._see(result, counted=True)
        inside = bytes_inside(function, args, kwargs, self._device_type)
        if inside:
            name = str(function)
            self.peaks[name] = max(self.peaks.get(name, 0), self.now + inside)
        return result

    def _see(self, tensors: Any, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, FakeTensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                size = storage.nbytes() if counted else 0
                self._known.add(storage._cdata)
                self.now += size
                self.peaks[TENSORS] = max(self.peaks[TENSORS], self.now)
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class float32_as_on_a_gpu(TorchFunctionMode):  # noqa: N801 - a context
    """Compute in float32 what CUDA's autocast keeps in float32 and the CPU's does not."""

    _NAMES = ("layer_norm", "pow", "__pow__")

    def __torch_function__(
        self,
        function: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__name__", None) in self._NAMES:
            args = tree_map_only(Tensor, _to_float32, args)
        return function(*args, **(kwargs or {}))


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def peak_memory(run: Callable[[], object], device_type: str) -> dict[str, int]:
    """Return the most bytes that `run` adds at once on fake tensors.

    Each operation that takes memory inside itself has a peak of its own, by its name: the peaks of
    unlike operations grow at different rates with the input. TENSORS is the peak without them.

    Args:
        run: what is counted.
        device_type: `cuda` or `cpu`; operations take different memory inside themselves.

    Raises:
        CannotCount: an operation in `run` depends on values.
    """
    try:
        with _MemoryCount(device_type) as count:
            run()
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        raise CannotCount(str(error).splitlines()[0]) from error
    return count.peaks
