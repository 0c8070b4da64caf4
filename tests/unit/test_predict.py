"""Predictions by a shared prefix, in chunks == whole prompts one by one by plain transformers."""

import csv
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import builtin_model_path, data
from abft_fast.commands import predict
from abft_fast.commands.merge import merge
from abft_fast.commands.prediction_files import open_output, read_demonstrations
from abft_fast.data import Example, Prompt
from abft_fast.errors import RunError, UserError
from abft_fast.models.loading import load
from abft_fast.models.trainable import add_lora, load_adapter
from abft_fast.options import MergeConfig, PredictConfig
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder, Template
from abft_fast.runtime.progress import Progress
from tests.families.test_families import tiny_hybrid

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """SUBJ in the user's files, with its own template."""
    monkeypatch.chdir(tmp_path)
    subj = data.load("subj")
    (tmp_path / "subj.yaml").write_text(
        f"input_prefix: {subj.input_prefix!r}\nlabel_prefix: {subj.label_prefix!r}\n"
        "labels: {o: objective, s: subjective}\n"
    )
    write("demos.csv", [(e.text, "os"[e.label]) for e in subj.training[:5]], "text", "label")
    write("queries.csv", [(i, e.text) for i, e in enumerate(subj.test[:24])], "id", "text")
    return tmp_path


def write(path, rows, *columns):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def run(**changes):
    """The rows written."""
    given = {
        "demonstrations": "demos.csv", "input": "queries.csv", "output": "out.csv",
        "template": "subj.yaml", "device": "cpu", **changes,
    }  # fmt: skip
    config = resolve(PredictConfig, given)
    dataset = read_demonstrations(config)
    with open_output(config, dataset.label_words) as writer:
        predict.predict(config, dataset, writer, Progress())
    with open(config.output, newline="") as file:
        return list(csv.DictReader(file))


def one_by_one(model, queries, demonstrations, form="ours"):
    """Probabilities of the label words, the prompt written and tokenized as one text."""
    subj = data.load("subj")
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_path())
    label_ids = PromptEncoder(tokenizer, subj).label_ids
    template = Template(subj.input_prefix, subj.label_prefix, subj.label_words, form)
    found = []
    for text in queries:
        prompt = template.render(Prompt(demonstrations, Example(text, 0)))[0]
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits
        found.append(logits[0, -1, label_ids].double().softmax(0).tolist())
    return found


def assert_predicted(rows, expected):
    words = data.load("subj").label_words
    for row, probabilities in zip(rows, expected, strict=True):
        actual = [float(row[f"p_{word}"]) for word in words]
        assert actual == pytest.approx(probabilities, abs=1e-5)
        assert row["prediction"] == words[actual.index(max(actual))]


@pytest.mark.parametrize(("chunk", "form"), [(1024, "ours"), (7, "staicc")])
def test_equal_to_whole_prompts_one_by_one(folder, chunk, form, monkeypatch):
    monkeypatch.setattr(predict, "_CHUNK", chunk)
    subj = data.load("subj")
    plain = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    rows = run(prompt_form=form, token_budget=100)
    assert [(int(row["id"]), row["text"]) for row in rows] == [
        (i, e.text) for i, e in enumerate(subj.test[:24])
    ]
    texts = [e.text for e in subj.test[:24]]
    assert_predicted(rows, one_by_one(plain, texts, subj.training[:5], form))
    assert len({row["p_objective"] for row in rows}) > 20


def test_chunks_that_share_less_than_those_before(folder, monkeypatch):
    """Queries alike in the first chunk, then others: the prefix gets shorter, results do not."""
    monkeypatch.setattr(predict, "_CHUNK", 2)
    texts = ["the film is good", "the film is bad", "the food", "the film is", "a", "zebra stripes"]
    write("queries.csv", enumerate(texts), "id", "text")
    plain = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    expected = one_by_one(plain, texts, data.load("subj").training[:5])
    assert_predicted(run(), expected)


@pytest.mark.slow
def test_an_adapter_and_the_merged_model(folder):
    adapted = add_lora(load("builtin", CPU, torch.float32), 4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained("adapter")
    options = {"adapter": "adapter", "output_dir": "merged"}
    merge(resolve(MergeConfig, options), Progress())
    subj = data.load("subj")
    texts = [e.text for e in subj.test[:24]]
    plain = load_adapter(
        AutoModelForCausalLM.from_pretrained(builtin_model_path()), folder / "adapter"
    )
    expected = one_by_one(plain, texts, subj.training[:5])
    with_adapter = run(adapter="adapter")
    assert_predicted(with_adapter, expected)
    assert_predicted(run(model="merged"), expected)
    without = run()
    assert any(
        abs(float(a["p_objective"]) - float(b["p_objective"])) > 1e-2
        for a, b in zip(with_adapter, without, strict=True)
    )


@pytest.mark.slow
def test_quantized(folder):
    subj = data.load("subj")
    plain = load("builtin", CPU, torch.float32, bits=4)
    texts = [e.text for e in subj.test[:24]]
    rows = run(quantized=True)
    expected = one_by_one(plain, texts, subj.training[:5])
    for row, (first, _) in zip(rows, expected, strict=True):
        assert float(row["p_objective"]) == pytest.approx(first, abs=1e-4)


def test_a_model_that_cannot_share_is_given_whole_prompts(folder, capsys):
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained("hybrid")
    model = tiny_hybrid(
        ["linear_attention", "full_attention"] * 2, vocab_size=4096, max_position_embeddings=2048
    )
    model.save_pretrained("hybrid")
    texts = ["a fine film", "so so", "dull"]
    write("queries.csv", enumerate(texts), "id", "text")
    rows = run(model="hybrid")
    assert "demonstrations are computed for each query" in capsys.readouterr().err
    assert_predicted(rows, one_by_one(model, texts, data.load("subj").training[:5]))


def test_a_query_beyond_the_context(folder):
    shutil.copytree(builtin_model_path(), "short")
    config = json.loads((folder / "short/config.json").read_text())
    (folder / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    texts = ["a fine film", "word " * 300, "so so", "word " * 400]
    write("queries.csv", enumerate(texts), "id", "text")
    message = r"queries.csv, row 3: the prompt of \d+ tokens is longer than the .* of 400 tokens"
    with pytest.raises(UserError, match=message):
        run(model="short")
    assert not list(folder.glob("*out*"))
    rows = run(model="short", on_long_prompt="drop")
    assert [row["prediction"] == "" == row["p_objective"] for row in rows] == [0, 1, 0, 1]
    plain = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    expected = one_by_one(plain, texts[::2], data.load("subj").training[:5])
    assert_predicted(rows[::2], expected)
    (folder / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 90}))
    with pytest.raises(
        UserError, match=r"demos.csv: with its 5 demonstrations .* context has 90: use"
    ):
        run(model="short", on_long_prompt="drop")


def test_a_mistake_far_down_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(predict, "_CHUNK", 4)
    write("queries.csv", [(i, "so so") for i in range(9)] + [(9, " ")], "id", "text")
    with pytest.raises(UserError, match=r"queries.csv, row 11, column 'text': the text is empty"):
        run()
    assert not list(folder.glob("*out*"))


def test_numbers_that_are_none_name_the_row(folder):
    model = load("builtin", CPU, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained("broken")
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained("broken")
    with pytest.raises(RunError, match=r"queries.csv, row 2: the model's logits"):
        run(model="broken")
    assert not list(folder.glob("*out*"))


def test_label_words_of_several_tokens_are_refused(folder):
    write("demos.csv", [("fine", "unbelievably"), ("dull", "incomprehensible")], "text", "label")
    with pytest.raises(UserError, match="demos: label words are several tokens"):
        run(template=None)
