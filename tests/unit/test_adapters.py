"""Adapters that are refused, and what PEFT says of those that are not."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from abft_fast.errors import UserError
from abft_fast.models.files import check_adapter
from abft_fast.models.trainable import add_lora, load_adapter, save_adapter
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit

WEIGHTS = "adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path):
    options = {"target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_names_in_an_adapters_config_are_sorted(tmp_path):
    adapted = add_lora(tiny_model("llama"), 2)
    names = {f"{letter}_proj" for letter in "kqzyxwvut"}  # a set: its order is each process's own
    adapted.peft_config["default"].target_modules = names
    save_adapter(adapted, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(names)
    assert adapted.peft_config["default"].target_modules is names


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refused(folder, model=None):
    """The one line."""
    with pytest.raises(UserError) as caught:
        load_adapter(model or tiny_model("llama"), folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"adapter {folder}")
    return str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
        "CARTRIDGE", "ADAPTION_PROMPT", "XLORA", "POLY", "LILY", "SHADOW", "of_tomorrow",
    ],
)  # fmt: skip
def test_kinds_that_do_more_than_change_weights(kind, adapter):
    change_config(adapter, peft_type=kind)
    assert f"is of PEFT's kind {kind}: use a kind that only changes weights" in refused(adapter)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("arrow_config", {"top_k": 2}),
        ("layer_replication", [[0, 3], [2, 4]]),
    ],
)
def test_lora_that_does_more_than_change_weights(setting, value, adapter):
    change_config(adapter, **{setting: value})
    assert f"PEFT's kind LORA with {setting}: use a kind" in refused(adapter)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(LORA_A), f"it lacks {LORA_A[17:]}"),
        (lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(1)}),
         "changes other layers: it has x.lora_A.weight"),
        (lambda tensors: tensors[LORA_A].fill_(float("nan")), f"{LORA_A} is not finite"),
        (lambda tensors: tensors.clear(), "adapter_model.safetensors holds no weights"),
    ],
    ids=["one missing", "one too many", "not a number", "none"],
)  # fmt: skip
def test_weights_that_peft_would_only_warn_of(change, says, adapter):
    change_weights(adapter, change)
    assert says in refused(adapter)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 64}, "size mismatch"),
        ({"num_hidden_layers": 2}, "changes other layers: it has model.layers.2.self_attn.k_proj"),
        ({"num_hidden_layers": 6}, "it lacks model.layers.4.self_attn.k_proj"),
    ],
    ids=["wider", "fewer layers", "more layers"],
)
def test_models_of_another_size(changes, says, adapter):
    message = refused(adapter, tiny_model("llama", **changes))
    assert "does not fit the model: " in message and says in message


def test_layers_that_the_model_lacks(adapter):
    change_config(adapter, layers_to_transform=[0, 9])
    assert "changes other layers: it has model.layers.1" in refused(adapter)


def test_what_peft_warns_of_is_said_once(adapter):
    said = []
    load_adapter(tiny_model("llama"), adapter, said.append)
    assert said == []
    change_config(adapter, peft_version="99.1", gate=True, init_gate=0.1)
    load_adapter(tiny_model("llama"), adapter, said.append)
    later, unknown = said
    assert later == f"adapter {adapter} is from PEFT 99.1, and this is PEFT {peft.__version__}"
    assert "PEFT says: Unexpected keyword arguments ['gate', 'init_gate']" in unknown


def test_what_a_setting_means_for_merging_is_said(adapter):
    config = LoraConfig(target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(adapter)
    said = []
    load_adapter(tiny_model("llama"), adapter, said.append)
    assert "PEFT says: `lora_bias=True` was passed but" in said[0]
    assert len(set(said)) == len(said)


def test_a_folder_above_the_adapter_is_led_down(adapter):
    with pytest.raises(UserError, match=rf"holds no adapter_config.json: .* {adapter}\?"):
        check_adapter(adapter.parent)
