import dataclasses
import re

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from abft_fast import builtin_model_path, data
from abft_fast.data import Dataset, Example, Prompt
from abft_fast.errors import UserError
from abft_fast.options import EvalConfig, datasets
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder
from abft_fast.prompts.text_tokens import TextTokens

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model_path())


def word_tokenizer(*words, bos=False):
    """Whole words with their leading space; unknown ones fall apart into characters."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merges, vocabulary = [], {letter: i for i, letter in enumerate(sorted(alphabet))}
    for word in words:
        pieces = "Ġ" + word
        for end in range(2, len(pieces) + 1):
            if pieces[:end] not in vocabulary:
                merges.append((pieces[: end - 1], pieces[end - 1]))
                vocabulary[pieces[:end]] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("trims", [True, False])
def test_a_space_at_the_end_is_a_token_also_where_offsets_leave_spaces_out(trims):
    """StaICC's prompts end in one. What the tokenizer itself puts there is not."""
    tokenizer = word_tokenizer("it")
    ids = TextTokens(tokenizer, []).ids("x: ")
    raw = tokenizer.backend_tokenizer
    raw.add_special_tokens([AddedToken("</s>", special=True)])
    end = raw.token_to_id("</s>")
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trims),
            processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)]),
        ]
    )
    [(found, _)] = TextTokens(PreTrainedTokenizerFast(tokenizer_object=raw), []).with_offsets(
        ["x: "]
    )
    assert found == ids and len(ids) == 3


def tiny_dataset(words=("good", "bad"), texts=("it is fine", " a mess ", "so so")):
    examples = tuple(Example(t, i % len(words)) for i, t in enumerate(texts))
    return Dataset(
        "tiny", "review: ", "sentiment: ", words, words, examples, examples, examples
    )  # fmt: skip


def prompt_of(dataset):
    return Prompt(dataset.training[:2], dataset.training[2])


@pytest.mark.parametrize("form", ["ours", "staicc"])
@pytest.mark.parametrize("name", data.DATASETS)
def test_label_positions_hold_the_label_words(tokenizer, name, form):
    dataset = data.load(name)
    encoder = PromptEncoder(tokenizer, dataset, form=form)
    words = encoder.template.label_words
    prompts = dataset.test_prompts(4)[:64]
    encoded = encoder.encode(prompts)
    for prompt, ids, label in zip(prompts, encoded.prompts, encoded.labels, strict=True):
        shown = [tokenizer.decode([ids.input_ids[i]]).strip() for i in ids.label_positions]
        assert shown == [words[d.label] for d in prompt.demonstrations]
        assert ids.label_is_correct == [w == words[label] for w in shown]
        assert tokenizer.decode(ids.input_ids[-1:]) == ":"  # the row the loss looks at
    assert [tokenizer.decode([i]).strip() for i in encoder.label_ids] == list(words)


def test_the_two_forms():
    dataset = tiny_dataset()
    words = word_tokenizer("good", "bad", "review", "sentiment")
    ours = PromptEncoder(words, dataset).template.render(prompt_of(dataset))
    assert ours[0] == (
        "review: it is fine sentiment: good\nreview: a mess sentiment: bad\n"
        "review: so so sentiment:"
    )
    assert [ours[0][a:b] for a, b in ours[1]] == ["good", "bad"]


def test_ours_wants_the_same_token_everywhere():
    dataset = tiny_dataset()
    encoder = PromptEncoder(word_tokenizer("good", "bad"), dataset)
    ids = encoder.encode([prompt_of(dataset)]).prompts[0]
    assert [ids.input_ids[i] for i in ids.label_positions] == encoder.label_ids


def test_special_tokens_at_the_end_are_not_the_query_row():
    from tokenizers import processors

    tokenizer = word_tokenizer("good", "bad")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    dataset = tiny_dataset()
    ids = PromptEncoder(tokenizer, dataset).encode([prompt_of(dataset)]).prompts[0].input_ids
    assert ids[0] == bos and ids[-1] != eos


@pytest.mark.parametrize(
    ("tokens", "words", "options", "message"),
    [
        (("good",), ("good", "bad"), {}, r"tiny: label words are several tokens .*'bad' -> \["),
        (("g",), ("good", "great"), {"label_token": "first"}, "tiny: label words share a token"),
        (("good",), ("good", "good"), {}, "share a token"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(tokens, words, options, message):
    with pytest.raises(UserError, match=message) as caught:
        PromptEncoder(word_tokenizer(*tokens), tiny_dataset(words), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "words", "options", "remedy"),
    [
        (("go", "ba"), ("good", "bad"), {}, r": pass label_token='first', or use another"),
        ((), ("0", "1"), {}, r": pass form='staicc', or use another model"),
        ((), ("0", "1"), {"label_token": "first"}, r": pass form='staicc', or use another model"),
        (
            (),
            ("good", "goods"),
            {},
            r"\): label_token='first' and form='staicc' would not help; use another model",
        ),
    ],
)
def test_the_remedy_is_one_that_works(tokens, words, options, remedy):
    dataset, tokenizer = tiny_dataset(words), word_tokenizer(*tokens)
    with pytest.raises(UserError, match=remedy) as caught:
        PromptEncoder(tokenizer, dataset, **options)
    given = re.search(r"pass (\w+)='(\w+)'", str(caught.value))
    if given:
        encoder = PromptEncoder(tokenizer, dataset, **(options | {given[1]: given[2]}))
        assert len(set(encoder.label_ids)) == len(words)


def test_of_many_labels_one_pair_is_named():
    words = [f"g{i}" for i in range(77)]
    for options in ({}, {"label_token": "first"}):
        with pytest.raises(UserError, match=r"'g0' -> .*'g1' -> .*, and 7[56] ") as caught:
            PromptEncoder(word_tokenizer("g"), tiny_dataset(words), **options)
        assert len(str(caught.value)) < 350


def chat_tokenizer():
    """Added tokens `<eos>` and `<tool>`; only the first one is special."""
    tokenizer = word_tokenizer("good", "bad")
    tokenizer.add_tokens([AddedToken("<eos>", special=True), AddedToken("<tool>", special=False)])
    return tokenizer


TEXTS = ("it is <eos> fine", " a mess ", "<eos>")


@pytest.mark.parametrize(("form", "words"), [("ours", ("good", "bad")), ("staicc", ("0", "1"))])
def test_special_tokens_in_a_text_stay_text(form, words):
    tokenizer, dataset = chat_tokenizer(), tiny_dataset(words, TEXTS)
    encoder = PromptEncoder(tokenizer, dataset, form=form)
    text, _ = encoder.template.render(prompt_of(dataset))
    (prompt,) = encoder.encode([prompt_of(dataset)]).prompts
    tokens = "".join(tokenizer.convert_ids_to_tokens(prompt.input_ids))
    assert "<eos>" in text and tokens.replace("Ġ", " ").replace("Ċ", "\n") == text
    assert tokenizer.convert_tokens_to_ids("<eos>") not in prompt.input_ids
    assert not any(map(encoder.special_token_in, TEXTS))
    ordinary = tiny_dataset(words)
    encoder = PromptEncoder(tokenizer, ordinary, form=form)
    expected = tokenizer(encoder.template.render(prompt_of(ordinary))[0])["input_ids"]
    assert encoder.encode([prompt_of(ordinary)]).prompts[0].input_ids == expected


def test_special_tokens_of_a_template_are_tokens_and_those_of_texts_are_told():
    tokenizer = chat_tokenizer()
    dataset = dataclasses.replace(tiny_dataset(texts=TEXTS), input_prefix="<eos> ")
    encoder = PromptEncoder(tokenizer, dataset)
    (prompt,) = encoder.encode([prompt_of(dataset)]).prompts
    assert prompt.input_ids.count(tokenizer.convert_tokens_to_ids("<eos>")) == 5
    assert [encoder.special_token_in(text) for text in TEXTS] == ["<eos>", None, "<eos>"]


def test_a_token_that_the_model_does_not_have_is_named_with_its_place(tmp_path):
    tokenizer = chat_tokenizer()
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    texts = ("it is fine", " a <tool> ", "so so")
    dataset = tiny_dataset(texts=texts)
    for vocabulary in (None, tool + 1):
        PromptEncoder(tokenizer, dataset, vocabulary=vocabulary).encode([prompt_of(dataset)])
    encoder = PromptEncoder(tokenizer, dataset, vocabulary=tool)
    told = rf"'<tool>' is token {tool} of the tokenizer, but the model has {tool} tokens: use the"
    with pytest.raises(UserError, match=rf"^tiny, the text ' a <tool> ': {told}"):
        encoder.encode([prompt_of(dataset)])
    query = Prompt((), Example("a <tool>", 0))
    with pytest.raises(UserError, match=rf"^q\.csv, row 7: {told}"):
        encoder.encode([query], places=["q.csv, row 7"])
    path = tmp_path / "own.csv"
    path.write_text("text,label\na,good\nb,bad\nc <tool>,bad\nd,good\n")
    own = datasets.from_options(resolve(EvalConfig, {"dataset": str(path), "k": 1}))
    with pytest.raises(UserError, match=rf"own\.csv, row 4: {told}"):
        PromptEncoder(tokenizer, own, vocabulary=tool).encode(
            [Prompt((), e) for e in own.training + own.test]
        )
    words = tiny_dataset(("good", "<tool>"))
    with pytest.raises(
        UserError, match=r"tiny, a label word in a prompt's demonstrations: '<tool>'"
    ):
        PromptEncoder(tokenizer, words, label_token="first", vocabulary=tool, form="staicc")


def test_first_token_of_several():
    dataset = tiny_dataset(("good", "bad"))
    encoder = PromptEncoder(word_tokenizer("go", "ba"), dataset, label_token="first")
    ids = encoder.encode([prompt_of(dataset)]).prompts[0]
    assert [ids.input_ids[i] for i in ids.label_positions] == encoder.label_ids


def test_too_long_prompts(tokenizer):
    dataset = data.load("subj")
    prompts = dataset.test_prompts(4)[:40]
    lengths = [len(p) for p in PromptEncoder(tokenizer, dataset).encode(prompts).prompts]
    limit = sorted(lengths)[20]
    over = sum(n > limit for n in lengths)
    assert 0 < over < 20

    def encode(rule):
        return PromptEncoder(tokenizer, dataset, max_length=limit, on_long_prompt=rule).encode(
            prompts
        )

    message = rf"subj: a prompt of {max(lengths)} tokens is longer .* on_long_prompt='drop'"
    with pytest.raises(UserError, match=message):
        encode("refuse")
    options = resolve(EvalConfig, {})
    encoder = PromptEncoder.from_options(options, tokenizer, dataset, limit)
    with pytest.raises(UserError, match="lower --k, or pass --on-long-prompt drop or fewer-demo"):
        encoder.encode(prompts)
    result = encode("drop")
    assert (len(result.prompts), result.dropped, result.shortened) == (40 - over, over, 0)
    assert len(result.labels) == 40 - over
    result = encode("fewer-demonstrations")
    assert (len(result.prompts), result.dropped, result.shortened) == (40, 0, over)
    assert all(len(p) <= limit and p.label_positions for p in result.prompts)
    with pytest.raises(UserError, match="all 40 prompts"):
        PromptEncoder(tokenizer, dataset, max_length=5, on_long_prompt="drop").encode(prompts)
