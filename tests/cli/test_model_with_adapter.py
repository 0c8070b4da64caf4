"""A model's folder that also holds an adapter is its own weights in every command, and says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from abft_fast import builtin_model_path
from abft_fast.models.loading import load
from abft_fast.models.trainable import add_lora, save_adapter
from tests.bad_inputs import BOTH, REVIEWS
from tests.command_line import abft_fast

pytestmark = pytest.mark.cli

LEFT_OUT = "model both: the adapter beside the weights is left out; --adapter both uses it"
OWN = ("--dataset", "reviews.csv", "--k", 2, "--device", "cpu")


@pytest.fixture
def folder(tmp_path):
    """The built-in model with a strong adapter beside it in `both`, alone in `adapter`."""
    shutil.copytree(builtin_model_path(), tmp_path / "both")
    model = add_lora(load("builtin", torch.device("cpu"), torch.float32), 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, tmp_path / "both")
    for name, text in {**REVIEWS, **BOTH}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run(folder, *arguments):
    result = abft_fast(*arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result


def test_train_eval_and_plan(folder):
    one = run(folder, "eval", "--model", "both", *OWN, "--output", "one.json")
    plain = run(folder, "eval", *OWN, "--output", "plain.json")
    trained = run(
        folder, "train", "--model", "both", *OWN, "--train-samples", 8, "--epochs", 1,
        "--output-dir", "run",
    )  # fmt: skip
    for result in (one, trained, run(folder, "plan", "--model", "both", *OWN)):
        assert (result.stdout + result.stderr).count(LEFT_OUT) == 1
    assert LEFT_OUT not in plain.stderr
    scores = [json.loads((folder / f"{name}.json").read_text()) for name in ("one", "plain")]
    assert scores[0] == scores[1]
    assert json.loads((folder / "run/evaluation.json").read_text())["before"] == scores[0]


def test_a_streamed_evaluation(folder):
    given = ("eval", "--stream", *OWN, "--output")
    adapted = run(folder, *given, "one.json", "--model", "both", "--adapter", "adapter")
    elsewhere = run(folder, *given, "two.json", "--adapter", "adapter")
    assert adapted.stderr.count(LEFT_OUT) == 1 and LEFT_OUT not in elsewhere.stderr
    assert (folder / "one.json").read_text() == (folder / "two.json").read_text()


def test_predict_uses_it_if_it_is_asked_for(folder):
    given = ("predict", "--demonstrations", "demos.csv", "--input", "queries.csv", "--adapter")
    alone = run(folder, *given[:-1], "--model", "both")
    plain = run(folder, *given[:-1])
    assert alone.stdout == plain.stdout and alone.stderr.count(LEFT_OUT) == 1
    adapted = run(folder, *given, "both", "--model", "both")
    elsewhere = run(folder, *given, "adapter")
    assert adapted.stdout == elsewhere.stdout != plain.stdout
    assert LEFT_OUT not in adapted.stderr


def test_merge_adds_what_is_asked_for(folder):
    for adapter, said in (("adapter", 1), ("both", 0)):
        result = run(
            folder, "merge", "--model", "both", "--adapter", adapter, "--output-dir", f"m-{adapter}"
        )
        assert result.stderr.count(LEFT_OUT) == said
    merged, other = (
        load_file(folder / f"m-{name}/model.safetensors") for name in ("adapter", "both")
    )
    before = load_file(folder / "both/model.safetensors")
    assert all(torch.equal(merged[name], other[name]) for name in merged)
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert len(changed) == 2 * 4  # W_Q and W_K of each layer
