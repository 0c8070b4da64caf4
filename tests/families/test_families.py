"""Packed prompts through our attention == one by one through each family's own eager attention."""

import gc
import math
import weakref

import pytest
import torch
from accelerate import cpu_offload
from bitsandbytes.functional import dequantize_4bit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.core.backbone import (
    backbone,
    decoder_layers,
    must_run_alone,
    prepare,
    query_key_projections,
)
from abft_fast.core.label_logits import label_logits
from abft_fast.errors import UnsupportedModel
from abft_fast.models.preflight import check_attention
from abft_fast.models.trainable import add_lora, enable_checkpointing, trained_parameters
from tests.tiny_models import FAMILIES, tiny_longrope, tiny_model

pytestmark = pytest.mark.families

PENALTY, REWARD = 0.5, 1.0


def make_prompts(seed=0):
    """Odd lengths, several labels, one prompt without any, one of one token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for n, k in ((23, 4), (9, 2), (31, 8), (5, 0), (1, 0), (14, 6)):
        ids = torch.randint(3, 97, (n,), generator=generator).tolist()
        positions = torch.randperm(n, generator=generator)[:k].sort().values.tolist()
        correct = (torch.rand(k, generator=generator) < 0.5).tolist()
        prompts.append(EncodedPrompt(ids, positions, correct))
    return prompts


def eager_losses(model, prompt, head_filter):
    """Loss and induction heads of each layer, straight from the attention matrices."""
    attentions = model(torch.tensor([prompt.input_ids]), output_attentions=True).attentions
    n, k = len(prompt.input_ids), len(prompt.label_positions)
    threshold = k / (k + math.log(n)) if k else 0.0
    correct = torch.tensor(prompt.label_is_correct, dtype=torch.bool)
    losses, induction, masses = [], [], []
    for attention in attentions:
        on_labels = attention[0, :, -1, prompt.label_positions]
        mass = on_labels.sum(-1)
        loss = PENALTY * on_labels[:, ~correct].sum(-1) + REWARD * (1 - on_labels[:, correct]).sum(
            -1
        )
        if head_filter:
            loss = loss * (mass > threshold)
        losses.append(loss.sum())
        induction.append(mass > threshold)
        masses.append(mass)
    return torch.stack(losses), torch.stack(induction), torch.stack(masses)


def trained_weights(model):
    """W_Q and W_K parameters by layer, and which of their rows are Q or K."""
    found = []
    for p in query_key_projections(model):
        rows = slice(None) if p.rows is None else p.rows
        transposed = type(p.module).__name__ == "Conv1D"
        found.append((p.layer, p.module.weight, rows, transposed))
    return found


def query_key_part(grad, rows, transposed):
    return (grad.T if transposed else grad)[rows]


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("head_filter", [True, False], ids=["filter", "no-filter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one_eager(family, head_filter):
    prompts = make_prompts()
    reference, model = tiny_model(family), tiny_model(family)
    per_prompt = [eager_losses(reference, prompt, head_filter) for prompt in prompts]
    losses = torch.stack([losses for losses, _, _ in per_prompt])  # (R, layers)
    weights = trained_weights(reference)
    parameters = [w for _, w, _, _ in weights]

    packed = pack(prompts)
    behavior = attention_behavior_loss(
        model, packed, penalty=PENALTY, reward=REWARD, head_filter=head_filter
    )
    induction = torch.stack([heads for _, heads, _ in per_prompt], dim=1)
    mass = torch.stack([mass for _, _, mass in per_prompt], dim=1)
    assert relative_error(behavior.loss, losses.sum(1).mean()) <= 1e-4
    assert relative_error(behavior.label_mass, mass) <= 1e-4
    assert torch.equal(behavior.is_induction, induction)
    assert induction.any() and not induction.all()

    depth = losses.shape[1]
    expected_full = torch.autograd.grad(losses.sum() / len(prompts), parameters, retain_graph=True)
    for gradient in ("full", "local", 1, 2, depth):
        model.zero_grad()
        attention_behavior_loss(
            model,
            packed,
            penalty=PENALTY,
            reward=REWARD,
            head_filter=head_filter,
            gradient=gradient,
        ).loss.backward()
        block = {"full": depth, "local": 1}.get(gradient, gradient)
        for (layer, weight, rows, transposed), ours, full in zip(
            weights, trained_weights(model), expected_full, strict=True
        ):
            # A weight learns from its own layer and the later ones of its block.
            last = (layer // block + 1) * block
            (expected,) = (
                (full,)
                if gradient == "full"
                else torch.autograd.grad(
                    losses[:, layer:last].sum() / len(prompts), weight, retain_graph=True
                )
            )
            expected = query_key_part(expected, rows, transposed)
            actual = query_key_part(ours[1].grad, rows, transposed)
            assert gradient != "full" or expected.norm() > 0
            assert relative_error(actual, expected) <= 1e-4, (gradient, layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_do_not_see_each_other(family):
    model = tiny_model(family)
    prompts = make_prompts()
    changed = [*prompts[:1], EncodedPrompt([5] * 40, [1, 2], [True, False]), *prompts[2:]]
    first, second = (attention_behavior_loss(model, pack(p)) for p in (prompts, changed))
    torch.testing.assert_close(first.label_mass[:, 0], second.label_mass[:, 0])
    torch.testing.assert_close(first.label_mass[:, 2:], second.label_mass[:, 2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_still_works_as_before(family):
    ids = torch.randint(3, 97, (2, 19))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model = tiny_model(family)
    before = model(ids, attention_mask=mask).logits
    attention_behavior_loss(model, pack(make_prompts()))
    after = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[0, 4:], before[0, 4:], rtol=1e-4, atol=1e-4)
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 22)


def checkpoint_all(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})


def checkpoint_all_but_the_first(model):
    checkpoint_all(model)
    decoder_layers(backbone(model))[0].gradient_checkpointing = False


CHECKPOINTING = [enable_checkpointing, checkpoint_all, checkpoint_all_but_the_first]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("gradient", ["full", "local", 2, 3, 9])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_non_reentrant_checkpointing_changes_nothing(family, gradient, checkpointing):
    packed = pack(make_prompts())
    grads = []
    for enable in (None, checkpointing):
        model = tiny_model(family)
        if checkpointing is not enable_checkpointing:  # which switches dropout off
            model.train()
        if enable is not None:
            enable(model)
        attention_behavior_loss(model, packed, head_filter=False, gradient=gradient).loss.backward()
        grads.append([weight.grad for _, weight, _, _ in trained_weights(model)])
    assert all(grad.abs().sum() > 0 for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("gradient", ["full", "local", 2])
def test_checkpointing_where_the_last_layer_has_no_attention(gradient):
    grads = []
    for checkpointing in (False, True):
        model = tiny_hybrid(["full_attention", "linear_attention"] * 2).train()
        if checkpointing:
            enable_checkpointing(model)
        prompt = pack(make_prompts()[:1])
        attention_behavior_loss(model, prompt, head_filter=False, gradient=gradient).loss.backward()
        grads.append([weight.grad for _, weight, _, _ in trained_weights(model)])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_that_is_dropped_keeps_nothing_alive(checkpointing):
    """Also where the forward fails, as it does when memory runs out."""
    model = tiny_model("llama").train()
    if checkpointing:
        enable_checkpointing(model)
    alive = []

    def watch(module, args, out):
        alive.append(weakref.ref(out))

    def fail(module, args):
        raise RuntimeError("out of memory")

    model.model.layers[1].mlp.register_forward_hook(watch)
    attention_behavior_loss(model, pack(make_prompts()))
    model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_behavior_loss(model, pack(make_prompts()))
    gc.collect()
    assert len(alive) == 2 and all(reference() is None for reference in alive)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_computed_that_the_loss_does_not_need(family):
    """Of the last layer only what comes before its attention, and no graph after a block's."""
    model = tiny_model(family)
    model.requires_grad_(False)
    for _, weight, _, _ in trained_weights(model):
        weight.requires_grad_()
    finished = []
    for layer in decoder_layers(backbone(model)):
        layer.register_forward_hook(
            lambda module, args, out: finished.append(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    for gradient, graph in (
        ("full", [True, True, True]),
        ("local", [False] * 3),
        (2, [True, False, True]),
        (3, [True, True, False]),
    ):
        finished.clear()
        attention_behavior_loss(model, pack(make_prompts()), gradient=gradient)
        assert finished == graph, gradient


def test_the_last_layer_computes_no_attention():
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    called = []
    model = tiny_model("llama")
    with Ops():
        attention_behavior_loss(model, pack(make_prompts()))
    layers = model.config.num_hidden_layers
    assert called.count("abft.flash_attention_with_last_row_loss.default") == layers - 1
    assert called.count("abft.last_row_loss.default") == 1


def test_gradients_of_blocks_are_gradients():
    """They scale, add up over losses, and may be used again where the graph is retained."""
    packed = pack(make_prompts())
    grads = []
    for gradient in (2, 4):  # 4 is all layers: the same as 2 for the last block
        model = tiny_model("llama")
        loss = attention_behavior_loss(model, packed, gradient=gradient).loss * 3
        loss = loss + attention_behavior_loss(model, packed, gradient=gradient).loss
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append(model.model.layers[3].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])
    once = tiny_model("llama")
    attention_behavior_loss(once, packed).loss.backward()
    torch.testing.assert_close(grads[0], 8 * once.model.layers[3].self_attn.q_proj.weight.grad)


@pytest.mark.parametrize("gradient", ["full", 2])
def test_reentrant_checkpointing_of_some_layers_is_refused(gradient):
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    decoder_layers(backbone(model))[-1].gradient_checkpointing = False
    with pytest.raises(RuntimeError, match="use_reentrant"):
        attention_behavior_loss(model, pack(make_prompts()), gradient=gradient)
    for parameter in decoder_layers(backbone(model))[0].parameters():
        parameter.requires_grad_(False)  # then this layer alone has nothing to lose
    model.gradient_checkpointing_disable()
    decoder_layers(backbone(model))[0].gradient_checkpointing = True
    attention_behavior_loss(model, pack(make_prompts()), gradient=gradient).loss.backward()


@pytest.mark.parametrize("gradient", ["full", "local", 2])
def test_small_gradients_in_float16_are_not_lost(gradient):
    """A GradScaler scales the loss, and a block's gradients are found before it does."""
    prompts, scale, found = make_prompts(), 2.0**14, []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama")
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            behavior = attention_behavior_loss(
                model, pack(prompts), gradient=gradient, head_filter=False,
                penalty=1e-5, reward=2e-5,
            )  # fmt: skip
        (behavior.loss * scale).backward()
        projections = query_key_projections(model)
        found.append({p.name: p.module.weight.grad for p in projections})
    for name, expected in found[0].items():
        error = (found[1][name] - expected).norm() / expected.norm()
        assert error < 0.04, (name, error)  # 2 % of the whole gradient are the forward's rounding


def test_an_offloaded_model_is_refused():
    model = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="llama: weights are offloaded"):
        attention_behavior_loss(model, pack(make_prompts()))


def test_reentrant_checkpointing_is_refused():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        attention_behavior_loss(model, pack(make_prompts()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {"new_decoder_architecture": False, "alibi": False}),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_a_family_out_of_reach_is_refused_by_name(family, changes):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **changes
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=family):
        attention_behavior_loss(model, pack(make_prompts()))


def tiny_hybrid(layer_types, **changes):
    """Layers without attention among the others."""
    return tiny_model(
        "qwen3_next",
        layer_types=layer_types,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **changes,
    )


def test_layers_without_attention_are_skipped_and_said(caplog):
    model = tiny_hybrid(["linear_attention", "full_attention"] * 2)
    prompts = make_prompts()
    behavior = attention_behavior_loss(model, pack(prompts))
    assert len(behavior.label_mass) == 2
    assert "layer 0 has no attention" in caplog.text and "layer 2" in caplog.text
    # Their state would run on from prompt to prompt: they are run one at a time.
    alone = [attention_behavior_loss(model, pack([prompt])) for prompt in prompts]
    torch.testing.assert_close(
        behavior.label_mass, torch.cat([one.label_mass for one in alone], dim=1)
    )
    torch.testing.assert_close(behavior.loss, torch.stack([one.loss for one in alone]).mean())
    rows, _, _ = label_logits(model, prompts, [5, 6])
    expected = [model(torch.tensor([p.input_ids])).logits[0, -1, [5, 6]] for p in prompts]
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-4)
    check_attention(model, prompts)


def test_rope_that_depends_on_length_does_not_leak():
    model = tiny_longrope(switch=20)
    prompts = make_prompts()
    together = attention_behavior_loss(model, pack(prompts)).label_mass
    alone = [attention_behavior_loss(model, pack([p])).label_mass for p in prompts]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_rope_that_depends_on_length_in_some_layers_does_not_leak():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny_model(
        "gemma3_text",
        rope_parameters={
            "full_attention": {**rope, "rope_type": "dynamic", "factor": 4.0},
            "sliding_attention": rope,
        },
        max_position_embeddings=20,
    )
    prompts = make_prompts()
    assert not must_run_alone(backbone(model), 20) and must_run_alone(backbone(model), 21)
    assert min(map(len, prompts)) <= 20 < max(map(len, prompts))
    together = attention_behavior_loss(model, pack(prompts)).label_mass
    alone = [attention_behavior_loss(model, pack([p])).label_mass for p in prompts]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_a_window_that_does_not_arrive_is_refused():
    model = tiny_model("phimoe", sliding_window=7, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(ValueError, match="does not hand its window"):
        attention_behavior_loss(model, pack(make_prompts()))


def test_two_models_of_one_config_object_are_both_prepared():
    first = tiny_model("llama")
    second = type(first)(first.config).eval()
    packed = pack(make_prompts())
    attention_behavior_loss(first, packed)
    grads = []
    for gradient in ("full", "local"):
        second.zero_grad()
        behavior = attention_behavior_loss(second, packed, gradient=gradient, head_filter=False)
        behavior.loss.backward()
        grads.append(second.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_attention_matrices_can_still_be_asked_for(family):
    ids = torch.randint(3, 97, (1, 19))
    model = tiny_model(family)
    before = model(ids, output_attentions=True).attentions
    attention_behavior_loss(model, pack(make_prompts()))
    after = model(ids, output_attentions=True).attentions
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_autocast_leaves_the_loss_in_float32(family):
    model = tiny_model(family)
    packed = pack(make_prompts())
    exact = attention_behavior_loss(model, packed, head_filter=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        behavior = attention_behavior_loss(model, packed, head_filter=False)
    behavior.loss.backward()
    assert behavior.loss.dtype == behavior.label_mass.dtype == torch.float32
    assert relative_error(behavior.loss, exact.loss) < 0.05
    assert all(w.grad.isfinite().all() for _, w, _, _ in trained_weights(model))


@pytest.mark.parametrize("gradient", ["Full", 0, -1, True, 1.5, None])
def test_a_malformed_gradient_is_refused(gradient):
    with pytest.raises(ValueError, match="gradient"):
        attention_behavior_loss(tiny_model("llama"), pack(make_prompts()), gradient=gradient)


@pytest.mark.parametrize("penalty", [-1.0, float("nan")])
def test_a_penalty_that_rewards_is_refused(penalty):
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        attention_behavior_loss(tiny_model("llama"), pack(make_prompts()), penalty=penalty)


@pytest.mark.parametrize("token", [97, -1])
def test_a_token_outside_the_vocabulary_is_refused(token):
    prompt = EncodedPrompt([3, token, 4], [1], [True])
    with pytest.raises(ValueError, match=f"input_ids holds {token}, the model's vocabulary"):
        attention_behavior_loss(tiny_model("llama"), pack([prompt]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_backbone_without_lm_head(family):
    model = tiny_model(family)
    packed = pack(make_prompts())
    expected = attention_behavior_loss(model, packed)
    torch.testing.assert_close(attention_behavior_loss(model.base_model, packed), expected)


def nf4_llama(folder):
    """bitsandbytes' own CPU path, for real."""
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
    )
    assert type(quantized.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    return quantized


def test_nf4_gives_the_gradient_of_its_dequantized_weights_whatever_ran_before(tmp_path):
    """A forward without gradients repacks bitsandbytes' weights; ours must not lose any by it."""
    quantized = nf4_llama(tmp_path)
    with torch.no_grad():
        quantized(torch.tensor([[5, 6, 7]]))
    plain = tiny_model("llama", hidden_size=64, intermediate_size=64)
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            prepare(quantized)
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    grads = []
    for model in (quantized, plain):
        torch.manual_seed(0)
        adapted = add_lora(model, rank=4)
        for name, parameter in trained_parameters(adapted).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            attention_behavior_loss(adapted, pack(make_prompts()), head_filter=False)
        attention_behavior_loss(adapted, pack(make_prompts()), head_filter=False).loss.backward()
        grads.append([p.grad for p in trained_parameters(adapted).values()])
    for ours, expected in zip(*grads, strict=True):
        assert expected.norm() > 0 and relative_error(ours, expected) <= 1e-3


def test_an_nf4_base_with_lora_learns(tmp_path):
    quantized = nf4_llama(tmp_path)
    model = add_lora(quantized, rank=4)
    optimizer = torch.optim.Adam(trained_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = attention_behavior_loss(model, pack(make_prompts()), head_filter=False).loss
        loss.backward()
        assert any(p.grad.abs().max() > 0 for p in trained_parameters(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
