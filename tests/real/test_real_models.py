"""Real pretrained weights, of `make real-models`: right against the models' own eager attention."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import attention_behavior_loss, data, pack
from abft_fast.core.label_logits import label_logits
from abft_fast.core.shared_prefix import SharedPrefix, common_prefix
from abft_fast.data import Dataset, Example, Prompt
from abft_fast.errors import UserError
from abft_fast.evaluation.inference import predict_labels
from abft_fast.evaluation.staicc_tests import StaiccTest
from abft_fast.models import loading
from abft_fast.models.trainable import add_lora
from abft_fast.prompts import PromptEncoder
from tests.command_line import abft_fast
from tests.families.test_families import eager_losses, relative_error, trained_weights
from tests.real.fetch import MODELS, path_of
from tests.staicc_reference import staicc_probabilities

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=MODELS)
def path(request):
    path = path_of(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} is not there: make real-models")
    return path


def load(path, bits=None):
    return loading.load(str(path), torch.device("cpu"), torch.float32, bits)


@pytest.fixture(scope="module")
def encoder(path):
    return PromptEncoder(loading.read_tokenizer(str(path)), data.load("sst2"))


@pytest.fixture(scope="module")
def prompts(encoder):
    return encoder.encode(data.load("sst2").training_prompts(2, 3, seed=0)).prompts


@pytest.mark.slow  # transformers takes minutes to read one
def test_weights_are_what_transformers_reads(path):
    expected = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    actual = load(path).state_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.slow  # as above
def test_the_tokenizer_is_what_transformers_reads(path):
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    actual = loading.read_tokenizer(str(path)).backend_tokenizer
    assert json.loads(actual.to_str()) == json.loads(expected.to_str())


def test_special_tokens_in_a_text_stay_text(encoder):
    tokenizer = encoder.tokenizer
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    text = " and ".join(token for token in special if token != tokenizer.unk_token)
    assert tokenizer.all_special_tokens[0] in text and encoder.special_token_in(text) is None
    (prompt,) = encoder.encode([Prompt((), Example(text, 0))]).prompts
    steering = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert steering.isdisjoint(prompt.input_ids[1:])  # the first one may begin the prompt
    assert text in tokenizer.decode(prompt.input_ids)
    ordinary = [encoder.template.render(p)[0] for p in data.load("sst2").test_prompts(4)[:64]]
    encoded = encoder.encode(data.load("sst2").test_prompts(4)[:64]).prompts
    assert [p.input_ids for p in encoded] == tokenizer(ordinary)["input_ids"]


def test_labels_0_and_1_are_told_with_a_setting_that_works(path, encoder):
    examples = tuple(Example(text, i) for i, text in enumerate(("a film", "a mess")))
    digits = Dataset("digits", "text: ", "label: ", *[("0", "1")] * 2, *[examples] * 3)
    with pytest.raises(UserError, match=r": pass form='staicc', or use another model"):
        PromptEncoder(encoder.tokenizer, digits)
    assert len(set(PromptEncoder(encoder.tokenizer, digits, form="staicc").label_ids)) == 2


def test_packed_equals_eager(path, prompts):
    reference = load(path)
    reference.set_attn_implementation("eager")
    per_prompt = [eager_losses(reference, prompt, head_filter=True) for prompt in prompts]
    loss = torch.stack([losses.sum() for losses, _, _ in per_prompt]).mean()
    weights = trained_weights(reference)
    expected = torch.autograd.grad(loss, [weight for _, weight, _, _ in weights])

    model = load(path)
    behavior = attention_behavior_loss(model, pack(prompts), penalty=0.5, reward=1.0)
    behavior.loss.backward()
    assert relative_error(behavior.loss, loss) <= 1e-4
    mass = torch.stack([mass for _, _, mass in per_prompt], dim=1)
    assert relative_error(behavior.label_mass, mass) <= 1e-4
    heads = torch.stack([heads for _, heads, _ in per_prompt], dim=1)
    assert torch.equal(behavior.is_induction, heads) and heads.any()
    for (layer, weight, *_), gradient in zip(trained_weights(model), expected, strict=True):
        assert relative_error(weight.grad, gradient) <= 2e-4, layer


def test_logits_of_labels(path, encoder, prompts):
    model, reference = load(path), load(path)
    label_ids = encoder.label_ids
    with torch.no_grad():
        actual, _, _ = label_logits(model, prompts, label_ids)
        expected = torch.stack(
            [reference(torch.tensor([p.input_ids])).logits[0, -1, label_ids] for p in prompts]
        )
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize(
    ("names", "count"),
    [(("sst2", "trec"), 4), pytest.param(data.DATASETS, 64, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_predictions_are_those_of_staiccs_harness(path, names, count):
    """Of so many prompts of each dataset, in float32."""
    model, reference, tokenizer = load(path), load(path), loading.read_tokenizer(str(path))
    for name in names:
        dataset = data.load(name)
        [call] = StaiccTest.of("Normal", dataset, 4, "staicc").calls
        prompts = call.prompts[:count]
        encoded = PromptEncoder(tokenizer, dataset, form="staicc").encode(prompts)
        logits, _ = predict_labels(model, encoded, token_budget=2000)
        theirs = staicc_probabilities(reference, tokenizer, dataset, call.template, prompts)
        torch.testing.assert_close(logits.softmax(-1), theirs, rtol=0, atol=1e-4)
        assert torch.equal(logits.argmax(-1), theirs.argmax(-1)), name


def test_a_shared_prefix_changes_nothing(path):
    dataset = data.load("sst2")
    encoder = PromptEncoder(loading.read_tokenizer(str(path)), dataset)
    queries = [Prompt(dataset.training[:4], query) for query in dataset.test[:4]]
    prompts = encoder.encode(queries).prompts
    rows = [prompt.input_ids for prompt in prompts]
    prefix = common_prefix(rows)
    assert len(prefix) > 50
    model = load(path)
    with torch.no_grad():
        actual = SharedPrefix(model, prefix).label_logits(rows, encoder.label_ids)
        expected, _, _ = label_logits(model, prompts, encoder.label_ids)
    assert relative_error(actual, expected) <= 1e-4


def test_an_adapter_is_loaded_by_peft_alone(path, prompts, tmp_path):
    model = add_lora(load(path), rank=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([prompts[0].input_ids])
    loaded = PeftModel.from_pretrained(load(path), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.equal(loaded(ids).logits, load(path)(ids).logits)


def test_a_quantized_model_trains(path, tmp_path):
    result = abft_fast(
        "train", "--model", path, "--quantized", "--dataset", "sst2", "--k", 2, "--device", "cpu",
        "--train-samples", 16, "--epochs", 1, "--no-eval", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["loss"] > 0
