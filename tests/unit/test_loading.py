"""Checkpoints as users have them: whole, damaged, quantized by others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from abft_fast import EncodedPrompt, attention_behavior_loss, builtin_model_path, pack
from abft_fast.errors import UserError
from abft_fast.models.files import check_model, find_damage
from abft_fast.models.loading import load, read_tokenizer
from abft_fast.models.preflight import check_attention, check_gradients
from abft_fast.models.trainable import add_lora, trained_parameters, unfreeze_query_key
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
SHARD = "model-00002-of-00008.safetensors"
FIRST_PROJECTION = "model.layers.0.mlp.gate_proj.weight"  # in that shard


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    save(tiny_model("llama", tie_word_embeddings=False), folder, max_shard_size="20KB")
    assert FIRST_PROJECTION in load_file(folder / SHARD)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def prompts():
    drawn = [torch.randint(3, 97, (n,)).tolist() for n in (9, 23)]
    return [EncodedPrompt(ids, [1, 4], [True, False]) for ids in drawn]


def the_line(folder, bits=None):
    with pytest.raises(UserError) as found:
        read_tokenizer(str(folder))
        load(str(folder), CPU, torch.float32, bits)
    assert "\n" not in str(found.value)
    return str(found.value)


def truncate(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def cut_inside_the_header(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:50])


def empty(folder):
    (folder / SHARD).write_bytes(b"")


def scramble_the_header(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[8:60] = bytes(range(128, 180))
    (folder / SHARD).write_bytes(content)


def remove(folder):
    (folder / SHARD).unlink()


def leave_the_pointer(folder):
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")


def lose_a_weight(folder):
    tensors = load_file(folder / SHARD)
    del tensors[FIRST_PROJECTION]
    save_file(tensors, folder / SHARD, {"format": "pt"})


def break_json(name, content="{oops"):
    def damage(folder):
        (folder / name).write_text(content)

    return damage


def name_a_missing_file(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][FIRST_PROJECTION] = "model-00009.safetensors"
    index.write_text(json.dumps(content))


DAMAGES = {
    "truncated": (truncate, f"{SHARD} is damaged, "),
    "cut": (cut_inside_the_header, f"{SHARD} is damaged, 50 bytes"),
    "empty": (empty, f"{SHARD} is damaged, 0 bytes"),
    "garbage": (scramble_the_header, f"{SHARD} is damaged, "),
    "missing": (remove, f"{SHARD} is missing, but model.safetensors.index.json names it"),
    "pointer": (leave_the_pointer, f"{SHARD} is a pointer of git-lfs"),
    "without-a-weight": (lose_a_weight, f"{SHARD} lacks {FIRST_PROJECTION}"),
    "index": (break_json("model.safetensors.index.json"), "index.json is not JSON"),
    "empty-index": (break_json("model.safetensors.index.json", "{}"), "does not say where"),
    "index-names-nothing": (name_a_missing_file, "model-00009.safetensors is missing"),
    "config": (break_json("config.json"), "config.json is not JSON"),
    "config-list": (break_json("config.json", "[1]"), "config.json holds no JSON object"),
    "tokenizer": (break_json("tokenizer.json"), "tokenizer.json is not JSON"),
}


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "nf4"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(checkpoint, damage, bits):
    change, message = DAMAGES[damage]
    change(checkpoint)
    line = the_line(checkpoint, bits)
    assert str(checkpoint) in line and message in line
    assert "download it again" in line or "git lfs pull" in line


def test_a_file_that_transformers_does_not_read_may_be_anything(checkpoint):
    (checkpoint / "notes.json").write_text("{}\n{}\n")
    assert find_damage(checkpoint) is None


def test_an_unreadable_file_is_not_called_damaged(checkpoint):
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    (checkpoint / "generation_config.json").mkdir()
    assert find_damage(checkpoint).endswith("generation_config.json cannot be read: Is a directory")


def test_an_index_beside_a_whole_file_is_not_read(tmp_path):
    """As in transformers."""
    save(tiny_model("llama", tie_word_embeddings=False), tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_model(str(tmp_path))
    assert load(str(tmp_path), CPU, torch.float32).lm_head.weight.isfinite().all()


def test_weights_that_are_nowhere_are_not_made_up(checkpoint):
    """transformers would draw them at random and go on."""
    lose_a_weight(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][FIRST_PROJECTION]
    index.write_text(json.dumps(content))
    assert f"1 weights, such as {FIRST_PROJECTION}, are missing from the files" in the_line(
        checkpoint
    )


def test_a_backbone_without_its_head_is_refused(tmp_path):
    save(tiny_model("llama", tie_word_embeddings=False).model, tmp_path)
    assert "such as lm_head.weight, are missing from the files" in the_line(tmp_path)


def test_weights_of_another_shape_are_named(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    assert "layers.0.mlp.down_proj.weight, are missing from the files or have" in the_line(
        checkpoint
    )


def test_a_name_the_hub_would_not_take_is_one_line():
    assert "no good" in the_line("no good")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_checkpoint_of_every_family_loads(family, tmp_path):
    saved = tiny_model(family)
    save(saved, tmp_path)
    loaded = load(str(tmp_path), CPU, torch.float32)
    for name, weight in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "nf4"])
@pytest.mark.parametrize("weight", [FIRST_PROJECTION, "model.layers.0.input_layernorm.weight"])
def test_a_number_that_is_none_is_found_before_the_run(checkpoint, bits, weight):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / index["weight_map"][weight]
    tensors = load_file(shard)
    tensors[weight].view(-1)[3] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    model = load(str(checkpoint), CPU, torch.float32, bits)
    where = weight.removesuffix(".weight")
    with pytest.raises(UserError, match=f"^{where} of .*{shard.name}: the values are not finite: "):
        check_attention(model, prompts())
    assert not any(module._forward_hooks for module in model.modules())


def quantized_by(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


@pytest.mark.parametrize("method", [*AUTO_QUANTIZATION_CONFIG_MAPPING, "made-up"])
def test_a_format_is_judged_before_weights_are_read(checkpoint, method):
    """One that can be read goes on to the weights, which are damaged."""
    kind, _, bits = method.partition("_")
    settings = {"quant_method": method, "bits": 4}
    if kind == "bitsandbytes":
        settings = {"quant_method": kind, f"load_in_{bits}": True}
    quantized_by(checkpoint, settings)
    truncate(checkpoint)
    line = the_line(checkpoint)
    if "is damaged" not in line:
        assert f"is quantized by {method}, " in line
        assert line.endswith("use the unquantized checkpoint with --quantized")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq", "`pip install optimum`"),
        ("awq", "`pip install gptqmodel`"),
        ("aqlm", "`pip install aqlm"),
        ("compressed-tensors", "`pip install compressed-tensors"),
        ("bitnet", "through which no gradient passes"),
        ("made-up", "a format transformers does not know"),
    ],
)
def test_what_is_missing_for_a_format_is_said(checkpoint, method, message):
    if f"{method}-installed" in installed():
        pytest.skip(f"what reads {method} is installed")
    quantized_by(checkpoint, {"quant_method": method, "bits": 4})
    assert message in the_line(checkpoint)


def installed():
    from importlib.util import find_spec

    packages = {
        "gptq": "optimum", "awq": "gptqmodel", "aqlm": "aqlm",
        "compressed-tensors": "compressed_tensors",
    }  # fmt: skip
    return {f"{method}-installed" for method, package in packages.items() if find_spec(package)}


def test_four_bits_without_their_state_are_refused(checkpoint):
    quantized_by(checkpoint, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "the files hold no quantization state" in the_line(checkpoint)


def gradients(model):
    """Of LoRA whose B is not 0, by name."""
    torch.manual_seed(0)
    model = add_lora(model, rank=2)
    for name, parameter in trained_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(1)
    attention_behavior_loss(model, pack(prompts()), head_filter=False).loss.backward()
    return {name: p.grad for name, p in trained_parameters(model).items()}


@pytest.mark.parametrize("bits", [4, 8])
def test_what_bitsandbytes_has_quantized_trains_like_the_freshly_quantized(bits, tmp_path):
    fresh = load("builtin", CPU, torch.float32, bits)
    fresh.save_pretrained(tmp_path)
    read_tokenizer("builtin").save_pretrained(tmp_path)
    stored = load(str(tmp_path), CPU, torch.float32)
    check_gradients(stored)
    expected, actual = gradients(fresh), gradients(stored)
    assert all(grad.abs().max() > 0 for grad in expected.values())
    torch.testing.assert_close(actual, expected)


def test_fp8_is_dequantized_where_there_is_no_gpu(tmp_path, caplog):
    if torch.cuda.is_available():
        pytest.skip("here FP8 stays FP8")
    save(tiny_model("llama", tie_word_embeddings=False), tmp_path)
    quantized_by(tmp_path, {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]})
    path = tmp_path / "model.safetensors"
    tensors, expected = {}, {}
    for name, weight in load_file(path).items():
        if "proj" in name:
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.view(1, 1)
            expected[name] = tensors[name].float() * scale
        else:
            tensors[name] = expected[name] = weight
    save_file(tensors, path, {"format": "pt"})
    model = load(str(tmp_path), CPU, torch.float32)
    assert "quantized by fp8: dequantized as it is read" in caplog.text
    for name, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_experts_are_dequantized(tmp_path, caplog):
    """As GPT-OSS is stored; its kernels have no backward."""
    saved = tiny_model("gpt_oss", intermediate_size=64)
    save(saved, tmp_path)
    quantized_by(tmp_path, {"quant_method": "mxfp4"})
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    expected = dict(tensors)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), dtype=torch.uint8)
        scales = torch.randint(124, 128, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = scales
        values = E2M1[codes.long()] * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = values.flatten(2).transpose(1, 2)
    save_file(tensors, path, {"format": "pt"})
    model = load(str(tmp_path), CPU, torch.float32)
    assert "quantized by mxfp4: dequantized as it is read" in caplog.text
    for name, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())


class ForwardOnly(nn.Linear):
    """A kernel without a backward, as formats for inference have."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class WrongBackward(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.detach() + 0.1 * (y - y.detach())


@pytest.mark.parametrize("kind", [ForwardOnly, WrongBackward])
def test_a_quantized_layer_that_loses_the_gradient_is_refused(kind):
    model = load("builtin", CPU, torch.float32, 4)
    check_gradients(model)
    width = model.config.hidden_size
    model.model.layers[1].self_attn.o_proj = kind(width, width)
    with pytest.raises(
        UserError, match=rf"layers.1.self_attn.o_proj \({kind.__name__}\) does not pass"
    ):
        check_gradients(model)


def test_a_layer_that_peft_cannot_adapt_is_named():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed()
    with pytest.raises(
        UserError, match="llama: PEFT cannot add LoRA to its Packed layers"
    ) as found:
        add_lora(model, rank=2)
    assert "\n" not in str(found.value)


def test_quantized_weights_are_not_trained_themselves():
    model = load("builtin", CPU, torch.float32, 4)
    with pytest.raises(UserError, match=r"weights are quantized: --trainable full needs float"):
        unfreeze_query_key(model)
