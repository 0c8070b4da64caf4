import re

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.core import eager_attention
from abft_fast.core.backbone import prepare, query_key_projections
from abft_fast.core.packed_forward import LossComplete, PackedForward
from abft_fast.core.run_packed import run_packed
from abft_fast.errors import RunError, UserError
from abft_fast.models.preflight import check_attention, relative_error, tolerance
from abft_fast.models.trainable import (
    add_lora,
    enable_checkpointing,
    load_adapter,
    save_adapter,
    set_trained,
    trained_parameters,
    unfreeze_query_key,
)
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.training.loop import backward, check_finite, check_first_step, pseudo_batches
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit

SEPARATE, FUSED = ["llama", "gemma2"], ["gpt2", "phi3", "gpt_neox"]


def make_prompts(count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(count):
        n = int(torch.randint(12, 40, (1,), generator=generator))
        ids = torch.randint(3, 97, (n,), generator=generator).tolist()
        positions = torch.randperm(n, generator=generator)[:4].sort().values.tolist()
        correct = (torch.rand(4, generator=generator) < 0.5).tolist()
        prompts.append(EncodedPrompt(ids, positions, correct))
    return prompts


@pytest.mark.parametrize("trainable", [unfreeze_query_key, lambda m: add_lora(m, 4)])
def test_the_pseudo_batch_is_an_exact_mean(trainable):
    """1 x 32 = 32 x 1, and all of it equals one packed batch of all prompts."""
    prompts = make_prompts()
    found = []
    for budget in (1, 100, 10**6):
        model = trainable(tiny_model("llama")).eval()
        config = resolve(TrainConfig, {})
        loss, behavior = backward(model, prompts, config, 0.5, Accelerator(cpu=True), budget)
        grads = [p.grad for p in trained_parameters(model).values()]
        found.append(
            (loss, behavior.result().induction_heads, torch.cat([g.flatten() for g in grads]))
        )
    for loss, heads, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert heads == found[0][1]
        assert (gradient - found[0][2]).norm() <= 1e-5 * found[0][2].norm()


def optimize(model, steps=3, lr=1e-2):
    optimizer = torch.optim.Adam(trained_parameters(model).values(), lr=lr)
    for _ in range(steps):
        attention_behavior_loss(model, pack(make_prompts(8)), head_filter=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", SEPARATE + FUSED)
def test_full_trains_query_and_key_weights_only(family):
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unfreeze_query_key(model)
    optimize(model)
    projections = {f"{p.name}.weight": p for p in query_key_projections(model)}
    for name, after in model.named_parameters():
        changed = after != before[name]
        if name not in projections:
            assert not changed.any(), name
            continue
        rows = projections[name].rows
        if rows is None:
            assert changed.any(), name
        else:
            changed = changed.T if family == "gpt2" else changed
            assert changed[rows].any() and not changed[~rows].any(), name


@pytest.mark.parametrize("family", SEPARATE + FUSED)
def test_lora_changes_queries_and_keys_only(family):
    model = add_lora(tiny_model(family), rank=4)
    assert all("lora_" in name for name in trained_parameters(model))
    optimize(model)
    for projection in query_key_projections(model):
        delta = projection.module.get_delta_weight("default")
        delta = delta.T if family == "gpt2" else delta
        rows = projection.rows
        if rows is None:
            assert delta.abs().max() > 0
        else:
            assert delta[rows].abs().max() > 0 and (delta[~rows] == 0).all()


@pytest.mark.parametrize("family", FUSED)
def test_values_stay_untrained_on_the_device_that_a_weight_moves_to(family):
    """A streamed model's LoRA is made on the CPU. Here the other device is `meta`."""
    for name, weight in trained_parameters(add_lora(tiny_model(family), 4)).items():
        for hook in (weight._backward_hooks or {}).values():
            assert "lora_B" in name
            assert hook(torch.ones(weight.shape, device="meta")).is_meta


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_loads_with_plain_peft(family, tmp_path):
    model = add_lora(tiny_model(family), rank=4)
    optimize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path))
    packed = pack(make_prompts(4))
    torch.testing.assert_close(
        attention_behavior_loss(loaded, packed).loss, attention_behavior_loss(model, packed).loss
    )


def test_half_precision_weights_become_float32_masters():
    model = unfreeze_query_key(tiny_model("llama").bfloat16())
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}


def test_every_prompt_is_taken_once_an_epoch():
    config = resolve(TrainConfig, {"epochs": 3, "pseudo_batch_size": 5})
    batches = pseudo_batches(12, config)
    order = [i for batch in batches for i in batch]
    assert [len(b) for b in batches] == [5] * 7 + [1]
    for epoch in range(3):
        assert sorted(order[epoch * 12 : (epoch + 1) * 12]) == list(range(12))
    assert order[:12] != order[12:24]
    assert batches == pseudo_batches(12, config)


@pytest.mark.parametrize(
    ("step", "loss", "norm", "message"),
    [
        (1, float("nan"), 1.0, "not finite before anything is learnt"),
        (5, float("nan"), 1.0, "not finite: lower --lr"),
        (5, 1.0, float("inf"), "not finite"),
    ],
)
def test_numbers_that_overflow_stop_a_run(step, loss, norm, message):
    with pytest.raises(RunError, match=message):
        check_finite(resolve(TrainConfig, {}), step, loss, norm)


@pytest.mark.parametrize(
    ("norm", "heads", "message"),
    [(0.0, 0.0, "--no-head-filter"), (0.0, 3.0, "gradient is 0")],
)
def test_a_first_step_that_learns_nothing_stops_a_run(norm, heads, message):
    with pytest.raises(RunError, match=message):
        check_first_step(resolve(TrainConfig, {}), norm, heads)


def test_the_preflight_lets_a_good_family_pass_and_stops_a_wrong_one(monkeypatch):
    check_attention(tiny_model("gemma2").double(), make_prompts(4))
    model = tiny_model("gemma2")
    check_attention(model, make_prompts(4))
    assert model.config._attn_implementation == "abft"
    # A family whose soft-cap does not arrive.
    for layer in model.model.layers:
        layer.self_attn.forward = _without_softcap(layer.self_attn)
    with pytest.raises(UserError, match=r"gemma2: packed attention differs"):
        check_attention(model, make_prompts(4))


def test_rounded_scores_of_large_keys_are_not_taken_for_the_models_own():
    """Qwen2.5 has them, by their biases; eager attention in bfloat16 rounds such scores."""
    model, prompts = tiny_model("qwen2"), make_prompts(4)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.normal_(std=200)

    def last_states(implementation):
        model.set_attn_implementation(implementation)
        states = [model.model(torch.tensor([p.input_ids])).last_hidden_state for p in prompts]
        return torch.cat(states, dim=1)

    torch.testing.assert_close(last_states(eager_attention.NAME), last_states("eager"))
    model.bfloat16()
    rounded = relative_error(last_states("eager"), last_states(eager_attention.NAME))
    assert rounded > tolerance(model, torch.bfloat16)
    check_attention(model, prompts)


@pytest.mark.parametrize("family", ["gpt_neox", "starcoder2"])
def test_float32_of_cudas_layer_norm_does_not_reach_attention(family, monkeypatch):
    """Quantized layers hand the dtype of their input on; CUDA's layer norm leaves float32."""
    bnb = pytest.importorskip("bitsandbytes")
    layer_norm = F.layer_norm

    def as_on_a_gpu(x, shape, weight=None, bias=None, eps=1e-5):
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), shape, weight.float(), bias.float(), eps)

    monkeypatch.setattr(F, "layer_norm", as_on_a_gpu)
    model = tiny_model(family).bfloat16()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                four_bits = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None,
                    compute_dtype=torch.bfloat16, quant_type="nf4",
                )  # fmt: skip
                four_bits.load_state_dict(child.state_dict())
                setattr(module, name, four_bits.to("cpu"))
    prompts, kept = make_prompts(4), {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run_packed(prepare(model), PackedForward(pack(prompts), keep=kept))
        entering = torch.randn(1, 3, 32)
        forward = PackedForward(pack(prompts), layers_to_run=range(1))
        with pytest.raises(LossComplete):
            forward.pass_by(1, entering)
    assert {key.dtype for pair in kept.values() for key in pair} == {torch.bfloat16}
    assert forward.leaving.dtype == torch.bfloat16


def test_a_huge_first_token_does_not_hide_the_others():
    expected = torch.ones(9, 4)
    expected[0] = 1000
    wrong = expected.clone()
    wrong[1:] *= 1.5
    assert relative_error(wrong, expected) > 0.4


def _without_softcap(module):
    forward = type(module).forward

    def wrapped(*args, **kwargs):
        cap = module.attn_logit_softcapping
        if module.config._attn_implementation == "abft":
            module.attn_logit_softcapping = None
        try:
            return forward(module, *args, **kwargs)
        finally:
            module.attn_logit_softcapping = cap

    return wrapped


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    add_lora(tiny_model("llama"), rank=4).save_pretrained(tmp_path)
    assert load_adapter(tiny_model("llama"), tmp_path)
    for depth in (2, 6):
        with pytest.raises(UserError, match="changes other layers"):
            load_adapter(tiny_model("llama", num_hidden_layers=depth), tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_checkpointing_leaves_dropout_off(family):
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5} if family == "opt" else {}
    model = tiny_model(family, **changes)
    packed = pack(make_prompts(4))
    expected = attention_behavior_loss(model, packed).loss
    enable_checkpointing(model)
    torch.testing.assert_close(attention_behavior_loss(model, packed).loss, expected)


@pytest.mark.parametrize("gradient", ["full", "local", 2])
@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_layers_asked_for_learn(family, trainable, gradient, tmp_path):
    """And by the gradients that they have where all layers learn."""
    prompts = pack(make_prompts(8))
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    found = []
    for layers in (None, [1, 2]):
        torch.manual_seed(0)
        model = set_trained(tiny_model(family, **depth), trainable, 4, layers=layers)
        for name, parameter in trained_parameters(model).items():
            if "lora" in name:  # B is 0 at first, and then A has no gradient
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.data = 0.05 * values
        others = [p for n, p in model.named_parameters() if re.search(r"\.[03]\..*lora", n)]
        for parameter in others:
            parameter.data = torch.zeros_like(parameter)  # then both compute the same
        loss = attention_behavior_loss(model, prompts, head_filter=False, gradient=gradient).loss
        loss.backward()
        found.append({n: p.grad for n, p in trained_parameters(model).items()})
    every, chosen = found
    wanted = [name for name in every if re.search(r"\.[12]\.", name)]
    assert list(chosen) == wanted and 0 < len(wanted) == len(every) / 2
    for name in wanted:
        torch.testing.assert_close(chosen[name], every[name])
        assert chosen[name].abs().max() > 0
    before = model(torch.arange(3, 9)[None]).logits
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_model(family, **depth), tmp_path / "adapter")
    torch.testing.assert_close(again(torch.arange(3, 9)[None]).logits, before)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_layers_that_a_model_does_not_have_are_named(trainable):
    with pytest.raises(UserError, match="--layers: the model has no attention layer 7: its layers"):
        set_trained(tiny_model("llama"), trainable, 4, layers=[0, 7])


def test_layers_are_read_from_words_and_yaml():
    for given, expected in (("3, 0-1", [0, 1, 3]), (2, [2]), (None, None)):
        assert resolve(TrainConfig, {"layers": given}).layer_indices == expected


def test_a_first_step_without_heads_names_what_the_user_can_change(tmp_path):
    (tmp_path / "r.csv").write_text("text,label\ngood,1\nbad,0\n")
    for dataset, words in (("subj", None), (str(tmp_path / "r.csv"), "label words by --template")):
        config = resolve(TrainConfig, {"dataset": dataset})
        with pytest.raises(RunError, match="no induction head") as error:
            check_first_step(config, 1.0, 0.0)
        line = str(error.value)
        assert "--no-head-filter" in line
        assert words in line if words else "--template" not in line
