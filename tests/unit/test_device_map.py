"""A model whose parts move their inputs to devices of their own, as accelerate's hooks do.

On the CPU all devices are one; the hooks, and what they do to a layer's `forward`, are real.
"""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForCausalLM

from abft_fast import attention_behavior_loss, builtin_model_path, pack
from abft_fast.core.backbone import backbone, decoder_layers
from abft_fast.core.label_logits import label_logits
from abft_fast.errors import UserError
from abft_fast.models.device_map import over_all_gpus, refuse_offloaded
from abft_fast.models.preflight import check_attention
from abft_fast.models.trainable import add_lora, enable_checkpointing, trained_parameters
from tests.tiny_models import tiny_model
from tests.unit.test_training import make_prompts

pytestmark = pytest.mark.unit


def dispatched(family):
    """Every decoder layer and whatever is beside them mapped by itself."""
    model = tiny_model(family)
    layers = decoder_layers(backbone(model))
    names = [name for name, module in model.named_modules() if module in [*layers]]
    rest = [
        name
        for name, module in model.named_modules()
        if name and not any(n.startswith(name) or name.startswith(f"{n}.") for n in names)
    ]
    devices = dict.fromkeys([*names, *rest], "cpu")
    model = dispatch_model(model, devices, force_hooks=True)
    assert all(isinstance(layer._hf_hook, AlignDevicesHook) for layer in layers)
    return model


def loss_and_gradients(model, gradient, checkpointing):
    model = add_lora(model, 4)
    torch.manual_seed(1)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        enable_checkpointing(model)
    behavior = attention_behavior_loss(
        model, pack(make_prompts(8)), gradient=gradient, head_filter=False
    )
    behavior.loss.backward()
    return behavior.loss, [p.grad for p in trained_parameters(model).values()]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("gradient", ["full", "local", 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_hooks_change_neither_loss_nor_gradient(family, gradient, checkpointing):
    loss, grads = loss_and_gradients(tiny_model(family), gradient, checkpointing)
    with_hooks, their_grads = loss_and_gradients(dispatched(family), gradient, checkpointing)
    torch.testing.assert_close(with_hooks, loss)
    torch.testing.assert_close(their_grads, grads)
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_a_model_in_parts_is_checked_and_evaluated():
    prompts = make_prompts(4)
    expected, _, _ = label_logits(tiny_model("llama"), prompts, [7, 11])
    model = dispatched("llama")
    check_attention(model, prompts)
    torch.testing.assert_close(label_logits(model, prompts, [7, 11])[0], expected)


def test_parts_that_found_no_room_are_refused():
    model = AutoModelForCausalLM.from_pretrained(
        builtin_model_path(), device_map="auto", max_memory={"cpu": 5_000_000}
    )
    assert "disk" in model.hf_device_map.values()
    with pytest.raises(UserError, match="model builtin does not fit in the memory of"):
        refuse_offloaded(model, "builtin")
    refuse_offloaded(dispatched("llama"), "llama")  # a CPU alone is no place left over


def test_several_processes_do_not_share_a_split_model(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched"):
        over_all_gpus(torch.device("cpu"))
