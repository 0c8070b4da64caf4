"""Every kind of adapter that is used, on the model, packed and merged, against plain PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from abft_fast.core.label_logits import label_logits
from abft_fast.core.packing import EncodedPrompt
from abft_fast.models import files
from abft_fast.models.merging import add_adapters
from abft_fast.models.trainable import load_adapter
from tests.tiny_models import tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.slow]

IDS = torch.arange(5, 29)[None]
QK = {"target_modules": ["q_proj", "k_proj"]}
TIED = {"tie_word_embeddings": True}

KINDS = {
    **dict.fromkeys(files._CHANGE_WEIGHTS, QK),
    "ADALORA": {**QK, "total_step": 10},
    "C3A": {**QK, "block_size": 8},
    "FOURIERFT": {**QK, "n_frequency": 50},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {**QK, "r": 8},
    "PSOFT": {**QK, "r": 4},
    "ROAD": {**QK, "group_size": 8},
    "SHIRA": {**QK, "r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 7]},
    "VBLORA": {**QK, "vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {**QK, "n_frequency": 50},
}
LORAS = {
    "patterns": ("llama", {}, {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "dora": ("llama", {}, {"use_dora": True}),
    "weights moved at first": ("llama", {}, {"init_lora_weights": "olora"}),
    "some layers": ("llama", {}, {"layers_to_transform": [0, 2]}),
    "bias all": ("qwen2", {}, {"bias": "all"}),
    "bias of LoRA": ("qwen2", {}, {"lora_bias": True}),
    "fused and transposed": ("gpt2", {}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "every linear layer": ("llama", {}, {"target_modules": "all-linear"}),
    "norms": ("llama", {}, {"modules_to_save": ["norm", "input_layernorm"]}),
    "experts": ("gpt_oss", {}, {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "tokens": ("llama", TIED, {"trainable_token_indices": [5, 6, 7]}),
    "a tied head": ("llama", TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "a tied embedding": ("llama", TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "a tied embedding in both places": (
        "llama", TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "a saved embedding in both places": (
        "llama", TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}  # fmt: skip


def make(folder, config, family="llama", **changes):
    """Save an adapter far from its first values; return its logits by PEFT."""
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(family, **changes), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(tiny_model(family, **changes), folder))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def check_against_peft(folder, config, family="llama", **changes):
    expected = make(folder, config, family, **changes)
    base = tiny_model(family, **changes)
    before, at_first = {n: w.clone() for n, w in base.state_dict().items()}, logits(base)
    assert not torch.allclose(at_first, expected, atol=1e-2)

    adapted = load_adapter(base, folder, print)
    torch.testing.assert_close(logits(adapted), expected)
    prompts = [EncodedPrompt(ids.tolist(), [], []) for ids in (IDS[0], IDS[0, :9])]
    packed, *_ = label_logits(adapted, prompts, [7, 8])
    torch.testing.assert_close(packed[0], expected[0, -1, [7, 8]], rtol=1e-3, atol=1e-3)

    merged = add_adapters(tiny_model(family, **changes), [(folder, 1.0)], print)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    after = {n: w.clone() for n, w in merged.state_dict().items()}
    half = add_adapters(tiny_model(family, **changes), [(folder, 0.5)], print).state_dict()
    twice = add_adapters(tiny_model(family, **changes), [(folder, 2.0), (folder, -1.5)], print)
    for name, weight in half.items():
        torch.testing.assert_close(weight, (before[name] + after[name]) / 2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight, twice.state_dict()[name], rtol=1e-4, atol=1e-5)
    return merged


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_of_adapter_is_what_peft_makes_of_it(kind, tmp_path):
    family = "qwen2" if kind == "BEFT" else "llama"  # it is merged into biases
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **KINDS[kind])
    check_against_peft(tmp_path, config, family)


@pytest.mark.parametrize("case", LORAS)
def test_lora_with_more_is_what_peft_makes_of_it(case, tmp_path):
    family, changes, options = LORAS[case]
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **QK, **options})
    merged = check_against_peft(tmp_path, config, family, **changes)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert merged.config.tie_word_embeddings == (head.weight is embedding.weight)
    one_place = case in ("a tied head", "a tied embedding")
    assert (head.weight is embedding.weight) == (
        bool(changes or family == "gpt2") and not one_place
    )
