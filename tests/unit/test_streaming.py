"""A walk through a model: what is in memory and read, where it goes on, what it refuses."""

import shutil
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model

from abft_fast import pack
from abft_fast.commands.analyze.attention import attention
from abft_fast.core.blocks import BlockBoundary
from abft_fast.core.packed_forward import PackedForward
from abft_fast.errors import RunError, UnsupportedModel, UserError
from abft_fast.models import loading, trainable
from abft_fast.options import AttentionConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.states import HiddenStates
from tests.families.test_families import tiny_hybrid
from tests.streamed_runs import (
    LABELS,
    Streamed,
    adapter_bytes,
    config_of,
    evaluated,
    resident,
    same_figures,
    same_logits,
    saved,
)
from tests.tiny_models import tiny_longrope, tiny_model
from tests.unit.test_training import make_prompts

pytestmark = pytest.mark.unit


@pytest.mark.slow
def test_the_penalty_of_one_block_is_the_papers(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=4, epochs=4, adaptation="pid")
    ordinary = resident(config, tmp_path / "ordinary")
    assert len({row["penalty"] for row in ordinary[0]}) > 2
    streamed = Streamed(config, tmp_path / "streamed").run()
    assert adapter_bytes(tmp_path / "streamed") == adapter_bytes(tmp_path / "ordinary")
    same_figures(streamed, ordinary)


def test_each_block_has_a_penalty_of_its_own(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient="local", epochs=4, adaptation="pid")
    rows, *_ = Streamed(config, tmp_path / "streamed").run()
    assert len(set(rows[-1]["penalty_by_block"])) > 1
    assert rows[0]["penalty_by_block"] == [config.penalty] * 4


def test_quantized_on_the_way_is_quantized_at_once(tmp_path):
    """NF4 of a block as it arrives is NF4 of the whole model."""
    pytest.importorskip("bitsandbytes")
    model = saved("llama", tmp_path, hidden_size=64, intermediate_size=64)
    config = config_of(model, gradient=2, quantized=True, adaptation="none")
    ordinary = resident(config, tmp_path / "ordinary")
    streamed = Streamed(config, tmp_path / "streamed").run()
    assert adapter_bytes(tmp_path / "streamed") == adapter_bytes(tmp_path / "ordinary")
    same_figures(streamed, ordinary)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_evaluated_layer_by_layer(family, kind, tmp_path):
    config = config_of(saved(family, tmp_path), gradient=2, trainable=kind)
    _, _, logits, heads = resident(config, tmp_path / "run")
    found, found_heads = evaluated(config, tmp_path / "run" / "adapter")
    same_logits(found, logits)
    assert found_heads.induction_heads == heads.induction_heads


def test_an_adapter_of_another_base_is_refused(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2)
    resident(config, tmp_path / "run")
    tiny_model("llama", seed=1).save_pretrained(config.model)
    with pytest.raises(UserError, match="other weights"):
        evaluated(config, tmp_path / "run" / "adapter")


def test_an_adapter_of_the_head_is_refused(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2)
    model = loading.load(config.model, torch.device("cpu"), torch.float32)
    trainable.unfreeze_query_key(model)
    trainable.train_head(model)
    trainable.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"lm_head.* outside"):
        evaluated(config, tmp_path / "adapter")


def test_one_block_is_in_memory_and_each_tensor_is_read_once(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2, trainable="full", adaptation="none")
    run = Streamed(config, tmp_path / "run")
    bring, alive = run.model.bring, []

    def watched(block, *ahead):
        assert not [reference for reference in alive if reference() is not None]
        bring(block, *ahead)
        weights = [p for i in block for p in run.model._layers[i].parameters()]
        assert not any(p.is_meta for p in weights)
        others = [p for i in set(range(4)) - set(block) for p in run.model._layers[i].parameters()]
        assert all(p.is_meta for p in others)
        alive.extend(weakref.ref(p) for p in weights)

    run.model.bring = watched
    run.run()
    assert run.model.model.get_input_embeddings().weight.is_meta
    weights = loading.load(config.model, torch.device("cpu"), torch.float32)
    outside = {"model.embed_tokens.weight", "lm_head.weight"}
    expected = {n: p.nbytes for n, p in weights.named_parameters() if n not in outside}
    read = Counter()
    for (_, name), count in run.model.weights.read_bytes.items():
        read[name] += count
    width = 4 * weights.config.hidden_size
    assert read.pop("model.embed_tokens.weight") == len(run.model.embedded) * width
    assert read.pop("lm_head.weight") == len(LABELS) * width
    assert dict(read) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_of_a_quantized_block_stays(bits, tmp_path):
    """Its statistics neither, and not what bitsandbytes keeps of a forward."""
    pytest.importorskip("bitsandbytes")
    name = saved("llama", tmp_path, hidden_size=64, intermediate_size=64)
    config = loading.read_config(name)
    model = StreamedModel(name, config, torch.device("cpu"), torch.float32, bits)
    prompts = make_prompts(2)
    model.read_outside({token for prompt in prompts for token in prompt.input_ids}, LABELS)
    model.bring(range(4))
    ids = torch.tensor([[model.embedded.index(token) for token in prompts[0].input_ids]])
    with torch.no_grad():
        model.model(ids)
    inside = [module for layer in model._layers for module in layer.modules()]
    buffers = {id(buffer) for module in inside for buffer in module.buffers()}
    assert any(_tensors_in(module) for module in inside)
    model.drop(range(4))
    kept = [tensor for module in inside for tensor in _tensors_in(module)]
    assert not [tensor for tensor in kept if id(tensor) not in buffers]


def _tensors_in(thing, seen=None):
    """All tensors with memory that an object's attributes lead to, those of submodules left out."""
    seen = set() if seen is None else seen
    found = []
    values = thing.values() if isinstance(thing, dict) else vars(thing).values()
    for value in values:
        if id(value) in seen or isinstance(value, torch.nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and not value.is_meta:
            found.append(value)
        if isinstance(value, dict) or hasattr(value, "__dict__"):
            found += _tensors_in(value, seen)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("states", ["memory", "disk"])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_walk_that_ended_in_any_block_resumable(kind, states, block, tmp_path):
    config = config_of(saved("llama", tmp_path), gradient="local", trainable=kind, epochs=3)
    whole = Streamed(config, tmp_path / "whole").run()
    folder = tmp_path / "ended"

    def start():
        return Streamed(config, folder, folder / "checkpoints" if states == "disk" else None)

    ended = start()
    run_steps = ended.steps.run

    def end(layers):
        run_steps(layers)  # the block's hidden states are written, and its end is not
        if layers.start == block:
            raise KeyboardInterrupt

    ended.steps.run = end
    with pytest.raises(KeyboardInterrupt):
        ended.run()
    again = start()
    same_figures(again.run(), whole)
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")
    read = [name for _, name in again.model.weights.read_bytes if "layers" in name]
    if block > 0:  # the vectors of the first layer tell whether it is the same model
        read = [name for name in read if not name.startswith("model.layers.0.")]
    assert {name.split(".")[2] for name in read} == {str(index) for index in range(block, 4)}


def test_a_walk_resumable_with_its_own_model(tmp_path):
    config = config_of(saved("qwen3", tmp_path), gradient=2)
    Streamed(config, tmp_path / "run").run()
    model = tiny_model("qwen3")
    for parameter in model.parameters():
        parameter.data += 0.1
    model.save_pretrained(config.model)
    with pytest.raises(UserError, match="other weights"):
        Streamed(config, tmp_path / "run").run()


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2)
    Streamed(config, tmp_path / "run").run()
    path = tmp_path / "run" / "checkpoints" / "block-000001" / "state-0" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="block-000001"):
        Streamed(config, tmp_path / "run").run()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_a_block_has_learnt_is_named_if_it_is_damaged(kind, tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2, trainable=kind)
    run = Streamed(config, tmp_path / "run")
    run.run()
    path = tmp_path / "run" / "checkpoints" / "block-000001" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    damaged = "block-000001/trained.safetensors cannot be read"
    with pytest.raises(RunError, match=damaged):
        run.checkpoint.trained.put_back(run.model, run.walk.blocks)
    with pytest.raises(RunError, match=damaged):
        Streamed(config, tmp_path / "run").run()


def test_what_a_stage_refuses_after_a_restore_is_its_own_message(tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2)
    Streamed(config, tmp_path / "run").run()
    again = Streamed(config, tmp_path / "run")

    def refuse(tensors, facts):
        raise UnsupportedModel("not this model")

    again.steps.restore = refuse
    with pytest.raises(UnsupportedModel, match="not this model"):
        again.run()


@pytest.mark.parametrize("layer", [1, 3])
def test_a_number_that_is_none_is_found_in_the_walk(layer, tmp_path):
    config = config_of(saved("llama", tmp_path), gradient=2)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[3, 3] = torch.nan
    model.save_pretrained(config.model)
    first = layer // 2 * 2
    where = f"model {config.model}: layers {first} to {first + 1}: the values are not finite"
    with pytest.raises(UserError, match=where):
        Streamed(config, tmp_path / "run").run()


def test_hidden_states_of_a_full_disk(tmp_path, monkeypatch):
    states = HiddenStates([10, 20], tmp_path / "deep" / "folder")
    states.check_space(32, 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 30 * 32 * 4 - 1))
    with pytest.raises(UserError, match="--train-samples"):
        states.check_space(32, 4)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("folder", "resumable"), [(None, True), ("states", True), ("states", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_return_as_they_were(folder, resumable, dtype, tmp_path):
    states = HiddenStates([3, 2], folder and tmp_path / folder, resumable=resumable)
    first, second = torch.randn(3, 4).to(dtype), torch.randn(2, 4).to(dtype)
    for _ in range(3):
        states.write(1, second)
        states.write(0, first)
        states.swap()
        assert torch.equal(states.read(0), first) and torch.equal(states.read(1), second)
        first, second = first + 1, second * 2
    if folder is not None:  # what has no name is gone with the process
        assert len(list((tmp_path / folder).iterdir())) == (2 if resumable else 0)
        states.remove_files()
        assert not list((tmp_path / folder).iterdir())


@pytest.mark.parametrize("size", [None, 0, 20])
def test_a_damaged_file_of_hidden_states_is_named(size, tmp_path):
    states = HiddenStates([3], tmp_path)
    states.write(0, torch.randn(3, 4))
    states.swap()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes() or torch.randn(3, 4).numpy().tobytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    resumed = HiddenStates([3], tmp_path)
    resumed.restore({}, states.save()[1])
    with pytest.raises(RunError, match=f"{path}.* is gone or cut short: delete {tmp_path}"):
        resumed.read(0)
    assert path.exists() == (size is not None)


def streamed_model(path):
    return StreamedModel(path, loading.read_config(path), torch.device("cpu"), torch.float32, None)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_keeps_in_the_base_are_refused(bias, tmp_path):
    """They would be read from the base's files when streamed, and stay where an adapter is off."""
    config = LoraConfig(target_modules=["q_proj"], bias=bias, task_type="CAUSAL_LM")
    get_peft_model(
        loading.load("builtin", torch.device("cpu"), torch.float32), config
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"bias={bias}.*without --stream"):
        streamed_model("builtin").load_adapter(tmp_path, print)
    analysis = resolve(AttentionConfig, {"adapter": tmp_path, "prompts": 2, "device": "cpu"})
    with pytest.raises(UserError, match=f"bias={bias}.*merge.*--tuned"):
        attention(analysis, Progress())


def test_prompts_that_must_run_alone_are_refused(tmp_path):
    tiny_longrope(20).save_pretrained(tmp_path)
    model = streamed_model(str(tmp_path))
    model.check_length(20)
    with pytest.raises(UserError, match="longest prompt"):
        model.check_length(21)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gradient": "full"}, "--gradient local or a number"),
        ({"gradient": "local", "checkpointing": True}, "--checkpointing"),
        ({"gradient": "local", "mauve_test": True}, "--mauve-test"),
        ({"gradient": "local", "device_map": "auto"}, "--device-map"),
        ({"gradient": "local", "trainable": "model"}, "--trainable model"),
        ({"method": "E2E"}, "--gradient"),
    ],
)
def test_options_that_no_walk_can_do(options, says):
    with pytest.raises(UserError, match=says):
        resolve(TrainConfig, {"stream": True, **options})


def test_states_on_disk_are_of_a_walk():
    with pytest.raises(UserError, match="needs --stream"):
        resolve(TrainConfig, {"stream_states": "disk"})


def test_weights_that_are_converted_as_they_are_read_are_refused(tmp_path):
    """Mixtral's files hold each expert by itself, and transformers stacks them."""
    model = streamed_model(saved("mixtral", tmp_path, num_local_experts=2, num_key_value_heads=2))
    with pytest.raises(UserError, match="another form"):
        model.bring(range(0, 1))


def test_layers_that_carry_state_are_refused(tmp_path):
    tiny_hybrid(["full_attention", "linear_attention"] * 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="without attention"):
        streamed_model(str(tmp_path))


def test_a_layer_that_gets_the_embedding_too_is_refused():
    """As where a family adds the embedding's hidden states in every layer."""
    hidden, layer = torch.zeros(1, 5, 8), torch.nn.Linear(8, 8)
    prompt = make_prompts(1)
    whole, part = (
        PackedForward(pack(prompt)),
        PackedForward(pack(prompt), layers_to_run=range(1, 2)),
    )
    more = {"position_embeddings": (hidden, hidden), "attention_mask": torch.zeros(1, 1, 5, 5)}
    BlockBoundary(1)(layer, (hidden,), {"abft": part, **more})
    BlockBoundary(1)(layer, (hidden,), {"abft": whole, "embedded": hidden + 1})
    with pytest.raises(UnsupportedModel, match="Linear gets more"):
        BlockBoundary(1)(layer, (hidden,), {"abft": part, "embedded": hidden + 1})


def test_weights_of_another_shape_are_refused(tmp_path):
    path = saved("llama", tmp_path)
    config = loading.read_config(path)
    config.intermediate_size = 40
    model = StreamedModel(path, config, torch.device("cpu"), torch.float32, None)
    with pytest.raises(UserError, match="shape"):
        model.bring(range(0, 1))
