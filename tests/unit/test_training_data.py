"""What the methods train on."""

from dataclasses import replace

import pytest

from abft_fast import data
from abft_fast.commands.train import TrainSession
from abft_fast.errors import UserError
from abft_fast.models import loading
from abft_fast.options import TrainConfig, datasets
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.progress import Progress
from abft_fast.training.methods import training_prompts
from abft_fast.training.picl import intrinsic_tasks, paragraphs

pytestmark = pytest.mark.unit

TOKENIZER = loading.read_tokenizer("builtin")


def prompts_of(**options):
    config = resolve(TrainConfig, {"train_samples": 12, **options})
    dataset = data.load(config.dataset)
    encoder = PromptEncoder.from_options(config, TOKENIZER, dataset, 2048)
    return training_prompts(config, dataset, encoder).prompts, encoder


def test_e2e_is_abfts_prompts_with_the_querys_label():
    plain, encoder = prompts_of(dataset="trec")
    targeted, _ = prompts_of(dataset="trec", method="E2E")
    for p, t in zip(plain, targeted, strict=True):
        assert (t.input_ids, t.label_positions) == (p.input_ids, p.label_positions)
        assert t.target_positions == [len(p) - 1] and t.targets[0] in encoder.label_ids
        same = [t.input_ids[i] == t.targets[0] for i in t.label_positions]
        assert same == t.label_is_correct


def test_only_seen_labels():
    """The paper draws prompts that have nothing right to attend to, on TREC nearly half of them."""
    drawn, _ = prompts_of(dataset="trec", train_samples=512)
    seen, _ = prompts_of(dataset="trec", train_samples=512, seen_labels_only=True)
    assert 0.4 < sum(not any(p.label_is_correct) for p in drawn) / 512 < 0.5
    assert len(seen) == 512 and all(any(p.label_is_correct) for p in seen)
    right = [p.input_ids for p in drawn if any(p.label_is_correct)]
    assert [p.input_ids for p in seen[: len(right)]] == right
    with pytest.raises(UserError, match="--seen-labels-only needs a demonstration"):
        data.load("sst2").training_prompts(0, 1, 0, seen_labels_only=True)


def test_labels_that_are_rarely_seen_end_the_draws():
    examples = (data.Example("a", 0), *(data.Example(f"text {i}", i) for i in range(5000)))
    dataset = replace(data.load("sst2"), training=examples)
    with pytest.raises(UserError, match="in 0 of 2,001 prompts drawn from sst2"):
        dataset.training_prompts(1, 2, 0, seen_labels_only=True)


@pytest.mark.slow
def test_metaicl_leaves_the_tested_dataset_out():
    found, _ = prompts_of(dataset="subj", method="MetaICL")
    assert len(found) == 12
    words = {TOKENIZER.decode(p.targets).strip() for p in found}
    assert not words & {"objective", "subjective"}
    outside, _ = prompts_of(dataset="subj", method="MetaICL", generalization_test=True)
    kinds = [TOKENIZER.decode(p.input_ids).strip().split(":")[0] for p in outside]
    assert sorted(set(kinds)) == ["news", "tweet"]
    only, _ = prompts_of(dataset="subj", method="MetaICL", meta_datasets="trec,mr")
    prefixes = [TOKENIZER.decode(p.input_ids).strip().split(":")[0] for p in only]
    assert prefixes.count("question") == prefixes.count("review") == 6


def test_metaicl_trains_on_files_of_ones_own(tmp_path):
    file = tmp_path / "mails.csv"
    file.write_text("body,label\n" + "good news,negative\nbad news,positive\n" * 10)
    options = {"dataset": "subj", "method": "MetaICL", "text_column": "body"}
    found, _ = prompts_of(**options, meta_datasets=f"mr,{file}", k=2)
    texts = [TOKENIZER.decode(p.input_ids) for p in found]
    assert sum("good news" in text or "bad news" in text for text in texts) == 6
    with pytest.raises(UserError, match="--text-column is for your own data"):
        prompts_of(**options, meta_datasets="mr")
    with pytest.raises(UserError, match="--test-file is for your own data"):
        prompts_of(**options, meta_datasets=f"mr,{file}", test_file=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meta_datasets": "trec,imdb"}, "'imdb' is unknown"),
        ({"meta_datasets": "trec,subj"}, "holds subj, which is tested"),
        ({"meta_datasets": "trec", "generalization_test": True}, "holds trec, which is tested"),
        ({"method": "E2E", "gradient": "local"}, "--gradient local works with ABFT only"),
        ({"method": "MetaICL", "quantized": True}, "--trainable model needs float weights"),
        ({"method": "RLHF"}, "--method RLHF"),
    ],
)
def test_what_cannot_be_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        prompts_of(**{"dataset": "subj", "method": "MetaICL", **options})


def test_the_method_decides_what_is_trained_unless_told():
    for method, trainable in (("ABFT", "lora"), ("e2e", "lora"), ("PICL", "model")):
        assert resolve(TrainConfig, {"method": method}).trainable == trainable
    assert resolve(TrainConfig, {"method": "metaicl", "trainable": "lora"}).trainable == "lora"


def keys(examples):
    return {data.text_key(example.text) for example in examples} - {""}


def test_picl_trains_on_staicc_texts_less_the_test_part():
    texts = set(paragraphs(None))
    dataset = data.load("fp")
    assert len({e.text.strip() for e in dataset.training} & texts) > 1000
    trained = {data.text_key(text) for text in texts}
    for name in data.DATASETS:  # SST-2 and MR share sentences
        assert not keys(data.load(name).test) & trained


@pytest.mark.parametrize("name", ["mr", "sst2", "sst5", "subj"])
def test_no_other_dataset_trains_on_a_text_of_the_test(name, monkeypatch):
    """Four of the paper's datasets hold sentences of the same reviews."""
    drawn = []
    draw = data.Dataset.training_prompts

    def seen(dataset, *arguments):
        drawn.append(dataset)
        return draw(dataset, *arguments)

    monkeypatch.setattr(data.Dataset, "training_prompts", seen)
    prompts_of(dataset=name, training_datasets="others", train_samples=7)
    tested = keys(data.load(name).test)
    whole = [data.load(dataset.name) for dataset in drawn]
    assert any(keys(dataset.training) & tested for dataset in whole)
    assert not any(keys(dataset.training) & tested for dataset in drawn)
    left = sum(len(dataset.training) for dataset in drawn)
    assert 7000 < left < sum(len(dataset.training) for dataset in whole)


def test_a_text_that_is_also_tested_leaves_a_file_with_its_row(tmp_path):
    text = data.load("subj").test[3].text.upper()
    file = tmp_path / "mails.csv"
    file.write_text("text,label\n" + f'"{text}!",positive\n' + "news,negative\nwar,positive\n" * 9)
    config = resolve(TrainConfig, {"dataset": "subj", "training_datasets": f"subj,{file}"})
    whole = datasets.to_train_on(config, str(file))
    left = whole.without(keys(data.load("subj").test))
    gone = [row for row in whole.training_rows if row not in left.training_rows]
    assert len(left.training) == len(left.training_rows)
    assert gone == ([2] if any("!" in e.text for e in whole.training) else [])


def test_picl_puts_the_most_similar_paragraphs_before_each():
    pytest.importorskip("bm25s")
    texts = ["the cat sat on a mat", "a dog barked", "the cat sat down", "stocks fell sharply"]
    tasks = intrinsic_tasks(texts, 1, 8, seed=0)
    assert {task[-1] for task in tasks} <= set(texts) and len(tasks) == 8
    assert all(task[0] != task[1] for task in tasks)
    assert ["the cat sat down", "the cat sat on a mat"] in tasks
    assert tasks == intrinsic_tasks(texts, 1, 8, seed=0) != intrinsic_tasks(texts, 1, 8, seed=1)
    with pytest.raises(UserError, match="there are 4 paragraphs, so k is at most 3"):
        intrinsic_tasks(texts, 4, 8, seed=0)


def test_picl_predicts_every_token(tmp_path):
    pytest.importorskip("bm25s")
    file = tmp_path / "plain.txt"
    file.write_text("the cat sat on a mat\n\na dog barked\nthe cat sat down\n")
    found, _ = prompts_of(method="PICL", plain_text=file, k=2)
    assert len(found) == 12
    for prompt in found:
        assert prompt.targets == prompt.input_ids[1:]
        assert prompt.target_positions == list(range(len(prompt) - 1))
        assert TOKENIZER.decode(prompt.input_ids).count("\n") == 2
    file.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        prompts_of(method="PICL", plain_text=file)
    with pytest.raises(UserError, match="No such file"):
        prompts_of(method="PICL", plain_text=tmp_path / "nowhere.txt")


def prefixes_of(**options):
    found, _ = prompts_of(**options)
    return [TOKENIZER.decode(p.input_ids).strip().split(":")[0] for p in found]


@pytest.mark.parametrize("method", ["ABFT", "E2E"])
def test_several_datasets_give_one_training_set(method, tmp_path):
    names = prefixes_of(dataset="trec", method=method, training_datasets="trec,mr,agnews")
    assert (names.count("question"), names.count("review"), names.count("news")) == (4, 4, 4)
    file = tmp_path / "mails.csv"
    file.write_text("text,label\n" + "good news,negative\nbad news,positive\n" * 256)
    options = {"dataset": "trec", "training_datasets": f"trec,{file}", "k": 2}
    assert prefixes_of(**options).count("question") == 6
    by_size = prefixes_of(**options, mixture="proportional")  # 1,024 examples and 409
    assert by_size.count("question") == 9


def test_others_leaves_the_tested_dataset_out():
    config = resolve(TrainConfig, {"dataset": "subj", "training_datasets": "others"})
    assert config.training_dataset_names == [n for n in data.PAPER_DATASETS if n != "subj"]
    with pytest.raises(UserError, match="no dataset is left"):
        prompts_of(dataset="subj", training_datasets="others", generalization_test=True)


def test_training_datasets_are_for_methods_that_have_no_list_of_their_own():
    with pytest.raises(UserError, match="works with ABFT and E2E, not MetaICL: use --meta-data"):
        prompts_of(dataset="subj", method="MetaICL", training_datasets="mr")


def test_a_file_of_tests_is_not_trained_on(tmp_path):
    rows = "text,label\n" + "good news,negative\nbad news,positive\n" * 8
    files = {name: tmp_path / name for name in ("mails.csv", "tests.csv")}
    for file in files.values():
        file.write_text(rows)
    options = {"dataset": str(files["mails.csv"]), "test_file": str(files["tests.csv"])}
    with pytest.raises(UserError, match=r"tests.csv, which is tested"):
        resolve(TrainConfig, options | {"training_datasets": f"mr,{files['tests.csv']}"})


@pytest.mark.slow
def test_many_prompts_with_nothing_right_to_attend_to_are_said(monkeypatch):
    said = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    for options in ({}, {"seen_labels_only": True}, {"method": "E2E"}, {"dataset": "subj"}):
        config = resolve(TrainConfig, {"dataset": "trec", "device": "cpu", **options})
        session = TrainSession(config, progress)
        session.say_unseen(session.encode_training())
    assert [line[:27] for line in said] == ["45% of the training prompts"]
    assert "--seen-labels-only" in said[0]


def test_the_tested_file_is_one_dataset_however_it_is_spelled(tmp_path, monkeypatch):
    """And it stays that when a resumed run finds it in another place."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "moved.csv", "b.csv"):
        (tmp_path / name).write_text("text,label\n" + "good,yes\nbad,no\n" * 9)
    options = {"dataset": "a.csv", "test_file": "b.csv", "training_datasets": "./a.csv,sst2"}
    config = resolve(TrainConfig, options)
    assert config.training_dataset_names == ["a.csv", "sst2"]
    saved = config.model_dump(mode="json")
    resumed = resolve(TrainConfig, {**saved, "dataset": "moved.csv"}).moved_from(saved)
    assert resumed.training_dataset_names == ["moved.csv", "sst2"]
    assert resolve(TrainConfig, saved).moved_from(saved).training_dataset_names == [
        str(tmp_path / "a.csv"), "sst2",
    ]  # fmt: skip
