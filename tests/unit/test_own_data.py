"""The user's files as a dataset: labels, template, split, and what is said of them."""

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict

from abft_fast.commands.data_report import labels_alike, oddities
from abft_fast.errors import UserError
from abft_fast.options import TrainConfig, datasets
from abft_fast.options.resolve import resolve, write_yaml
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit

WORDS = {"1": 20, "0": 10, "other": 5}


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = [value for value, count in WORDS.items() for _ in range(count)]
    write("reviews.csv", [(f"text {i}", value) for i, value in enumerate(values)])
    return tmp_path / "reviews.csv"


def write(path, rows):
    with open(path, "w") as file:
        file.writelines(f"{a},{b}\n" for a, b in [("text", "label"), *rows])


def load(**options):
    return datasets.from_options(resolve(TrainConfig, {"dataset": "reviews.csv", **options}))


def test_without_a_template_values_are_the_words(reviews):
    dataset = load()
    assert dataset.name == "reviews"
    assert dataset.label_words == dataset.label_values == ("0", "1", "other")
    assert (dataset.input_prefix, dataset.label_prefix) == ("text: ", "label: ")


def test_a_template_names_words_in_its_order(reviews):
    template = 'input_prefix: "review: "\nlabels:\n  other: no\n  1: positive\n  0: negative\n'
    (reviews.parent / "t.yaml").write_text(template)
    dataset = load(template="t.yaml")
    assert dataset.label_words == ("no", "positive", "negative")
    assert (dataset.input_prefix, dataset.label_prefix) == ("review: ", "label: ")
    by_text = {e.text: e.label for e in dataset.training + dataset.test}
    assert (by_text["text 0"], by_text["text 20"], by_text["text 30"]) == (1, 2, 0)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_split_takes_its_share_of_each_label(reviews, share):
    dataset = load(test_share=share)
    assert dataset.demonstrations == dataset.training
    everything = dataset.training + dataset.test
    assert sorted(e.text for e in everything) == sorted(f"text {i}" for i in range(35))
    test, training = (Counter(e.label for e in part) for part in (dataset.test, dataset.training))
    for label, value in enumerate(dataset.label_values):
        wanted = min(max(round(share * WORDS[value]), 1), WORDS[value] - 1)
        assert (test[label], training[label]) == (wanted, WORDS[value] - wanted)
    for part, rows in (
        (dataset.training, dataset.training_rows),
        (dataset.test, dataset.test_rows),
    ):
        assert [e.text for e in part] == [f"text {row - 2}" for row in rows]  # of the file


def test_a_split_is_that_of_its_seed_in_every_process(reviews):
    code = (
        "from abft_fast.options import datasets, TrainConfig\n"
        "from abft_fast.options.resolve import resolve\n"
        "found = datasets.from_options(resolve(TrainConfig, {'dataset': 'reviews.csv'}))\n"
        "print(found.test_rows); import sys; assert 'torch' not in sys.modules"
    )
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == str(load().test_rows)
    assert load(split_seed=1).test_rows != load().test_rows


def test_some_of_the_test_queries(reviews):
    dataset = load(test_share=0.5)
    few = dataset.with_queries(5)
    rows = dict(zip(dataset.test_rows, dataset.test, strict=True))
    assert len(few.test) == 5 < len(dataset.test)
    assert few.test == tuple(rows[row] for row in few.test_rows)
    assert few.test not in (dataset.test[:5], dataset.test[-5:])  # a file may be sorted
    assert (few.training, few) == (dataset.training, load(test_share=0.5).with_queries(5))
    assert dataset.with_queries(1000) == dataset


def test_a_test_file_leaves_all_rows_to_train_on(reviews):
    write("held out.csv", [("unseen", "1"), ("text 3", "0")])
    dataset = load(test_file="held out.csv")
    assert len(dataset.training) == 35
    assert [(e.text, dataset.label_words[e.label]) for e in dataset.test] == [
        ("unseen", "1"),
        ("text 3", "0"),
    ]


def test_parts_of_a_dataset_dict(reviews):
    rows = {"text": ["a", "b", "c", "d"], "label": [True, False] * 2}
    made = Dataset.from_dict(rows)
    DatasetDict({"train": made, "test": made.select([0])}).save_to_disk("both")
    dataset = load(dataset="both")
    assert (dataset.name, dataset.label_words) == ("both", ("false", "true"))
    assert (len(dataset.training), len(dataset.test)) == (4, 1)
    with pytest.raises(
        UserError, match="--split-seed: both has a part `test`, so nothing is split"
    ):
        load(dataset="both", split_seed=1)
    DatasetDict({"train": made}).save_to_disk("one")
    dataset = load(dataset="one", test_share=0.5)
    assert (len(dataset.training), len(dataset.test)) == (2, 2)


def test_a_changed_file_is_read_again_and_known_as_changed(reviews):
    before = load()
    assert load() is before
    write("reviews.csv", [(f"new {i}", i % 2) for i in range(10)])
    after = load()
    assert len(after.training) == 8
    assert [path for path, _ in after.files] == [str(reviews)]
    assert after.files != before.files


def test_a_folder_changes_with_any_of_its_files(reviews):
    digests = set()
    for last in ("d", "e"):
        rows = {"text": ["a", "b", "c", last], "label": [0, 1] * 2}
        Dataset.from_dict(rows).save_to_disk("folder")
        digests.add(load(dataset="folder").files)
        digests.add(load(dataset="folder").files)
    assert len(digests) == 2


def test_a_run_remembers_its_data(reviews, monkeypatch):
    (reviews.parent / "t.yaml").write_text("input_prefix: 'a '\n")
    given = {"dataset": "reviews.csv", "template": "t.yaml", "split_seed": "3"}
    config = resolve(TrainConfig, {**given, "output_dir": "run"})
    run = RunFolder.reserve(config)
    run.create(config, 0, dict(datasets.from_options(config).files), {})
    (reviews.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run, options = RunFolder.open(reviews.parent / "run")
    dataset = datasets.from_options(options)
    assert (dataset.input_prefix, len(dataset.files)) == ("a ", 2)
    run.check_data(dict(dataset.files))
    (reviews.parent / "t.yaml").write_text("input_prefix: 'b '\n")
    with pytest.raises(UserError, match=r"t\.yaml has changed since run .* began"):
        run.check_data(dict(datasets.from_options(options).files))
    write_yaml(options, reviews.parent / "replay.yaml")
    replayed = resolve(TrainConfig, {"config": "../replay.yaml"})
    assert replayed.model_dump(exclude={"config"}) == options.model_dump(exclude={"config"})
    content = yaml.safe_load((reviews.parent / "replay.yaml").read_text())
    assert content["dataset"] == str(reviews)


@pytest.fixture
def run(reviews):
    """A run's folder, whose data have a template."""
    (reviews.parent / "t.yaml").write_text("input_prefix: 'a '\n")
    config = resolve(
        TrainConfig, {"dataset": "reviews.csv", "template": "t.yaml", "output_dir": "run"}
    )
    run = RunFolder.reserve(config)
    run.create(config, 0, datasets.file_hashes(config), {})
    return run


def resume(**given):
    run, options = RunFolder.open(Path("run"), given)
    run.check_data(datasets.file_hashes(options))
    return options


def test_moved_data_are_known_by_their_content(run, reviews):
    before = datasets.from_options(resume())
    (reviews.parent / "moved").mkdir()
    reviews.rename("moved/renamed.csv")
    with pytest.raises(UserError, match=rf"--resume run: {reviews} is not there .* by --dataset$"):
        resume()
    options = resume(dataset="moved/renamed.csv")
    after = datasets.from_options(options)
    assert after.name == before.name == "reviews"
    assert after.training_prompts(2, 8, seed=0) == before.training_prompts(2, 8, seed=0)
    assert run.resume_command(options) == (
        "abft-fast train --resume run --dataset moved/renamed.csv"
    )
    again = resume(dataset="moved/renamed.csv", device="cpu", force=True)
    assert run.resume_command(again) == (
        "abft-fast train --resume run --dataset moved/renamed.csv --device cpu --force"
    )
    (reviews.parent / "t.yaml").rename("moved/new t.yaml")
    with pytest.raises(UserError, match=r"t\.yaml is not there any more: .* by --template$"):
        resume(dataset="moved/renamed.csv")
    resume(dataset="moved/renamed.csv", template="moved/new t.yaml")
    write("moved/renamed.csv", [("another", 0), ("file", 1)] * 4)
    with pytest.raises(UserError, match=rf"run run began with {reviews}, and .*/moved/renamed\.csv "
                       "has another content"):  # fmt: skip
        resume(dataset="moved/renamed.csv", template="moved/new t.yaml")


def test_a_place_written_into_the_options_is_known_by_its_content(run, reviews):
    (reviews.parent / "moved").mkdir()
    reviews.rename("moved/reviews.csv")
    options = reviews.parent / "run/config.yaml"
    text = options.read_text()
    options.write_text(text.replace(str(reviews), f"{reviews.parent}/moved/reviews.csv"))
    assert resume().dataset_name == "reviews"
    (reviews.parent / "moved/reviews.csv").rename("moved/renamed.csv")
    options.write_text(text.replace(str(reviews), f"{reviews.parent}/moved/renamed.csv"))
    with pytest.raises(UserError, match="prompts are drawn by a file's name: restore that line"):
        resume()


def test_moved_files_do_not_take_each_others_place(reviews):
    write("more.csv", [("x", 0), ("y", 1)] * 4)
    given = {"dataset": "reviews.csv", "method": "MetaICL", "meta_datasets": "more.csv,trec"}
    config = resolve(TrainConfig, {**given, "output_dir": "run"})
    RunFolder.reserve(config).create(config, 0, datasets.file_hashes(config), {})
    Path("more.csv").rename("moved.csv")
    assert resume(meta_datasets="moved.csv,trec").training_dataset_names == ["moved.csv", "trec"]
    dataset = datasets.to_train_on(resume(meta_datasets="moved.csv,trec"), "moved.csv")
    assert dataset.name == "more"
    with pytest.raises(UserError, match="--meta-datasets: the run has 2 of them, not 1"):
        resume(meta_datasets="moved.csv")
    with pytest.raises(UserError, match="trec is StaICC's, which no file replaces"):
        resume(meta_datasets="moved.csv,x.csv")
    Path("reviews.csv").rename("was-reviews.csv")
    with pytest.raises(UserError, match="has another content"):
        resume(dataset="moved.csv", meta_datasets="was-reviews.csv,trec")
    resume(dataset="was-reviews.csv", meta_datasets="moved.csv,trec")


def test_only_a_file_has_a_new_place(tmp_path, monkeypatch, reviews):
    config = resolve(TrainConfig, {"dataset": "sst2", "output_dir": "run"})
    RunFolder.reserve(config).create(config, 0, {}, {})
    for given in ({"dataset": "mr"}, {"dataset": "reviews.csv"}, {"test_file": "reviews.csv"}):
        with pytest.raises(UserError, match="--resume uses the run's own options: leave out --"):
            resume(**given)


def test_a_pipe_is_a_dataset(reviews):
    content = reviews.read_bytes()
    os.mkfifo("pipe.csv")
    writer = threading.Thread(target=Path("pipe.csv").write_bytes, args=(content,), daemon=True)
    writer.start()
    options = resolve(TrainConfig, {"dataset": "pipe.csv", "output_dir": "run"})
    piped, whole = datasets.from_options(options), load()
    writer.join(timeout=10)
    assert (piped.training, piped.test, piped.name) == (whole.training, whole.test, "pipe")
    assert [digest for _, digest in piped.files] == [digest for _, digest in whole.files]
    with pytest.raises(UserError, match=r"pipe\.csv can be read once, but every process reads it"):
        datasets.refuse_streams(options, "every process")
    for given in (
        {"training_datasets": "trec,pipe.csv"},
        {"method": "MetaICL", "meta_datasets": "pipe.csv"},
    ):
        several = resolve(TrainConfig, {"dataset": "sst2", **given})
        with pytest.raises(UserError, match=r"pipe\.csv can be read once, but every cell reads it"):
            datasets.refuse_streams(several, "every cell")
    RunFolder.reserve(options).create(options, 0, datasets.file_hashes(options), {})
    with pytest.raises(UserError, match=r"pipe\.csv is not there any more: .* by --dataset"):
        resume()
    assert resume(dataset="reviews.csv").dataset_name == "pipe"


def test_a_delimiter_is_an_option(reviews):
    text = reviews.read_text()
    reviews.write_text(text.replace(",", ";"))
    assert load().notes == (
        "reviews.csv seems separated by ';' and is read so; --delimiter sets another one",
    )
    assert load(delimiter=";").notes == ()
    assert load(delimiter=";").training == load().training
    reviews.write_text(text.replace(",", "^"))
    assert load(delimiter="^").label_words == ("0", "1", "other")
    reviews.with_suffix(".tsv").write_text(text.replace(",", "\t"))
    assert load(dataset="reviews.tsv", delimiter="tab").label_words == ("0", "1", "other")
    with pytest.raises(UserError, match="--delimiter ;;: use one character, such as ';', or tab"):
        load(delimiter=";;")
    with pytest.raises(UserError, match="--delimiter is for your own data"):
        load(dataset="sst2", delimiter=";")


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        (["1", "1.0", "0", "-0", "2"], "'1' and '1.0'; '0' and '-0'"),
        (["yes", "Yes ", "no", "\uff2e\uff2f"], "'yes' and 'Yes '; 'no' and '\uff2e\uff2f'"),
        (["a b", "a  b", "c"], "'a b' and 'a  b'"),
        (["1", "true", "False", "0"], "'1' and 'true'; 'False' and '0'"),  # JSON's may be mixed
        (["1", "10", "0x1", "yes"], None),
    ],
)
def test_labels_that_may_be_one_are_named(labels, groups):
    line = f"labels that may be one: {groups}: write both the same way if they are"
    assert labels_alike(labels) == ([line] if groups else [])


def test_a_run_is_named_after_the_file(reviews, monkeypatch):
    write("my reviews.csv", [("a", 0), ("b", 1)])
    config = resolve(TrainConfig, {"dataset": "my reviews.csv"})
    assert RunFolder.reserve(config).folder.name.endswith("-builtin-my-reviews")


def test_a_name_is_never_a_folder_of_that_name(reviews):
    (reviews.parent / "trec").mkdir()
    assert not resolve(TrainConfig, {"dataset": "trec"}).data_are_own
    assert resolve(TrainConfig, {"dataset": "./trec"}).data_are_own


def test_what_stands_twice_is_named(reviews):
    write("train.csv", [("a", 0), ("b", 1), ("a", 0), (" b ", 0), ("c", 1)])
    write("test.csv", [("x", 0), ("c", 1), ("a", 1)])
    assert oddities(load(dataset="train.csv", test_file="test.csv")) == [
        "texts both to train and to test on: 2, first train.csv, row 2, and test.csv, row 4",
        "texts more than once to train on: 2, first train.csv, row 2, and train.csv, row 4",
        "texts with two labels: 2, first train.csv, row 2, and test.csv, row 4",
    ]


def test_small_data_refuse_more_demonstrations_than_there_are(reviews):
    write("small.csv", [("a", 0), ("b", 1), ("c", 0), ("d", 1)])
    dataset = load(dataset="small.csv")
    assert len(dataset.training_prompts(1, 8, seed=0)) == 8
    assert {len(p.demonstrations) for p in dataset.test_prompts(2)} == {2}
    with pytest.raises(UserError, match="k=2: small has 2 training examples, so k is at most 1"):
        dataset.training_prompts(2, 1, seed=0)
    with pytest.raises(UserError, match="k=3: small has 2 demonstrations to draw from"):
        dataset.test_prompts(3)
