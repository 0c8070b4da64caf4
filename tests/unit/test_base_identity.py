"""A base is known again in other dtypes, quantized, renamed; another base of its shape is not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from abft_fast import builtin_model_path
from abft_fast.errors import UserError
from abft_fast.models.base_identity import base_of_adapter, compare_bases, describe_base
from abft_fast.models.loading import load
from abft_fast.models.trainable import save_adapter, set_trained
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def described(name, dtype=torch.float32, bits=None):
    return describe_base(load(str(name), CPU, dtype, bits), str(name))


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(builtin_model_path(), tmp_path / "copy")
    return tmp_path / "copy"


def changed(copied, folder, change):
    model = load(str(copied), CPU, torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_base_is_known_in_every_dtype_and_quantized(dtype, bits):
    lines = compare_bases(described("builtin"), described("builtin", dtype, bits), "adapter a")
    assert lines == []
    lines = compare_bases(described("builtin", dtype, bits), described("builtin"), "adapter a")
    assert lines == []


def test_a_copy_is_known_under_its_own_name(copied, tmp_path):
    assert compare_bases(described("builtin"), described(copied), "adapter a") == []
    rounded = changed(copied, tmp_path / "rounded", lambda model: model.to(torch.bfloat16))
    assert compare_bases(described("builtin"), described(rounded), "adapter a") == []
    (line,) = compare_bases(described("builtin"), described(rounded, bits=4), "adapter a")
    assert line == f"adapter a was trained on builtin; {rounded} has its weights, rounded otherwise"


def noise(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def train_last_layer(model):
    for parameter in model.model.layers[-1].parameters():
        parameter.mul_(1.01)


def merge_lora(model):
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        torch.manual_seed(1)
        weight.add_(1e-3 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1]))


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        (noise, None),
        (noise, 4),
        (train_last_layer, None),
        (train_last_layer, 4),
        (merge_lora, None),
    ],
)
def test_another_base_of_the_same_shape_is_refused(change, bits, copied, tmp_path):
    other = changed(copied, tmp_path / "other", change)
    with pytest.raises(UserError, match=f"a was trained on builtin, and {other} has other weights"):
        compare_bases(described("builtin"), described(other, bits=bits), "adapter a")
    shutil.rmtree(copied)
    before = described(other)
    changed(builtin_model_path(), other, lambda model: None)
    with pytest.raises(UserError, match=f"was trained on {other}, and its files have other"):
        compare_bases(before, described(other, bits=bits), "adapter a")


def test_numbers_that_are_none_are_no_base():
    known = described("builtin")
    for kind in ("vectors", "matrices"):
        name, numbers = next(reversed(known[kind].items()))
        broken = {**known, kind: {**known[kind], name: f"nan {numbers.split(' ', 1)[1]}"}}
        with pytest.raises(UserError, match="other weights"):
            compare_bases(known, broken, "adapter a")


def test_another_family_is_refused():
    bases = [describe_base(tiny_model(family), family) for family in ("llama", "gpt2")]
    with pytest.raises(UserError, match="was trained on llama, and gpt2 has other weights"):
        compare_bases(*bases, "run r")


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_adapter_carries_its_base(trainable, tmp_path):
    model = load("builtin", CPU, torch.float32)
    base = describe_base(model, "builtin")
    save_adapter(set_trained(model, trainable, 4), tmp_path, base)
    assert base_of_adapter(tmp_path) == base
    (tmp_path / "base.json").write_text("{")
    with pytest.raises(UserError, match=r"base.json is not JSON: copy the adapter again"):
        base_of_adapter(tmp_path)


def test_of_an_adapter_from_elsewhere_only_the_name_is_compared(copied, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load("builtin", CPU, torch.float32), config).save_pretrained(tmp_path / "a")
    base = base_of_adapter(tmp_path / "a")
    assert compare_bases(base, described("builtin"), "adapter a") == []
    (line,) = compare_bases(base, described(copied), "adapter a")
    assert line == f"adapter a names builtin as its base: make sure that {copied} is the same model"
    path = tmp_path / "a/adapter_config.json"
    for unnamed in (None, ""):
        content = json.loads(path.read_text()) | {"base_model_name_or_path": unnamed}
        path.write_text(json.dumps(content))
        assert compare_bases(base_of_adapter(tmp_path / "a"), described(copied), "adapter a") == []
