"""Random weights that are made by name, for a walk through a synthetic model."""

import pytest
import torch

from abft_fast.models.synthetic import random_model, skeleton
from abft_fast.streaming.random_weights import RandomWeights
from tests.tiny_models import FAMILIES, tiny_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_as_the_family_begins(family, bits):
    if bits is not None:
        pytest.importorskip("bitsandbytes")
    config = tiny_config(family)
    model = skeleton(config, torch.float32, bits)
    made = random_model(config, torch.device("cpu"), torch.float32, None).state_dict()
    weights = RandomWeights(model)
    torch.manual_seed(0)
    for name, expected in made.items():
        tensor = weights.read(name)
        assert sorted(tensor.shape) == sorted(expected.shape), name  # NF4 turns those of GPT-2
        assert tensor.isfinite().all(), name
        is_constant = expected.ndim == 1 and (expected == expected[0]).all()
        if is_constant:  # a norm's weight, a bias
            assert torch.equal(tensor, expected), name
        elif tensor.ndim > 1:
            assert torch.equal(weights.read(name), tensor)
            assert tensor.std() == pytest.approx(config.initializer_range, rel=0.3), name
    assert all(p.is_meta for p in model.parameters())
    assert not weights.read_bytes


def test_rows_and_large_matrices():
    config = tiny_config("llama", hidden_size=2048, intermediate_size=4096, num_hidden_layers=1)
    weights = RandomWeights(skeleton(config, torch.bfloat16, None))
    assert weights.read("model.embed_tokens.weight", [3, 5, 9]).shape == (3, 2048)
    large = weights.read("model.layers.0.mlp.up_proj.weight")  # twice the numbers that are drawn
    assert large.shape == (4096, 2048) and large.dtype == torch.bfloat16
    assert torch.equal(large[:2048], large[2048:]) and large[:2048].unique().numel() > 1000
