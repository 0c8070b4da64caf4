"""Merged models against the sums they should be."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM

from abft_fast import builtin_model_path
from abft_fast.commands import evaluate
from abft_fast.commands.merge import merge
from abft_fast.commands.session import Session
from abft_fast.core.backbone import without_peft
from abft_fast.errors import UserError
from abft_fast.memory.types import Arithmetic
from abft_fast.models import merging
from abft_fast.models.loading import load, read_tokenizer
from abft_fast.models.synthetic import is_quantized
from abft_fast.models.trainable import (
    add_lora,
    load_adapter,
    save_adapter,
    set_trained,
    trained_parameters,
    unfreeze_query_key,
)
from abft_fast.options import EvalConfig, MergeConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 30, 31]])


def random_adapter(model, folder, seed):
    torch.manual_seed(seed)
    adapted = add_lora(model, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    adapted.unload()


@pytest.fixture
def base(tmp_path):
    """A tiny model in bfloat16 on disk and two adapters of it."""
    folder = tmp_path / "base"
    model = tiny_model("llama")
    model.to(torch.bfloat16).save_pretrained(folder)
    read_tokenizer("builtin").save_pretrained(folder)
    for seed in (1, 2):
        random_adapter(load(str(folder), CPU, torch.float32), tmp_path / f"adapter{seed}", seed)
    return folder


def run(model, adapters, output, **options):
    options |= {"model": str(model), "adapter": adapters, "output_dir": str(output)}
    merge(resolve(MergeConfig, options), Progress())
    return AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # with biases; fused and transposed
def test_a_coefficient_of_trained_weights_interpolates(family, tmp_path):
    base, trained = tiny_model(family), unfreeze_query_key(tiny_model(family))
    base.save_pretrained(tmp_path / "base")
    read_tokenizer("builtin").save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in trained_parameters(trained).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (tmp_path / "adapter").mkdir()
    save_adapter(trained, tmp_path / "adapter")
    half = run(tmp_path / "base", f"{tmp_path / 'adapter'}=0.5", tmp_path / "half").state_dict()
    before, after = base.state_dict(), trained.state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and moved == {name for name in before if not before[name].equal(half[name])}
    for name in moved:
        torch.testing.assert_close(half[name], (before[name] + after[name]) / 2)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_trained_head_is_carried_and_leaves_the_embedding(trainable, tmp_path):
    base, trained = (tiny_model("llama", tie_word_embeddings=True) for _ in range(2))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    read_tokenizer("builtin").save_pretrained(tmp_path / "base")
    trained.load_state_dict(base.float().state_dict())
    trained = set_trained(trained, trainable, 4, head=True)
    with torch.no_grad():
        for parameter in trained_parameters(trained).values():
            parameter.add_(0.03 * torch.randn_like(parameter))
    (tmp_path / "adapter").mkdir()
    save_adapter(trained, tmp_path / "adapter")
    loaded = load_adapter(load(str(tmp_path / "base"), CPU, torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, trained(IDS).logits, rtol=1e-5, atol=1e-5)
    coarse = load_adapter(load(str(tmp_path / "base"), CPU, torch.bfloat16), tmp_path / "adapter")
    for module in coarse.modules():
        if isinstance(module, ModulesToSaveWrapper):
            assert module.modules_to_save["default"].weight.dtype == torch.float32
    embedding = base.get_input_embeddings().weight
    assert torch.equal(trained.get_input_embeddings().weight, embedding)
    assert not torch.equal(without_peft(trained).get_output_embeddings().weight, embedding)
    merged = run(tmp_path / "base", str(tmp_path / "adapter"), tmp_path / "merged").float()
    difference = (merged(IDS).logits - trained(IDS).logits).norm() / trained(IDS).logits.norm()
    assert difference < 0.02  # merged weights are bfloat16, as the base's
    assert torch.equal(merged.get_input_embeddings().weight, embedding)


def test_a_merged_model_is_the_adapted_one(tmp_path):
    model = load("builtin", CPU, torch.float32)
    random_adapter(model, tmp_path / "adapter", 0)
    expected = load_adapter(load("builtin", CPU, torch.float32), tmp_path / "adapter")
    merged = run("builtin", str(tmp_path / "adapter"), tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    assert not torch.allclose(plain(IDS).logits, expected(IDS).logits, atol=1e-2)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_changes_add_up_times_their_coefficients(base, tmp_path):
    adapters = [tmp_path / f"adapter{seed}" for seed in (1, 2)]
    merged = run(base, f"{adapters[0]}=1.5,{adapters[1]}=-0.25", tmp_path / "merged")
    assert merged.dtype == torch.bfloat16  # as it was stored
    expected = load(str(base), CPU, torch.float32)
    start = dict(expected.named_parameters())
    changes = []
    for adapter in adapters:
        one = load_adapter(load(str(base), CPU, torch.float32), adapter).merge_and_unload()
        changes.append({n: p.detach() - start[n].detach() for n, p in one.named_parameters()})
    moved = 0
    for name, parameter in merged.named_parameters():
        wanted = start[name].detach() + 1.5 * changes[0][name] - 0.25 * changes[1][name]
        torch.testing.assert_close(parameter.float(), wanted.bfloat16().float())
        moved += bool(changes[0][name].abs().max() > 0)
    assert moved == 2 * merged.config.num_hidden_layers


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_dequantized(bits, tmp_path):
    random_adapter(load("builtin", CPU, torch.float32, bits), tmp_path / "adapter", 0)
    adapted = load_adapter(load("builtin", CPU, torch.float32, bits), tmp_path / "adapter")
    merged = run(
        "builtin", str(tmp_path / "adapter"), tmp_path / "merged", quantized=True, bits=bits
    )
    assert getattr(merged.config, "quantization_config", None) is None
    found = dict(merged.named_modules())
    quantized = 0
    for name, module in adapted.get_base_model().named_modules():
        base = getattr(module, "base_layer", module)
        if not is_quantized(base) or name.endswith("base_layer"):
            continue
        weight = base.weight
        if bits == 4:
            expected = dequantize_4bit(weight.data, weight.quant_state)
        else:
            expected = weight.data * weight.SCB[:, None] / 127
        if module is not base:
            expected = expected + module.get_delta_weight("default")
        torch.testing.assert_close(found[name].weight, expected, rtol=1e-3, atol=1e-5)
        quantized += 1
    assert quantized == 4 * 7  # layers, matrices of one


def test_what_peft_cannot_merge_is_refused(base, tmp_path, monkeypatch):
    def adapter(name, model, **options):
        config = LoraConfig(task_type="CAUSAL_LM", **options)
        adapted = get_peft_model(load(str(model), CPU, torch.float32), config)
        for parameter in adapted.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    biases = adapter("biases", base, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(
        UserError, match=f"{biases} cannot be merged: Impossible to merge LoRA with"
    ):
        run(base, biases, tmp_path / "merged")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    read_tokenizer("builtin").save_pretrained(tmp_path / "tied")
    embedding = adapter("embedding", tmp_path / "tied", target_modules=["embed_tokens"])
    run(tmp_path / "tied", embedding, tmp_path / "right")
    monkeypatch.setattr(merging, "untie", lambda model: None)  # as PEFT merges by itself
    with pytest.raises(
        UserError, match="embedding cannot be merged: merged by PEFT, its kind LORA"
    ):
        run(tmp_path / "tied", embedding, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_mistakes_leave_nothing_behind(base, tmp_path):
    adapter, output = tmp_path / "adapter1", tmp_path / "merged"
    with pytest.raises(UserError, match="holds no adapter_config"):
        run(base, f"{adapter},{tmp_path / 'none'}", output)
    with pytest.raises(UserError, match="does not fit the model"):
        run("builtin", str(adapter), output)
    assert not output.exists()
    with pytest.raises(UserError, match="exists: choose another --output-dir"):
        run(base, str(adapter), base)
    for wrong in ("a=b", "a=", "=1", "a,,b", "a=inf", "a=1=b", ["a", "b=c"]):
        with pytest.raises(UserError, match="use FOLDER or FOLDER=NUMBER"):
            resolve(MergeConfig, {"adapter": wrong, "output_dir": "x"})
    with pytest.raises(UserError, match="--adapter is missing"):
        resolve(MergeConfig, {"output_dir": "x"})


@pytest.mark.parametrize(
    ("given", "adapters"),
    [
        ("plain", [("plain", 1)]),
        ("plain=-2.5", [("plain", -2.5)]),
        ("plain=0.5,new", [("plain", 0.5), ("new", 1)]),
        (["plain", "new=2"], [("plain", 1), ("new", 2)]),
        ("lr=0.001", [("lr=0.001", 1)]),
        ("lr=0.001=3", [("lr=0.001", 3)]),
        ("lr=0.002", [("lr", 0.002)]),
        ("lr=0.001/adapter", [("lr=0.001/adapter", 1)]),
        ("lr=0.001/adapter=2,plain", [("lr=0.001/adapter", 2), ("plain", 1)]),
        ("lr=0.003/gone", [("lr=0.003/gone", 1)]),
        ("a,b/adapter", [("a,b/adapter", 1)]),
        ("a,b/adapter=0.5", [("a,b/adapter", 0.5)]),
        (["a,b/adapter=0.5", "plain,new"], [("a,b/adapter", 0.5), ("plain", 1), ("new", 1)]),
    ],
    ids=str,
)
def test_folders_with_signs_in_their_names(given, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "lr=0.001/adapter", "a,b/adapter"):
        (tmp_path / folder).mkdir(parents=True)
    config = resolve(MergeConfig, {"adapter": given, "output_dir": "x"})
    assert config.adapters == [(Path(folder), number) for folder, number in adapters]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("coefficients", [(0.5, 0.7), (1.0, 1.0), (-1.0, 0.0)])
def test_eval_adds_adapters_as_merge_does(coefficients, mixed, tmp_path):
    """Weights are set in place, in float32: no folder is written for a sum that is only tested."""
    for seed in (1, 2):
        random_adapter(load("builtin", CPU, torch.float32), tmp_path / f"a{seed}", seed)
    named = [f"{tmp_path / f'a{i}'}={c}" for i, c in zip((1, 2), coefficients, strict=True)]
    merged = run("builtin", named, tmp_path / "merged").eval()
    config = resolve(EvalConfig, {"adapter": ",".join(named), "device": "cpu"})
    assert config.adapters == [
        (tmp_path / f"a{i}", c) for i, c in zip((1, 2), coefficients, strict=True)
    ]
    session = Session(config, Progress())
    session.arithmetic = Arithmetic("cpu", mixed)
    evaluate._load(config, session, evaluate.prepare_tests(session))
    plain = load("builtin", CPU, torch.float32).get_decoder()(IDS).last_hidden_state
    states, expected = (m.get_decoder()(IDS).last_hidden_state for m in (session.model, merged))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert (states - plain).abs().max() > 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"a1", "a2", "merged"}


def test_one_adapter_is_loaded_and_a_sum_is_not_for_quantized_weights(tmp_path):
    (tmp_path / "a").mkdir()
    one = resolve(EvalConfig, {"adapter": str(tmp_path / "a"), "quantized": True})
    assert one.adapter_folders == [tmp_path / "a"] and not one.adapter_is_a_sum
    repeated = resolve(EvalConfig, {"adapter": ["a", "b=0.5"]})
    assert repeated.adapters == resolve(EvalConfig, {"adapter": "a,b=0.5"}).adapters
    assert repeated.adapter_is_a_sum
    with pytest.raises(UserError, match=r"--adapter a=0\.5 is added to the model's weights"):
        resolve(EvalConfig, {"adapter": "a=0.5", "quantized": True})
    with pytest.raises(UserError, match="use FOLDER or FOLDER=NUMBER"):
        resolve(EvalConfig, {"adapter": "a,,b"})


@pytest.mark.parametrize("tied", [True, False])
def test_whole_models_and_adapters_add_up(tied, tmp_path):
    """`full` leaves an adapter and `model` a model; both are points of the same space."""
    torch.manual_seed(3)
    start = tiny_model("llama", tie_word_embeddings=tied)
    start.save_pretrained(tmp_path / "base")
    read_tokenizer("builtin").save_pretrained(tmp_path / "base")
    ends = {}
    for name, trainable in (("m", "model"), ("f", "full")):
        end = load(str(tmp_path / "base"), CPU, torch.float32)
        end = set_trained(end, trainable, 4)
        with torch.no_grad():
            for parameter in trained_parameters(end).values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        ends[name] = {n: p.detach().clone() for n, p in end.state_dict().items()}
        if trainable == "model":
            end.save_pretrained(tmp_path / name)
        else:
            (tmp_path / name).mkdir()
            save_adapter(end, tmp_path / name)
    both = f"{tmp_path}/m=0.5,{tmp_path}/f=-2"
    merged = run(tmp_path / "base", both, tmp_path / "merged").state_dict()
    before = start.state_dict()
    for name, weight in before.items():
        moved = 0.5 * (ends["m"][name] - weight) - 2 * (ends["f"][name] - weight)
        torch.testing.assert_close(merged[name], weight + moved, rtol=1e-5, atol=1e-6)
    whole = run(tmp_path / "base", f"{tmp_path}/m", tmp_path / "whole").state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(weight, ends["m"][name], rtol=1e-5, atol=1e-6)


def test_a_model_of_another_shape_is_refused(tmp_path):
    for name, width in (("base", 64), ("other", 96)):
        tiny_model("llama", intermediate_size=width).save_pretrained(tmp_path / name)
        read_tokenizer("builtin").save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match=r"other does not fit the base: .*mlp.*\(.*96.*64"):
        run(tmp_path / "base", f"{tmp_path}/other=0.5", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
