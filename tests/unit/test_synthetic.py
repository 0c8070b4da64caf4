"""Random models of known shapes: their sizes, and the memory of making them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.errors import UserError
from abft_fast.models.loading import load, read_config
from abft_fast.models.shapes import known_names, known_shape
from abft_fast.models.synthetic import is_quantized, random_model, skeleton
from abft_fast.models.trainable import add_lora, trained_parameters
from tests.tiny_models import FAMILIES, tiny_config

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")

# As their publishers give them, in billions; Gemma's without its vision tower.
PARAMETERS = {
    "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61,
    "qwen2.5-14b": 14.7, "qwen2.5-32b": 32.5, "qwen2.5-72b": 72.7,
    "deepseek-r1-distill-qwen-14b": 14.8, "llama3-8b": 8.03, "llama3-42b": 43.2,
    "llama3-56b": 55.6, "llama3-70b": 70.6, "llama3.1-405b": 406, "falcon3-7b": 7.46,
    "mistral-small": 23.6, "gemma3-27b": 27.0, "gpt-oss-20b": 20.9, "gpt2-l": 0.774,
    "gpt2-xl": 1.56,
}  # fmt: skip


@pytest.mark.slow
def test_every_known_shape_has_its_parameters():
    assert set(PARAMETERS) == set(known_names())
    for name, billions in PARAMETERS.items():
        model = skeleton(known_shape(name), torch.bfloat16, None)
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01), name


def test_the_inferred_shape_trains_as_many_parameters_as_the_paper_says():
    model = add_lora(skeleton(known_shape("llama3-56b"), torch.bfloat16, None), rank=16)
    assert sum(p.numel() for p in trained_parameters(model).values()) == 80 * 409_600  # 33M


def test_a_shape_is_found_by_its_hub_id():
    assert known_shape("qwen/qwen2.5-32B").to_dict() == known_shape("qwen2.5-32b").to_dict()
    assert known_shape("qwen2.5-33b") is None
    assert known_shape("llama3-70b:4").num_hidden_layers == 4
    assert known_shape("llama3-70b:81") is known_shape("llama3-70b:") is None
    with pytest.raises(
        UserError, match=r"model synthetic:foo: there is no such shape; use one of qwen2\.5-0\.5b, "
    ):
        read_config("synthetic:foo")


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_whole_and_learns(family, bits):
    model = random_model(tiny_config(family), CPU, torch.float32, bits)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(p.isfinite().all() for p in model.parameters() if p.is_floating_point())
    assert any(map(is_quantized, model.modules())) == (bits is not None)
    adapted = add_lora(model, 4)
    prompt = EncodedPrompt(list(range(3, 23)), [15, 17], [True, False])
    attention_behavior_loss(adapted, pack([prompt]), head_filter=False).loss.backward()
    norms = [p.grad.norm() for n, p in trained_parameters(adapted).items() if "lora_B" in n]
    assert len(norms) > 0 and all(norm > 0 for norm in norms)


def test_rotary_buffers_are_those_of_a_model_made_in_one_piece():
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    found = dict(random_model(config, CPU, torch.float32, 4).named_buffers())
    torch.testing.assert_close(found, expected)


def test_a_tied_head_stays_tied():
    model = random_model(tiny_config("llama", tie_word_embeddings=True), CPU, torch.float32, 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


MEMORY = """
import sys
import torch
from transformers import LlamaConfig
from abft_fast.memory.simulation import bytes_of
from abft_fast.models.synthetic import random_model
from benchmarks.peak_memory import high_water_mark, reset_high_water_mark

torch.set_num_threads(1)
def make(layers):
    return random_model(
        LlamaConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=4,
        ),
        torch.device("cpu"), torch.bfloat16, 4,
    )

make(1)
reset_high_water_mark("cpu")
before = high_water_mark("cpu")
model = make(10)
print(bytes_of(model.parameters()), high_water_mark("cpu") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's own high-water mark")
def test_it_takes_its_own_memory_and_a_weights():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    own, peak = map(int, run.stdout.split())
    largest = 4 * 1024 * 2816  # in float32; bitsandbytes takes 3.5 of it
    assert own < peak <= 1.05 * own + 4 * largest, (own, largest, peak)


def test_load_makes_one(tmp_path):
    with pytest.raises(UserError, match="synthetic weights stay on one GPU"):
        load("synthetic:qwen2.5-0.5b", CPU, torch.float32, 4, {"device_map": "auto"})
