"""Add adapters, and what whole models learnt, to a model's weights (paper, Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft_fast.errors import UserError
from abft_fast.models.files import ADAPTER_WEIGHTS, is_whole_model
from abft_fast.models.loading import load
from abft_fast.models.trainable import load_adapter

_TOLERANCE = 1e-3  # relative, of logits; float32 is at 1e-5
_PROBE = 16  # tokens


def add_adapters(
    model: PreTrainedModel,
    adapters: Iterable[tuple[Path, float]],
    say: Callable[[str], object],
) -> PreTrainedModel:
    """Return base + sum of coefficient * (trained model - base), weight by weight.

    A trained model is the base with an adapter, or a whole model of the base's shape.

    Args:
        model: the base, in float32. Only weights that an adapter changes are held twice.
        adapters: folders of adapters or of models, and coefficients.
        say: gets a line for each adapter.

    Returns:
        The changed model. An LM head that shared the embedding's weight gets one of its own if
        the two differ now.

    Raises:
        UserError: an adapter or a model does not fit the base, or PEFT cannot put it into weights.
    """
    tied = _is_tied(model)
    model, changes = changes_of(model, adapters, say)
    untie(model)
    for name, change in changes.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data + change
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    _tie(model, tied and torch.equal(head.weight, embedding.weight))
    return model


def changes_of(
    model: PreTrainedModel,
    adapters: Iterable[tuple[Path, float]],
    say: Callable[[str], object],
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return the model with its own weights, and what adapters add to them, by weight.

    Args:
        model: the base, in float32. Only weights that an adapter changes are held twice.
        adapters: folders and coefficients.
        say: gets a line for each adapter.

    Returns:
        The base, and the sum of coefficient * (base with one adapter - base). An LM head that
        shares the embedding's weight has an entry of its own.

    Raises:
        UserError: as `add_adapters`.
    """
    tied = _is_tied(model)
    base = dict(model.state_dict())
    changes: dict[str, Tensor] = {}
    for folder, coefficient in adapters:
        if is_whole_model(folder):
            for name, change in _changes_of_model(model, folder):
                scaled = coefficient * change
                changes[name] = changes[name] + scaled if name in changes else scaled
            say(f"merged {folder}, times {coefficient:g}")
            continue
        modules = _modules_of(folder)
        changed = {w.data_ptr() for name, w in base.items() if name.rpartition(".")[0] in modules}
        for name, weight in base.items():
            if weight.data_ptr() in changed:  # PEFT may write over it
                base[name] = weight.clone()
        model = _merged(load_adapter(model, folder, say), folder)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if not parameters.keys() <= base.keys():
            raise UserError(f"adapter {folder} cannot be merged: the model has no place for it")
        for name, parameter in parameters.items():
            if parameter.data_ptr() != base[name].data_ptr():
                change = coefficient * (parameter.detach() - base[name])
                changes[name] = changes[name] + change if name in changes else change
                parameter.data = base[name]
        _tie(model, tied)
        say(f"merged {folder}, times {coefficient:g}")
    return model, changes


def _changes_of_model(model: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield what a whole model learnt, weight by weight; weights that did not move are left out.

    Raises:
        UserError: the model has other weights than the base.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    loaded = load(str(folder), torch.device("cpu"), torch.float32)
    learnt = dict(loaded.named_parameters(remove_duplicate=False))
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise UserError(f"model {folder} is quantized: add the model that was trained")
    for name in sorted(own.keys() | learnt.keys()):
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (own, learnt)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"model {folder} does not fit the base: {name} is {shapes[1]} there and "
                f"{shapes[0]} in the base"
            )
        change = learnt[name].detach().to(own[name].device) - own[name].detach()
        if change.any():
            yield name, change


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _tie(model: PreTrainedModel, tied: bool) -> None:
    """Let the LM head share the embedding's weight, or not; PEFT and a merge change that."""
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = tied


def untie(model: nn.Module) -> None:
    """Give each module parameters of its own; those that were shared still share memory."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
            seen.add(parameter)


def _modules_of(folder: Path) -> set[str]:
    """Return the modules that an adapter names, with all modules around them."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="np") as file:
        names = list(file.keys())
    paths = [name.removeprefix("base_model.model.").split(".") for name in names]
    return {".".join(parts[:depth]) for parts in paths for depth in range(len(parts))}


@torch.no_grad()
def _merged(adapted: PeftModel, folder: Path) -> PreTrainedModel:
    """Return the model with the adapter in its weights; make sure that it computes the same."""
    adapted.eval()
    ids = torch.arange(_PROBE, device=adapted.device)[None] % adapted.config.vocab_size
    expected = adapted(input_ids=ids, use_cache=False).logits
    untie(adapted)  # else what is merged into the embedding would be in the LM head too
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # of whatever kind the adapter is
        line = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {folder} cannot be merged: {line}") from error
    logits = model(input_ids=ids, use_cache=False).logits
    if not (logits - expected).norm() <= _TOLERANCE * expected.norm():
        kind = adapted.active_peft_config.peft_type.value
        raise UserError(
            f"adapter {folder} cannot be merged: merged by PEFT, its kind {kind} computes "
            "something else than before"
        )
    return model
