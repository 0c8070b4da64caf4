"""Tiny random models of every supported family, with the features that make each special."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_key_value_heads": 2}
_SLIDING = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

FAMILIES = {
    "llama": {**_GQA},
    "smollm3": {**_GQA, **_SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0]},
    "qwen2": {**_GQA, **_SLIDING, "use_sliding_window": True},
    "qwen3": {**_GQA, "head_dim": 12},
    "mistral": {**_GQA, "sliding_window": 7},
    "phi3": {**_GQA, "sliding_window": 7},
    "olmo2": {**_GQA},
    "gemma2": {
        **_GQA, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 11,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {**_GQA, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 11},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {
        **_GQA, **_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2
    },
    "starcoder2": {**_GQA, "sliding_window": 7},
    "glm4": {**_GQA, "head_dim": 8},
    "cohere2": {**_GQA, **_SLIDING, "head_dim": 8},
}  # fmt: skip


def tiny_config(family, **changes):
    options = {**_COMMON, **FAMILIES.get(family, {}), **changes}
    if family == "gpt2":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            options.pop(name)
        options.pop("num_attention_heads")
        options.pop("max_position_embeddings")
    return CONFIG_MAPPING[family](**options)


def tiny_model(family, seed=0, **changes):
    """A float32 model in evaluation mode whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.uniform_(1, 2) if "gemma" in family else parameter.uniform_(1.5, 3.5)
            elif "sinks" in name:
                parameter.uniform_(-1, 1)
            elif parameter.ndim >= 2:
                parameter.normal_(std=0.4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.float().eval()


def tiny_longrope(switch):
    """A model whose RoPE is another one for prompts of more than `switch` tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return tiny_model(
        "phi3",
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, **factors,
            "original_max_position_embeddings": switch,
        },
        original_max_position_embeddings=switch,
    )  # fmt: skip
