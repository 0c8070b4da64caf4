"""Whole runs on real data with the built-in model."""

import json
import re

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from abft_fast import builtin_model_path
from abft_fast.errors import UserError
from abft_fast.models.loading import load, read_tokenizer
from tests.command_line import FEW_QUERIES, QUICK, abft_fast

pytestmark = pytest.mark.cli

METRICS = {"accuracy", "macro_f1", "true_label_likelihood", "expected_calibration_error"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    result = abft_fast("train", *QUICK, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_run_folder(run):
    folder, _ = run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert set(evaluation) == {"before", "after"}
    for side in ("before", "after"):
        assert set(evaluation[side]["trec"]) == METRICS
        assert 0 <= evaluation[side]["trec"]["accuracy"] <= 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {
        "loss", "penalty", "induction_heads", "correct_share_above_chance", "gradient_norm",
        "attention_loss",
        "learning_rate", "tokens_per_second", "peak_memory_bytes",
    } <= set(rows[0])  # fmt: skip
    assert all(row["induction_heads"] > 0 and row["gradient_norm"] > 0 for row in rows)
    # At step 1 the penalty is still A0, so that both are the same loss of the same prompts.
    assert rows[0]["attention_loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
    versions = json.loads((folder / "environment.json").read_text())["versions"]
    assert versions["torch"] and versions["transformers"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["k"] == 2
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.suffix for path in files} <= {
        ".json", ".jsonl", ".log", ".yaml", ".safetensors", ".html",
    }  # fmt: skip
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        page.count("<svg") == 6 and f"{100 * evaluation['after']['trec']['accuracy']:.1f} %" in page
    )


def test_details_agree_with_the_metrics(run):
    folder, _ = run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    attention = json.loads((folder / "attention.json").read_text())
    for side in ("before", "after"):
        details = json.loads((folder / f"details-{side}.json").read_text())
        rows = zip(details["labels"], details["probabilities"], strict=True)
        right = [max(row) == row[label] for label, row in rows]
        assert len(right) == 1024 and details["dataset"] == "trec"
        accuracy = evaluation[side]["trec"]["accuracy"]
        assert sum(right) / 1024 == pytest.approx(accuracy, abs=2 / 1024)  # rounded ties
        heads = attention[side]["trec"]["induction_heads"]
        assert sum(details["layers"]["induction_heads"]) == pytest.approx(heads)
        assert len(details["prompts"]) == 10
        for prompt in details["prompts"]:
            assert len(prompt["attention"]) == len(prompt["tokens"])
            assert sum(prompt["attention"]) == pytest.approx(1, abs=1e-3)
            assert len(prompt["label_positions"]) == 2


def test_the_log_says_what_is_done_in_order(run):
    log = (run[0] / "run.log").read_text()
    steps = (
        "on cpu: 40 prompts to train on, 1,024 to test on\n", "\nplan: ", "\nloading builtin\n",
        "\nchecking packed attention against the model's own\n", "\nattention: sdpa",
        "\nevaluating before: 1024/1024, ", "\ntraining: 3/3, ", "\nevaluating after: 1024/1024, ",
    )  # fmt: skip
    at = [log.find(step) for step in steps]
    assert -1 not in at and at == sorted(at), log


def test_the_table(run):
    folder, result = run
    for expected in (
        "accuracy", "induction heads a prompt", "correct labels", "seconds", "peak memory",
    ):  # fmt: skip
        assert expected in result.stdout
    assert str(folder) in result.stdout


def test_a_run_without_a_terminal_is_plain(run):
    assert "\x1b" not in run[1].stdout + run[1].stderr
    assert len(run[1].stderr.splitlines()) < 20


def test_the_adapter_loads_with_plain_peft(run):
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    adapted = PeftModel.from_pretrained(model, str(run[0] / "adapter"))
    moved = [p.abs().max() for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 8 and all(m > 0 for m in moved)  # 4 layers, Q and K


@pytest.mark.parametrize("with_adapter", [False, True], ids=["before", "after"])
def test_eval_repeats_what_train_found(run, with_adapter, tmp_path):
    adapter = ["--adapter", run[0] / "adapter"] if with_adapter else []
    output = tmp_path / "metrics.json"
    result = abft_fast("eval", "--dataset", "trec", "--k", 2, *adapter, "--output", output)
    assert result.returncode == 0, result.stderr
    expected = json.loads((run[0] / "evaluation.json").read_text())
    assert json.loads(output.read_text()) == expected["after" if with_adapter else "before"]


def test_config_replays_to_the_same_bytes(run, tmp_path):
    again = tmp_path / "again"
    result = abft_fast(
        "train", "--config", run[0] / "config.yaml", "--no-eval", "--output-dir", again
    )
    assert result.returncode == 0, result.stderr
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (run[0] / name).read_bytes()
    assert not (again / "evaluation.json").exists()


def test_a_finished_run_resumes_to_its_own_table(run):
    before = (run[0] / "metrics.jsonl").read_bytes()
    result = abft_fast("train", "--resume", run[0], "--force")
    assert result.returncode == 0, result.stderr
    assert (run[0] / "metrics.jsonl").read_bytes() == before
    assert "accuracy" in result.stdout


def test_prompts_too_long_are_counted_in_the_log(tmp_path):
    folder = tmp_path / "run"
    result = abft_fast(
        "train", "--dataset", "teh", "--k", 64, "--train-samples", 8, "--epochs", 1, "--no-eval",
        "--on-long-prompt", "fewer-demonstrations", "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = [x for x in (folder / "run.log").read_text().splitlines() if "context" in x]
    shortened = int(re.search(r"0 dropped, (\d+) with fewer demonstrations, of 8", line)[1])
    assert 0 < shortened <= 8


def test_zero_shot_evaluation(tmp_path):
    result = abft_fast("eval", "--dataset", "trec", "--k", 0)
    assert result.returncode == 0, result.stderr
    assert "0.00" in result.stdout  # without demonstrations there is no induction head


def test_full_weights_are_an_adapter_for_plain_peft(tmp_path):
    folder = tmp_path / "full"
    result = abft_fast(
        "train", *QUICK, *FEW_QUERIES, "--trainable", "full", "--epochs", 1, "--no-eval-before",
        "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    base = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(builtin_model_path()), str(folder / "adapter")
    )
    trained = adapted.merge_and_unload().state_dict()
    assert trained.keys() == base.state_dict().keys()
    assert {name for name, p in base.state_dict().items() if not p.equal(trained[name])} == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(4) for p in "qk"
    }
    output = tmp_path / "metrics.json"
    result = abft_fast(
        "eval", "--dataset", "trec", "--k", 2, *FEW_QUERIES, "--adapter", folder / "adapter",
        "--output", output,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = json.loads((folder / "evaluation.json").read_text())["after"]
    assert json.loads(output.read_text()) == expected


def test_the_run_gets_a_name_under_runs(tmp_path):
    result = abft_fast(
        "train", *QUICK, "--epochs", 1, "--train-samples", 8, "--no-eval", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-builtin-trec")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("bits", "layer"), [("4", "Linear4bit"), ("8", "Linear8bitLt")])
def test_a_quantized_base_is_trained_and_evaluated(bits, layer, tmp_path):
    """Its weights stay as they were quantized; the log says what attention ran on."""
    folder = tmp_path / "run"
    result = abft_fast(
        "train", *QUICK, *FEW_QUERIES, "--quantized", "--bits", bits, "--gradient", "2",
        "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["gradient_norm"] > 0 and row["induction_heads"] > 0 for row in rows)
    assert re.search(r"attention: (sdpa|varlen|flash-attn), its loss: ", result.stderr)
    quantized = load("builtin", torch.device("cpu"), torch.float32, int(bits))
    assert type(quantized.model.layers[0].self_attn.q_proj).__name__ == layer
    output = tmp_path / "metrics.json"
    again = abft_fast(
        "eval", "--dataset", "trec", "--k", 2, "--quantized", "--bits", bits,
        "--adapter", folder / "adapter", "--output", output, "--device", "cpu", *FEW_QUERIES,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    after = json.loads((folder / "evaluation.json").read_text())["after"]["trec"]
    found = json.loads(output.read_text())["trec"]
    assert found["accuracy"] == pytest.approx(after["accuracy"], abs=0.01)


def test_a_checkpoint_that_is_quantized_is_trained_as_it_is(tmp_path):
    """And is not quantized a second time."""
    quantized = load("builtin", torch.device("cpu"), torch.float32, 4)
    quantized.save_pretrained(tmp_path / "nf4")
    read_tokenizer("builtin").save_pretrained(tmp_path / "nf4")
    model = load(str(tmp_path / "nf4"), torch.device("cpu"), torch.float32)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    run = tmp_path / "run"
    result = abft_fast(
        "train", *QUICK, "--model", tmp_path / "nf4", "--no-eval", "--output-dir", run
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["gradient_norm"] > 0 and row["induction_heads"] > 0 for row in rows)
    with pytest.raises(UserError, match=r"quantized already .*: leave out --quantized"):
        load(str(tmp_path / "nf4"), torch.device("cpu"), torch.float32, 4)
