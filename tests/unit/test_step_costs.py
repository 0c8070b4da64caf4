"""What a step on a tiny Llama costs, exactly: products, waits, memory, graphs.

A count that has moved is named, with what it was.
"""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.core import backbone
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.memory.simulation import TENSORS, bytes_of, peak_memory, without_memory
from abft_fast.memory.types import Flow
from abft_fast.models.synthetic import skeleton
from abft_fast.models.trainable import enable_checkpointing, set_trained, trained_parameters
from tests.costs import Largest, MatrixProducts, Waits, moved
from tests.tiny_models import tiny_config, tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.slow]
FLOWS = (Flow("full"), Flow("full", True), Flow(4), Flow(2), Flow("local"))
by_flow = pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.options)
RANK = 3


def packed_prompts(lengths):
    return pack([EncodedPrompt([0] * n, [2, 5, 8], [True, False, True]) for n in lengths])


def step(model, packed, gradient):
    attention_behavior_loss(model, packed, gradient=gradient).loss.backward()


def products(shape, tokens, block, trainable):
    """Multiplications and additions of a step's matrix products, two a weight and token.

    All that a loss needs, and no more: no LM head, of the last layer Q, K and V alone, gradients
    of what is trained and on the way to it.
    """
    hidden, head_dim = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    out = {"q": shape.num_attention_heads * head_dim, "k": shape.num_key_value_heads * head_dim}
    query_key = hidden * sum(out.values())
    value = hidden * out["k"]
    rest = out["q"] * hidden + 3 * hidden * shape.intermediate_size  # O and the MLP
    lora_a, lora_b = 2 * hidden * RANK, RANK * sum(out.values())  # of Q and K
    total = 0
    for layer in range(shape.num_hidden_layers):
        last = layer == shape.num_hidden_layers - 1
        first_of_block = layer % block == 0  # its input needs no gradient
        last_of_block = last or (layer + 1) % block == 0  # its output has none
        total += query_key + value + rest * (not last)
        total += (query_key + value * (not last_of_block)) * (not first_of_block)
        total += rest * (not last_of_block)
        if trainable == "lora":
            total += lora_a + lora_b  # forward
            total += lora_a + 2 * lora_b + lora_a * (not first_of_block)
        else:
            total += query_key  # the weights' own gradient
    return 2 * tokens * total


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize(
    ("gradient", "block"), [("full", 5), (2, 2), ("local", 1)], ids=["full", "2", "local"]
)
def test_matrix_products(gradient, block, trainable):
    model = set_trained(tiny_model("llama", num_hidden_layers=5), trainable, RANK)
    lengths = [20, 9, 31]
    with MatrixProducts() as counted:
        step(model, packed_prompts(lengths), gradient)
    formula = products(model.config, sum(lengths), block, trainable)
    assert counted.flops == formula, f"{counted.flops} operations, the formula says {formula}"


WAITS = {"item": 1}  # on a CPU alone: whether a token id is outside the vocabulary


@by_flow
def test_what_the_host_waits_for(flow):
    """Nothing that grows with layers, prompts or tokens."""
    for layers, lengths in ((2, [20, 9, 31]), (5, [20, 9, 31]), (2, [40] * 9)):
        model = set_trained(tiny_model("llama", num_hidden_layers=layers), "full", RANK)
        if flow.checkpointing:
            enable_checkpointing(model)
        packed = packed_prompts(lengths).to("cpu")  # as before every step: bounds are known then
        with Waits() as waits:
            step(model, packed, flow.gradient)
        assert not moved(waits, WAITS), f"{layers} layers: {moved(waits, WAITS)}"


def test_a_micro_batch_waits_once():
    """For what the heads did, which is read when its backward is queued."""
    model = set_trained(tiny_model("llama", num_hidden_layers=2), "full", RANK)
    packed = packed_prompts([20, 9, 31]).to("cpu")
    with Waits() as waits:
        behavior = attention_behavior_loss(model, packed, attention="separate")
        behavior.loss.backward()
        BehaviorMean().add(behavior, packed)
    expected = {**WAITS, "tolist": 1}
    assert not moved(waits, expected), moved(waits, expected)


def test_how_many_modules_a_search_for_attention_looks_at(monkeypatch):
    """Two a layer, the layer and its attention, of 33 with LoRA."""
    layers = 5
    model = set_trained(tiny_model("llama", num_hidden_layers=layers), "lora", RANK)
    is_attention, looked_at = backbone._is_attention, []
    monkeypatch.setattr(
        backbone, "_is_attention", lambda module: looked_at.append(module) or is_attention(module)
    )
    assert list(backbone.attention_layers(model)) == list(range(layers))
    assert len(looked_at) == 2 * layers, f"{len(looked_at)} modules, before {2 * layers}"


@pytest.mark.parametrize("flow", [Flow("full"), Flow("local")], ids=lambda flow: flow.options)
def test_no_tensor_grows_with_the_square_of_tokens(flow):
    """On real tensors, among them those that the batch alone gives rise to."""
    model = set_trained(tiny_model("llama", num_hidden_layers=2), "full", RANK)
    for lengths in ([64] * 8, [512], [64] * 16):
        packed = packed_prompts(lengths)
        with Largest() as largest:
            step(model, packed, flow.gradient)
        expected = sum(lengths) * model.config.intermediate_size
        assert largest.elements == expected, f"{lengths}: {largest.elements}, before {expected}"


@functools.cache
def peak(layers, flow, lengths):
    """Most bytes of a step beyond the model, and the bytes of what it trains."""
    shape = tiny_config("llama", num_hidden_layers=layers, max_position_embeddings=4096)
    model = without_memory(set_trained(skeleton(shape, torch.float32, None), "lora", RANK))
    if flow.checkpointing:
        enable_checkpointing(model)
    trained = trained_parameters(model).values()
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)  # of the batch before
    packed = packed_prompts(lengths)
    peaks = peak_memory(lambda: step(model, packed, flow.gradient), "cpu")
    return peaks[TENSORS], bytes_of(trained)


PROMPTS = (64,) * 8
LOSSES = len(PROMPTS) * 4 * (4 + 4 + 4 + 1)  # of a layer's four heads: loss, two masses, filter
PEAKS = dict(zip(FLOWS, (5_505_504, 1_503_916, 2_864_204, 1_442_188, 744_168), strict=True))


@by_flow
def test_peak_memory_is_no_more_than_it_was(flow):
    found, _ = peak(8, flow, PROMPTS)
    assert found <= 1.02 * PEAKS[flow], f"{found} bytes, before {PEAKS[flow]}"


@by_flow
def test_peak_memory_in_depth(flow):
    """Every flow but full adds no more than it must keep of a layer."""
    (few, few_trained), (many, many_trained) = peak(8, flow, PROMPTS), peak(12, flow, PROMPTS)
    if flow.gradient != "full":
        added = many_trained - few_trained + 4 * LOSSES  # nothing of the forward
    elif flow.checkpointing:
        added = 4 * (4 * sum(PROMPTS) * 32 + LOSSES)  # what enters a layer, 32 wide
    else:
        added = (peak(16, flow, PROMPTS)[0] - few) / 2  # a line
    assert many - few == added, f"4 more layers add {many - few} bytes, not {added}"


@pytest.mark.parametrize("flow", [Flow("full"), Flow("local")], ids=lambda flow: flow.options)
def test_peak_memory_is_linear_in_tokens_however_long_the_prompts(flow):
    short, long, one = (peak(2, flow, (n,) * (4096 // n))[0] for n in (64, 512, 4096))
    twice = peak(2, flow, (64,) * 128)[0]
    assert one < long < short, "4,096 tokens in fewer, longer prompts take more"
    assert twice <= 2 * short, f"twice the prompts: {twice} bytes for {short}"


def test_graphs_of_a_compiled_step():
    """As many whatever the depth: no layer breaks the graph (`local` does, once a block)."""
    packed = packed_prompts([20, 9, 31])
    for layers in (2, 3):
        torch._dynamo.reset()
        counters.clear()
        model = set_trained(tiny_model("llama", num_hidden_layers=layers), "full", RANK)
        weights = list(trained_parameters(model).values())
        expected = attention_behavior_loss(model, packed).loss
        graphs = CompileCounter()
        loss = torch.compile(attention_behavior_loss, backend=graphs)(model, packed).loss
        # On a CPU also a jump, if a token id is outside.
        found = graphs.frame_count, sum(counters["graph_break"].values())
        assert found == (5, 0), f"{layers} layers: {found} graphs and breaks, before (5, 0)"
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss, weights)
        torch.testing.assert_close(found, torch.autograd.grad(expected, weights))
