"""A model whose decoder layers are in memory a block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from abft_fast.core.backbone import (
    Projection,
    decoder_layers,
    must_run_alone,
    prepare,
    query_key_projections,
)
from abft_fast.core.blocks import Away
from abft_fast.core.label_logits import set_label_rows
from abft_fast.errors import UnsupportedModel, UserError
from abft_fast.models import trainable
from abft_fast.models.files import ADAPTER_WEIGHTS, check_adapter, refuse_biases
from abft_fast.models.loading import files_name
from abft_fast.models.shapes import SYNTHETIC
from abft_fast.models.synthetic import is_quantized, quantization, skeleton
from abft_fast.runtime import launch
from abft_fast.runtime.environment import free_memory
from abft_fast.streaming.random_weights import RandomWeights
from abft_fast.streaming.weights import StoredWeights


class _Slot(NamedTuple):
    """A parameter of the model, or a buffer, that is read from the files."""

    name: str  # in the files; PEFT may wrap the module later
    module: nn.Module
    own_name: str
    empty: Tensor  # without memory


class WeightToRead(NamedTuple):
    """A weight, or some rows of it, that a walk through a model reads once."""

    name: str
    layer: int | None  # None outside the layers
    numbers: int
    rows: int | None  # None for all
    is_matrix: bool


def weights_to_read(
    model: PreTrainedModel, tokens: Set[int], label_ids: Set[int]
) -> Iterator[WeightToRead]:
    """Yield what a walk reads of a model, as `StreamedModel` does; nothing is read.

    Args:
        model: without weights, without adapters.
        tokens: all tokens of all prompts.
        label_ids: the label words' tokens; none where no LM head is needed.
    """
    inner = prepare(model)
    layers = decoder_layers(inner)
    inside = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    is_tied = _is_tied(model, names[head])
    for module, name in names.items():
        rows = None
        if module is embedding:
            rows = len(tokens | label_ids if is_tied else tokens)
        elif module is head:
            rows = 0 if is_tied else len(label_ids)
        for slot in _slots_of(name, module):
            if rows == 0 or (module is embedding and slot.own_name != "weight"):
                continue
            shape = slot.empty.shape
            count = slot.empty.numel() if rows is None else rows * shape[1:].numel()
            matrix = len(shape) > 1 and rows is None
            yield WeightToRead(slot.name, inside.get(module), count, rows, matrix)


def _is_tied(model: PreTrainedModel, head_name: str) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    same = embedding.weight is head.weight
    return same or f"{head_name}.weight" in model.all_tied_weights_keys


class StreamedModel:
    """A decoder without weights, into which a block's weights are read before its layers run.

    Weights outside the layers are small, but for the embedding and the LM head: of those only the
    rows are read that prompts and label words use.

    Attributes:
        name: as `--model` names it.
        device: where weights are brought.
        is_quantized: whether weights are quantized as they come.
        model: the model, of which `bring` makes some layers ready.
        weights: the model's files.
        layers: number of decoder layers.
        width: numbers of a token's hidden state.
        embedded: tokens whose rows the embedding has, ascending; prompts index this list.

    Raises:
        UserError: a family whose prompts must run alone, or weights that cannot be streamed.
    """

    def __init__(
        self,
        name: str,
        config: PreTrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        bits: int | None,
    ):
        self.name, self.device, self.is_quantized = name, device, bits is not None
        self.model: PreTrainedModel = skeleton(copy.deepcopy(config), dtype, bits)
        if bits is not None:
            self.model.config.quantization_config = quantization(bits, dtype)
        self.model.name_or_path = self.model.config.name_or_path = files_name(name)
        self.weights: StoredWeights | RandomWeights
        if name.startswith(SYNTHETIC):
            self.weights = RandomWeights(self.model)
        else:
            self.weights = StoredWeights(name, config, self.model)
        try:
            self._inner = prepare(self.model)
        except UnsupportedModel as error:
            raise UserError(f"model {name}: {error}") from error
        if must_run_alone(self._inner, 0):
            raise UserError(
                f"model {name}: layers without attention carry state along a batch, so --stream "
                "cannot pack its prompts: train without --stream"
            )
        self._layers = decoder_layers(self._inner)
        self.layers = len(self._layers)
        self.width = config.get_text_config(decoder=True).hidden_size
        self.embedded: list[int] = []
        embedding = self.model.get_input_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        self._layers_name = names[self._layers]
        self._embedding = next(iter(_slots_of(names[embedding], embedding)))
        self._slots = [
            list(_slots(f"{self._layers_name}.{index}", layer))
            for index, layer in enumerate(self._layers)
        ]
        self._ahead: dict[str, Tensor] = {}
        self._trained: dict[int, list[Projection]] = {}
        self.skip_layers(range(self.layers))

    def check_length(self, longest: int) -> None:
        """Refuse prompts so long that this family cannot pack them.

        Raises:
            UserError: RoPE would depend on the batch's longest prompt.
        """
        if must_run_alone(self._inner, longest):
            raise UserError(
                f"model {self.name}: its RoPE depends on the longest prompt of a batch, so "
                "--stream cannot pack these prompts: use fewer demonstrations (--k)"
            )

    def set_trained(self, kind: str, rank: int) -> None:
        """Train LoRA on W_Q and W_K (`lora`), or W_Q and W_K themselves (`full`).

        LoRA's weights stay in memory. They are drawn as on a model whose weights are all there.

        Raises:
            UserError: the model does not allow it.
        """
        projections = query_key_projections(self.model)
        if kind == "full":
            self.model.requires_grad_(False)
            for projection in projections:
                self._trained.setdefault(projection.layer, []).append(projection)
            return
        with self._without_memory():
            self.model = trainable.add_lora(self.model, rank).eval()

    def load_adapter(self, folder: Path, say: Callable[[str], object]) -> None:
        """Put a trained adapter on the layers; it stays in memory.

        Raises:
            UserError: as `trainable.load_adapter`, or the adapter changes biases or what is outside
                the layers.
        """
        check_adapter(folder)
        refuse_biases(folder, "use it without --stream")
        with safe_open(folder / ADAPTER_WEIGHTS, framework="np") as file:
            names = list(file.keys())
        own = f"base_model.model.{self._layers_name}."
        outside = [n.removeprefix("base_model.model.") for n in names if not n.startswith(own)]
        if outside:
            raise UserError(
                f"adapter {folder} changes {outside[0]}, which is outside the decoder layers: "
                "evaluate it without --stream"
            )
        with self._without_memory():
            self.model = trainable.load_adapter(
                self.model, folder, say, weights_are_away=True
            ).eval()

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """Let PEFT see weights on the CPU, where it puts an adapter: they have one number each."""
        slots = [p for each in self._slots for p in each if isinstance(p.empty, nn.Parameter)]
        for slot in slots:
            setattr(slot.module, slot.own_name, _one_number(slot))
        try:
            yield
        finally:
            for slot in slots:
                setattr(slot.module, slot.own_name, slot.empty)

    def read_outside(self, tokens: Iterable[int], label_ids: Sequence[int]) -> None:
        """Read what is outside the layers; call it before `set_trained` and `load_adapter`.

        Args:
            tokens: all tokens of all prompts.
            label_ids: the label words' tokens: the LM head has their rows only; none for no head.
        """
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        inside = {module for layer in self._layers for module in layer.modules()}
        names = {module: name for name, module in self.model.named_modules()}
        for module in self.model.modules():
            if module not in inside and module is not embedding and module is not head:
                self._fill(_slots_of(names[module], module))
                self._make_buffers(module)
        is_tied = _is_tied(self.model, names[head])
        self.read_embedding({*tokens, *(label_ids if is_tied else ())})
        self._make_buffers(embedding)
        if not label_ids:
            return
        if is_tied:
            rows = [self.embedded.index(token) for token in label_ids]
            of_labels = {"weight": embedding.weight.detach()[rows]}
        else:
            of_labels = {
                slot.own_name: self._read(slot, label_ids) for slot in _slots_of(names[head], head)
            }
        set_label_rows(self.model, label_ids, of_labels)

    def read_embedding(self, tokens: Iterable[int]) -> None:
        """Read the embedding's rows of these tokens; for a further walk, call it alone."""
        self.embedded = sorted(set(tokens))
        embedding: Any = self._embedding.module
        embedding.padding_idx = None  # its row may be another one now
        rows = self._read(self._embedding, self.embedded)
        embedding.weight = nn.Parameter(rows, requires_grad=False)

    def drop_embedding(self) -> None:
        """Drop the embedding's rows: after the first block nothing reads them."""
        embedding = self.model.get_input_embeddings()
        embedding.weight = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)

    def has_room_ahead(self, blocks: Sequence[range]) -> bool:
        """Return whether to read a block while the one before it computes.

        On a CPU both would share the processor. With a GPU the host waits anyway, and its free
        memory must hold two of the largest block for each process of this machine.
        """
        if self.device.type != "cuda":
            return False
        slots = [[slot for index in block for slot in self._slots[index]] for block in blocks]
        sizes = (sum(p.empty.numel() * self._dtype_of(p).itemsize for p in each) for each in slots)
        needed = 2 * max(sizes) * launch.local_process_count()
        return free_memory(torch.device("cpu")) > needed

    def read_ahead(self, block: range, stop: Event) -> dict[str, Tensor]:
        """Return the weights of a block for `bring`, in the host's memory; for another thread.

        Args:
            block: the layers.
            stop: set to end the reading after the tensor that is being read.
        """
        read = {}
        for slot in (slot for index in block for slot in self._slots[index]):
            if stop.is_set():
                break
            read[slot.name] = self.weights.read(slot.name).to(self._dtype_of(slot))
        return read

    def bring(self, block: range, ahead: dict[str, Tensor] | None = None) -> None:
        """Read the weights of a block of layers; they run then.

        Args:
            block: the layers.
            ahead: what `read_ahead` has read; it is emptied.
        """
        self._ahead = ahead or {}
        for index in block:
            layer = self._layers[index]
            self._fill(self._slots[index])
            for module in layer.modules():
                self._make_buffers(module)
                for parameter in module.parameters(recurse=False):  # of adapters
                    if parameter.device not in (self.device, torch.device("meta")):
                        parameter.data = parameter.data.to(self.device)
            for projection in self._trained.get(index, []):
                trainable.unfreeze_projection(projection)
        self.enable_layers(block)

    def enable_layers(self, block: range) -> None:
        """Let forwards run the layers of a block, whose weights are in memory."""
        for index in block:
            del self._layers[index].forward

    def skip_layers(self, block: range) -> None:
        """Let forwards skip the layers of a block; its weights stay in memory."""
        for index in block:
            self._layers[index].forward = Away(index)

    def drop(self, block: range) -> None:
        """Drop the weights of a block; forwards skip its layers."""
        self.skip_layers(block)
        for index in block:
            for slot in self._slots[index]:
                setattr(slot.module, slot.own_name, slot.empty)
                _drop_quantized(slot.module)

    def parameters_of(self, index: int) -> Iterator[tuple[str, nn.Module, str]]:
        """Yield a layer's own parameters: name in the layer, module, name in the module."""
        for slot in self._slots[index]:
            name = slot.name.removeprefix(f"{self._layers_name}.{index}.")
            if isinstance(slot.empty, nn.Parameter):
                yield name, slot.module, slot.own_name

    def vectors_of(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the vectors of a layer, as norms', from the files; they are small."""
        for slot in self._slots[index]:
            if slot.empty.ndim == 1:
                name = slot.name.removeprefix(f"{self._layers_name}.{index}.")
                yield name, self.weights.read(slot.name)

    def trained_parameters(self, block: range) -> dict[str, nn.Parameter]:
        """Return the parameters of a block that are trained, by their names in the model."""
        own = {id(p) for index in block for p in self._layers[index].parameters()}
        named = trainable.trained_parameters(self.model)
        return {name: p for name, p in named.items() if id(p) in own}

    def count_trained(self) -> int:
        """Return how many numbers are trained."""
        own = [each.module.get_parameter("weight") for p in self._trained.values() for each in p]
        lora = self.trained_parameters(range(self.layers)).values()
        return sum(parameter.numel() for parameter in (*own, *lora))

    def trained_modules(self, block: range) -> dict[str, nn.Module]:
        """Return the modules of a block whose own weights are trained, by name."""
        return {p.name: p.module for index in block for p in self._trained.get(index, [])}

    def _fill(self, slots: Iterable[_Slot]) -> None:
        for slot in slots:
            if is_quantized(slot.module) and slot.own_name == "weight":
                tensor = self._read_to(torch.device("cpu"), slot)
                new = _unquantized(slot.empty, tensor).to(self.device)  # and quantize it
            else:
                new = self._read(slot)
                if isinstance(slot.empty, nn.Parameter):  # else a buffer that the files hold
                    new = nn.Parameter(new, requires_grad=False)
            setattr(slot.module, slot.own_name, new)

    def _read(self, slot: _Slot, rows: Sequence[int] | None = None) -> Tensor:
        return self._read_to(self.device, slot, rows)

    def _read_to(
        self, device: torch.device, slot: _Slot, rows: Sequence[int] | None = None
    ) -> Tensor:
        tensor = self._ahead.pop(slot.name, None)
        if tensor is None:
            tensor = self.weights.read(slot.name, rows)
        shape = slot.empty.shape if rows is None else (len(rows), *slot.empty.shape[1:])
        if tensor.shape != shape:
            raise UserError(
                f"model {self.name}: {slot.name} has the shape {tuple(tensor.shape)} in the "
                f"files and {tuple(shape)} by config.json, which is of another model"
            )
        return tensor.to(device, self._dtype_of(slot))

    def _dtype_of(self, slot: _Slot) -> torch.dtype:
        dtype = slot.empty.dtype
        return dtype if dtype.is_floating_point else self.model.dtype

    def _make_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no file holds, such as RoPE's frequencies, as transformers does."""
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
        if not buffers:
            return
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device=self.device))
        kept = {name: p for name, p in module.named_parameters(recurse=False)}
        for name, parameter in kept.items():  # `_init_weights` would overwrite them
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        self._inner._init_weights(module)
        for name, parameter in kept.items():
            setattr(module, name, parameter)


def _slots(prefix: str, layer: nn.Module) -> Iterator[_Slot]:
    for name, module in layer.named_modules():
        yield from _slots_of(f"{prefix}.{name}" if name else prefix, module)


def _slots_of(name: str, module: nn.Module) -> Iterator[_Slot]:
    for own_name, parameter in module.named_parameters(recurse=False):
        yield _Slot(f"{name}.{own_name}", module, own_name, parameter)
    for own_name, buffer in module.named_buffers(recurse=False):
        if own_name not in module._non_persistent_buffers_set:
            yield _Slot(f"{name}.{own_name}", module, own_name, buffer)


def _one_number(slot: _Slot) -> nn.Parameter:
    """Return a weight of the right shape and dtype, all of whose numbers are one number."""
    quantized = is_quantized(slot.module) and slot.own_name == "weight"
    dtype = torch.uint8 if quantized else slot.empty.dtype
    one = torch.zeros(1, dtype=dtype).expand(slot.empty.shape)
    if quantized:
        return _unquantized(slot.empty, one)
    return nn.Parameter(one, requires_grad=False)


def _drop_quantized(module: nn.Module) -> None:
    """Drop what bitsandbytes' layers keep of a weight besides the weight itself."""
    layer: Any = module
    if hasattr(layer, "quant_state"):  # 4 bits: the statistics
        layer.quant_state = None
    elif is_quantized(layer):  # 8 bits: the weight, and what the next forward sets again
        layer.state.CB = layer.state.SCB = layer.state.idx = None


def _unquantized(empty: Tensor, tensor: Tensor) -> Any:
    """Return bitsandbytes' parameter of a tensor; it is quantized on its way to a device."""
    kind: Any = type(empty)
    return kind(tensor, requires_grad=False, **empty.__dict__)
