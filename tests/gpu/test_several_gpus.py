"""Two GPUs against one: a model split by layers, and a process for each."""

import pytest
import torch
from accelerate import dispatch_model

from abft_fast import attention_behavior_loss, pack
from abft_fast.core.backbone import backbone, decoder_layers
from abft_fast.core.label_logits import label_logits
from abft_fast.models.device_map import over_all_gpus, refuse_offloaded
from abft_fast.models.loading import load
from abft_fast.models.preflight import check_attention
from abft_fast.models.trainable import add_lora, enable_checkpointing, trained_parameters
from tests.command_line import QUICK, abft_fast
from tests.several_processes import TORCHRUN, adapter_error, launch, metrics
from tests.tiny_models import tiny_model
from tests.unit.test_training import make_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def split(model):
    """The first half of the layers on GPU 0, the rest on GPU 1."""
    names = {module: name for name, module in model.named_modules()}
    layers = [names[layer] for layer in decoder_layers(backbone(model))]
    devices = {name: 2 * i // len(layers) for i, name in enumerate(layers)}
    for name in names.values():
        beside = not any(n.startswith(name) or name.startswith(f"{n}.") for n in layers)
        if name and beside:
            first = ("emb", "wte", "wpe", "lm_head")  # the head shares its weight
            devices[name] = 0 if any(part in name for part in first) else 1
    return dispatch_model(model, devices)


def loss_and_gradients(model, gradient, checkpointing):
    model = add_lora(model, 4)
    torch.manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    if checkpointing:
        enable_checkpointing(model)
    behavior = attention_behavior_loss(
        model, pack(make_prompts(8)), gradient=gradient, head_filter=False
    )
    behavior.loss.backward()
    return behavior.loss.cpu(), [p.grad for p in trained_parameters(model).values()]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("gradient", ["full", "local", 2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_split_model_has_the_gradients_of_a_whole_one(family, gradient, checkpointing):
    loss, grads = loss_and_gradients(tiny_model(family).to("cuda:0"), gradient, checkpointing)
    in_parts, their_grads = loss_and_gradients(split(tiny_model(family)), gradient, checkpointing)
    assert {grad.device.index for grad in their_grads} == {0, 1}
    torch.testing.assert_close(in_parts, loss)
    for ours, theirs in zip(their_grads, grads, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-6)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize("bits", [None, 4], ids=["float", "nf4"])
def test_the_device_map_of_a_run(bits):
    device = torch.device("cuda")
    prompts = make_prompts(4)
    model = load("builtin", device, torch.bfloat16, bits, placement=over_all_gpus(device))
    assert set(model.hf_device_map.values()) == {0, 1}
    refuse_offloaded(model, "builtin")
    check_attention(model, prompts)
    whole = load("builtin", device, torch.bfloat16, bits)
    found, expected = (label_logits(m, prompts, [7, 11])[0].cpu() for m in (model, whole))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_run_of_two_gpus(tmp_path):
    options = [*QUICK[:-1], "cuda", "--mixed-precision", "no", "--lr", "1e-3"]
    for folder, extra in (("one", []), ("split", ["--device-map", "auto"])):
        result = abft_fast("train", *options, *extra, "--output-dir", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    arguments = ["-m", "abft_fast", "train", *options, "--output-dir", tmp_path / "two"]
    result = launch(TORCHRUN, *arguments)
    assert result.returncode == 0, result.stderr
    for folder in ("split", "two"):
        assert adapter_error(tmp_path / folder, tmp_path / "one") <= 1e-4
        for row, expected in zip(
            metrics(tmp_path / folder), metrics(tmp_path / "one"), strict=True
        ):
            assert row == pytest.approx(expected, rel=1e-4)
