"""Read a model's weights from its files by name, a tensor or some of its rows at a time."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from abft_fast.builtin import builtin_model_path
from abft_fast.errors import UserError
from abft_fast.models.files import check_model_folder, find_damage, gguf_file, shards
from abft_fast.models.gguf import LazyTensor, class_and_tensors
from abft_fast.models.loading import checkpoint_folder
from abft_fast.models.stored_format import stored_format


class StoredWeights:
    """The weights in a model's files, by the model's own names; nothing is kept in memory.

    Args:
        name: as `--model` names the model.
        config: the model's config.
        model: the model without weights; transformers knows by it how older files spell names.

    Attributes:
        read_bytes: bytes read so far, as they are stored, by file and tensor.

    Raises:
        UserError: the files are not on this machine, are damaged, or are stored quantized in
            another format than GGUF.
    """

    def __init__(self, name: str, config: PreTrainedConfig, model: PreTrainedModel):
        self.name = name
        self.read_bytes: Counter[tuple[str, str]] = Counter()
        self._lazy: Mapping[str, LazyTensor] = {}
        self._files: dict[str, tuple[Path, str]] = {}
        path = gguf_file(name)
        if path is not None:
            check_model_folder(name)
            _, self._lazy = class_and_tensors(path, config)
            return
        self._files = _files_of_tensors(name, config, model)

    def stored_bytes(self, name: str, rows: int | None = None) -> int:
        """Return how many bytes `read` reads of a tensor, or of so many of its rows.

        Raises:
            UserError: as `read`.
        """
        if name in self._lazy:
            stored = self._lazy[name].stored
            share = 1.0 if rows is None else rows / stored.shape[0]
            return round(stored.nbytes * share)
        path, key = self._file_of(name)
        with safe_open(path, framework="np") as opened:
            part = opened.get_slice(key)
            shape, kind = part.get_shape(), part.get_dtype()
        bits = re.search(r"\d+", kind)  # such as BF16; BOOL has no number
        sizes = shape if rows is None else [rows, *shape[1:]]
        return math.prod(sizes) * (int(bits.group()) // 8 if bits else 1)

    def bytes_as_read(self, name: str, numbers: int, stored: int) -> int:
        """Return the bytes of what `read` returns for so many numbers: GGUF's are in float32."""
        return torch.float32.itemsize * numbers if name in self._lazy else stored

    def _file_of(self, name: str) -> tuple[Path, str]:
        if name not in self._files:
            raise UserError(
                f"model {self.name}: its files hold no {name}, or hold it in another form, which "
                "--stream does not convert: train without --stream"
            )
        return self._files[name]

    def read(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """Return a tensor, or some of its rows, as it is stored; GGUF's is float32.

        Args:
            name: the tensor's name in the model.
            rows: ascending indices of rows; None reads all of them.

        Raises:
            UserError: the files lack it under the model's name.
        """
        if name in self._lazy:
            lazy = self._lazy[name]
            tensor = lazy[...] if rows is None else lazy.rows(list(rows))
            read = self.stored_bytes(name, None if rows is None else len(rows))
            self.read_bytes[str(lazy.path), name] += read
            return tensor
        path, key = self._file_of(name)
        with safe_open(path, framework="pt") as opened:
            if rows is None:
                tensor = opened.get_tensor(key).clone()
            else:
                part = opened.get_slice(key)
                tensor = torch.cat([part[row : row + 1] for row in rows])
        self.read_bytes[str(path), name] += tensor.nbytes
        return tensor


def check_stored_format(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that is stored quantized, other than in GGUF.

    Raises:
        UserError: the model is stored so.
    """
    stored = stored_format(config)
    if stored is not None:
        raise UserError(
            f"model {name} is stored quantized ({stored}): --stream reads float weights or GGUF; "
            "use the unquantized checkpoint with --quantized"
        )


def _files_of_tensors(
    name: str, config: PreTrainedConfig, model: PreTrainedModel
) -> dict[str, tuple[Path, str]]:
    """Return the safetensors file of each tensor, and the tensor's name there.

    Tensors that transformers converts as it reads them, as experts that are stored one by one, are
    left out.
    """
    check_stored_format(name, config)
    check_model_folder(name)
    folder = builtin_model_path() if name == "builtin" else checkpoint_folder(name)
    if folder is None:
        raise UserError(
            f"model {name} is not on this machine, and --stream reads weights from its files: "
            f"download it first (`hf download {name}`)"
        )
    problem = find_damage(folder)
    if problem is not None:
        raise UserError(f"model {name}: {problem}")
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    known = model.state_dict()
    files = {}
    for path in shards(folder):
        with safe_open(path, framework="np") as opened:
            keys = list(opened.keys())
        for key in keys:
            own, converted = rename_source_key(
                key, renamings, converters, model.base_model_prefix, known
            )
            if converted is None:
                files[own] = path, key
    if not files:
        raise UserError(f"model {name}: no weights as safetensors or GGUF in {folder}")
    return files
