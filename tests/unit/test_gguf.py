"""Models in GGUF files: the same weights, one line where a file cannot be read."""

import json
import os
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from abft_fast import builtin_model_path
from abft_fast.errors import UserError
from abft_fast.models import gguf as models_gguf
from abft_fast.models.gguf import metadata_folder, sha256
from abft_fast.models.loading import load, read_config, read_tokenizer, save_tokenizer
from tests.command_line import abft_fast

gguf = pytest.importorskip("gguf")
pytestmark = [pytest.mark.unit, pytest.mark.slow]

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}  # llama.cpp permutes rows of Q and K of one


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, architecture, quantize=None, seed=0, scale_rope=lambda writer: None):
    """A tiny random model with the built-in vocabulary, its weights as llama.cpp has them."""
    tokenizer = json.loads((builtin_model_path() / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    torch.manual_seed(seed)
    config = CONFIGS[architecture](vocab_size=len(tokens), **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    for name, weight in model.state_dict().items():
        stored = weight.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2
            stored = stored.reshape(heads, 2, -1, stored.shape[1]).swapaxes(1, 2)
            stored = stored.reshape(weight.shape)
        kind = quantize if quantize and weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quantize(stored.copy(), kind)
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")), raw, raw_shape=raw.shape, raw_dtype=kind
        )
    scale_rope(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_weights_that_were_written(architecture, tmp_path):
    expected = write(tmp_path / "m.gguf", architecture).state_dict()
    actual = load(str(tmp_path / "m.gguf"), CPU, torch.float32).state_dict()
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_blocks_are_what_transformers_reads_and_nf4_is_made_of_them(tmp_path):
    write(tmp_path / "m.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    model = load(str(tmp_path), CPU, torch.float32)  # a folder that holds one
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    quantized = load(str(tmp_path / "m.gguf"), CPU, torch.float32, bits=4)
    assert isinstance(quantized.model.layers[0].mlp.up_proj, Linear4bit)
    ids = torch.tensor([[5, 6, 7]])
    error = (quantized(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert 0 < error < 0.3


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def factors_of_llama_3(writer):
    """By llama.cpp's own formula, which interpolates between two wavelengths."""
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    longest, shortest = 8192 / 1.0, 8192 / 4.0
    factors = []
    for wavelength in (2 * torch.pi / frequencies).tolist():
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        middle = 1 / ((1 - smooth) / 32 + smooth)
        factors.append(1 if wavelength < shortest else 32 if wavelength > longest else middle)
    assert len(set(factors)) == 3  # all three cases
    writer.add_tensor("rope_freqs.weight", torch.tensor(factors).float().numpy())


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (linear, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (factors_of_llama_3, LLAMA_3),
        (lambda writer: None, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_the_scaling_of_rope(scale, expected, tmp_path):
    reference = write(tmp_path / "m.gguf", "llama", scale_rope=scale)
    model = load(str(tmp_path / "m.gguf"), CPU, torch.float32)
    assert model.config.rope_parameters == expected
    config = LlamaConfig(
        vocab_size=reference.config.vocab_size, **SIZES, rope_parameters=dict(expected)
    )
    scaled = AutoModelForCausalLM.from_config(config)
    scaled.load_state_dict(reference.state_dict())
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(model(ids).logits, scaled(ids).logits)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (yarn, "RoPE is scaled by yarn"),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(8).numpy() * 2),
            "the factors of RoPE in rope_freqs.weight are none of Llama 3's",
        ),
        (
            lambda writer: writer.add_tensor("rope_factors_long.weight", torch.ones(8).numpy()),
            "RoPE is scaled by the tensor rope_factors_long.weight",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", torch.ones(64).numpy()),
            "LlamaForCausalLM has no weight for its tensor blk.0.attn_q.bias",
        ),
    ],
)
def test_what_transformers_would_leave_out_is_refused(scale, says, tmp_path):
    write(tmp_path / "m.gguf", "llama", scale_rope=scale)
    with pytest.raises(UserError, match=says):
        load(str(tmp_path / "m.gguf"), CPU, torch.float32)


def test_the_saved_tokenizer_is_transformers_own(tmp_path, cache):
    path = tmp_path / "m.gguf"
    write(path, "qwen2")
    own = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    read = read_tokenizer(str(path))
    assert type(read) is not type(own)
    assert json.loads(read.backend_tokenizer.to_str()) == json.loads(own.backend_tokenizer.to_str())
    for name in ("all_special_ids", "padding_side", "added_tokens_decoder", "chat_template"):
        assert getattr(read, name) == getattr(own, name)
    save_tokenizer(str(path), tmp_path / "for others")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "for others")) is type(own)


def test_merges_of_tokens_with_spaces_are_saved_as_pairs(tmp_path):
    bpe = models.BPE({" ": 0, "a": 1, " a": 2}, [(" ", "a")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    models_gguf._save_light_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(" a")["input_ids"] == [2]


def test_it_is_parsed_once(tmp_path, cache):
    path = tmp_path / "m.gguf"
    write(path, "qwen2")
    folder = metadata_folder(path)
    written = (folder / "config.json").stat().st_mtime_ns
    assert read_config(str(path)).num_hidden_layers == 2
    tokenizer, builtin = read_tokenizer(str(path)), read_tokenizer("builtin")
    assert tokenizer(" a good film")["input_ids"] == builtin(" a good film")["input_ids"]
    assert (folder / "config.json").stat().st_mtime_ns == written and len(sha256(path)) == 64
    write(path, "llama")
    assert metadata_folder(path) != folder
    assert {entry.name for entry in (cache / "abft-fast/gguf").iterdir()} == {
        folder.name, metadata_folder(path).name,
    }  # fmt: skip


def test_another_file_of_the_same_size_and_time_is_parsed(tmp_path, cache):
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    write(path, "qwen2")
    before = metadata_folder(path), sha256(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert metadata_folder(path) != before[0] and sha256(path) != before[1]


def test_a_folder_that_another_process_has_just_made_stays(tmp_path, cache, monkeypatch):
    path = tmp_path / "m.gguf"
    write(path, "llama")
    folder = metadata_folder(path)
    shutil.move(folder, tmp_path / "of the other")
    parse = models_gguf._write_metadata

    def parse_second(path, new):
        parse(path, new)
        shutil.move(tmp_path / "of the other", folder)
        (folder / "being read").touch()

    monkeypatch.setattr(models_gguf, "_write_metadata", parse_second)
    assert metadata_folder(path) == folder and (folder / "being read").exists()
    monkeypatch.setattr(models_gguf, "_write_metadata", parse)
    (folder / models_gguf._TABLE).unlink()  # a damaged one is replaced
    assert metadata_folder(path) == folder and not (folder / "being read").exists()


def test_an_adapter_wants_the_weights_it_was_trained_on(tmp_path):
    write(tmp_path / "first.gguf", "llama")
    write(tmp_path / "rounded.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    write(tmp_path / "second.gguf", "llama", seed=1)
    given = ["--dataset", "trec", "--k", 1, "--device", "cpu", "--label-token", "first"]
    result = abft_fast(
        "train", "--model", tmp_path / "first.gguf", *given, "--train-samples", 8, "--epochs", 1,
        "--no-eval", "--no-head-filter", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["model_sha256"] == sha256(tmp_path / "first.gguf")
    assert environment["base"]["model"] == str(tmp_path / "first.gguf")
    given += ["--adapter", tmp_path / "run/adapter"]
    right = abft_fast("eval", "--model", tmp_path / "first.gguf", *given)
    assert right.returncode == 0, right.stderr
    assert "was trained on" not in right.stderr
    rounded = abft_fast("eval", "--model", tmp_path / "rounded.gguf", *given)
    assert rounded.returncode == 0, rounded.stderr
    assert "rounded.gguf has its weights, rounded otherwise" in rounded.stderr
    wrong = abft_fast("eval", "--model", tmp_path / "second.gguf", *given)
    assert wrong.returncode == 2
    assert "second.gguf has other weights: use the model that" in wrong.stderr
    (tmp_path / "first.gguf").rename(tmp_path / "moved.gguf")
    resumed = abft_fast("train", "--resume", tmp_path / "run", "--model", tmp_path / "moved.gguf")
    assert resumed.returncode == 0, resumed.stderr
    (tmp_path / "second.gguf").replace(tmp_path / "first.gguf")
    resumed = abft_fast("train", "--resume", tmp_path / "run")
    assert resumed.returncode == 2
    assert "run was trained on" in resumed.stderr
    assert "its files have other weights" in resumed.stderr


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_gguf(path):
    path.write_text("not a model" * 100)


def other_architecture(path):
    write(path, "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lamma"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "m.gguf is damaged"),
        (no_gguf, "m.gguf is damaged"),
        (other_architecture, "cannot read a GGUF of architecture lamma"),
        (lambda path: path.unlink(), "m.gguf does not exist"),
        (lambda path: path.rename(path.with_name("m-00001-of-00002.gguf")), "is one part"),
    ],
)
def test_what_cannot_be_read(damage, says, tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "llama")
    damage(path)
    given = next(iter(tmp_path.glob("*.gguf")), path)
    with pytest.raises(UserError, match=says) as caught:
        load(str(given), CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_asks_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, "llama")
    with pytest.raises(UserError, match="holds 2 GGUF files: name one"):
        load(str(tmp_path), CPU, torch.float32)
