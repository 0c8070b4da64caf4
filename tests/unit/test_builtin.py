"""The committed built-in model, and the pieces of the recipe that makes it."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.builtin.recipe import build
from abft_fast.builtin.tasks import Corpus, Vocabulary, sample_sequence
from abft_fast.builtin.vectors import document_vectors, token_vectors
from abft_fast.prompts import PromptEncoder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def builtin():
    path = builtin_model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_it_is_small_standard_and_float32(builtin):
    path = builtin_model_path()
    assert (path / "model.safetensors").stat().st_size <= 8e6
    assert not list(path.glob("*.py")) and (path / "README.md").is_file()
    assert "auto_map" not in json.loads((path / "config.json").read_text())
    assert {p.dtype for p in builtin[0].parameters()} == {torch.float32}


@pytest.mark.slow
def test_both_prompt_forms_are_the_same_tokens(builtin):
    _, tokenizer = builtin
    assert tokenizer("sentiment: ")["input_ids"] == tokenizer("Sentiment:")["input_ids"]
    for name in data.DATASETS:
        dataset = data.load(name)
        for word in {*dataset.label_words, *dataset.staicc_label_words}:
            assert len(tokenizer(word)["input_ids"]) == 1, word
            assert tokenizer(word)["input_ids"] == tokenizer(f" {word}")["input_ids"]


@pytest.mark.parametrize("name", data.DATASETS)
def test_it_has_induction_heads_under_the_filter(builtin, name):
    model, tokenizer = builtin
    dataset = data.load(name)
    prompts = PromptEncoder(tokenizer, dataset).encode(dataset.test_prompts(4)[:32]).prompts
    with torch.no_grad():
        behavior = attention_behavior_loss(model, pack(prompts))
    assert behavior.is_induction.any(dim=2).any(dim=0).float().mean() > 0.9


@pytest.fixture
def corpus():
    random = np.random.default_rng(0)
    topics = [random.integers(20 * t, 20 * t + 20, size=(300, 8)) for t in range(3)]
    documents = [row.tolist() for topic in topics for row in topic]
    vectors = document_vectors(documents, token_vectors(documents, 60, 16), 8)
    return Corpus(documents, vectors, np.repeat([0, 1, 2], 300))


def test_vectors_tell_topics_apart(corpus):
    unit = corpus.vectors / np.linalg.norm(corpus.vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    nearest = similarity.argmax(axis=1)
    assert (corpus.source[nearest] == corpus.source).mean() > 0.95
    assert np.abs(corpus.vectors.var(axis=0) - 1).max() < 0.01


def test_pseudo_tasks_are_consistent(corpus):
    random = np.random.default_rng(1)
    frame = Vocabulary(range(100, 120), [([200], [201])], [[210, 211]], 220)
    for _ in range(50):
        task = sample_sequence(corpus, frame, 120, random)
        ids = task.input_ids
        assert len(ids) <= 120 and ids[0] == 200 and ids[-1] == 220
        shown = set()
        for query, label, document, seen in zip(
            task.query_positions, task.label_positions, task.documents, task.seen, strict=True
        ):
            text = corpus.documents[document]
            assert ids[query - 1 : query + 1] == [210, 211] and label == query + 1
            assert ids[query - 1 - len(text) : query - 1] == text
            assert ids[label] in frame.label_words
            assert seen == (ids[label] in shown)
            shown.add(ids[label])


@pytest.mark.slow
def test_the_recipe_runs(tmp_path, capsys):
    build(tmp_path, steps=1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.to_diff_dict() == (
        AutoModelForCausalLM.from_pretrained(builtin_model_path()).config.to_diff_dict()
    )
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    committed = json.loads((builtin_model_path() / "tokenizer.json").read_text())
    assert made == committed
