"""The baselines' methods and MAUVE on the built-in model."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from abft_fast import builtin_model_path
from tests.command_line import FEW_QUERIES, QUICK, abft_fast

pytestmark = pytest.mark.cli


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_e2e_learns_the_labels(tmp_path):
    folder = tmp_path / "run"
    result = abft_fast(
        "train", *QUICK, *FEW_QUERIES, "--method", "e2e", "--epochs", 4, "--no-eval-before",
        "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [row["loss"] for row in rows_of(folder)]
    assert losses[-1] < losses[0] - 0.1
    assert set(json.loads((folder / "evaluation.json").read_text())) == {"after"}
    tested = json.loads((folder / "details-after.json").read_text())
    assert len(tested["labels"]) == 2 * int(FEW_QUERIES[1])  # each query is asked twice
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"] == "E2E"
    trained = json.loads((folder / "environment.json").read_text())["trained_parameters"]
    assert trained == 4 * 16 * 2 * 192 * 2  # layers, rank, Q and K, width, LoRA's A and B


def test_a_trained_head_is_evaluated_as_the_run_found(tmp_path):
    folder, output = tmp_path / "run", tmp_path / "metrics.json"
    result = abft_fast(
        "train", *QUICK, *FEW_QUERIES, "--method", "E2E", "--train-head", "--epochs", 1,
        "--no-eval-before", "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as adapter:
        head = adapter.get_tensor("base_model.model.lm_head.weight")
    base = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    moved = (head - base.lm_head.weight).abs().amax(1) > 0
    assert moved.any() and head.dtype == torch.float32
    result = abft_fast(
        "eval", "--dataset", "trec", "--k", 2, *FEW_QUERIES, "--adapter", folder / "adapter",
        "--output", output,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = json.loads((folder / "evaluation.json").read_text())["after"]
    assert json.loads(output.read_text()) == expected
    refused = abft_fast("train", "--train-head", "--output-dir", tmp_path / "none")
    assert refused.returncode == 2 and "--train-head works with --method E2E" in refused.stderr


def test_metaicl_trains_the_whole_model(tmp_path):
    folder = tmp_path / "run"
    result = abft_fast(
        "train", "--dataset", "subj", "--method", "MetaICL", "--meta-datasets", "trec,mr",
        "--train-samples", 16, "--epochs", 1, "--no-eval", "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    trained = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    pairs = zip(trained.parameters(), base.parameters(), strict=True)
    assert all(not p.equal(q) for p, q in pairs)


def test_picl_trains_on_plain_text_and_keeps_nothing_unasked(tmp_path):
    pytest.importorskip("bm25s")
    text, folder = tmp_path / "plain.txt", tmp_path / "run"
    text.write_text("\n".join(f"a film about {i} cats and {i % 7} dogs" for i in range(60)))
    result = abft_fast(
        "train", "--method", "PICL", "--plain-text", text, "--train-samples", 32, "--epochs", 2,
        "--no-eval", "--no-save", "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, last = rows_of(folder)
    assert last["loss"] < first["loss"]
    assert not (folder / "model").exists() and not (folder / "checkpoints").exists()
    text.write_text("\n".join(f"another film about {i} birds" for i in range(60)))
    changed = abft_fast("train", "--resume", folder)
    assert changed.returncode == 2 and "plain.txt has changed since run" in changed.stderr


def test_mauve_compares_texts_before_and_after(tmp_path):
    pytest.importorskip("mauve")
    prefixes, folder = tmp_path / "prefixes.txt", tmp_path / "run"
    prefixes.write_text("\n".join(f"the film of {i} friends" for i in range(50)))
    result = abft_fast(
        "train", *QUICK, "--mauve-test", "--mauve-prefix", prefixes, "--no-eval",
        "--output-dir", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "mauve.json").read_text())
    assert 0 < found["after"] <= 1 and 0 < found["before_again"] <= 1 and found["texts"] == 50
    texts = json.loads((folder / "texts-after.json").read_text())["texts"]
    before = json.loads((folder / "texts-before.json").read_text())["texts"]
    assert texts != before and "friends" in texts[0]
    assert "MAUVE of 50 texts" in result.stdout
    prefixes.write_text("one\n")
    few = abft_fast(
        "train", *QUICK, "--mauve-test", "--mauve-prefix", prefixes, "--output-dir", tmp_path / "x"
    )
    assert few.returncode == 2 and "1 prefixes are too few" in few.stderr
    unknown = abft_fast(
        "train", *QUICK, "--mauve-test", "--mauve-model", "synthetic:no", "--output-dir",
        tmp_path / "x",
    )  # fmt: skip
    assert (
        unknown.returncode == 2 and "model synthetic:no: there is no such shape" in unknown.stderr
    )
    assert not (tmp_path / "x").exists()
