"""An adapter is not tested on rows its run trained on, nor given other prompts without a word."""

import shutil

import pytest

from abft_fast import builtin_model_path
from abft_fast.commands.adapter_origin import check_tested_apart, differences
from abft_fast.commands.checks import check_analyze_prompts, check_evaluate
from abft_fast.errors import UserError
from abft_fast.options import AttentionConfig, EvalConfig, PredictConfig, TrainConfig
from abft_fast.options.datasets import file_hashes
from abft_fast.options.resolve import resolve
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Makes the folder of a run with these options; its adapter's place."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"text {i},{'bad' if i % 2 else 'good'}\n" for i in range(40))
    (tmp_path / "own.csv").write_text("text,label\n" + rows)
    (tmp_path / "other.csv").write_text("text,label\n" + rows.replace("text", "test"))

    def make(**options):
        config = resolve(TrainConfig, {"dataset": "own.csv", **options})
        RunFolder(tmp_path / "run").create(config, 0, file_hashes(config), {})
        (tmp_path / "run" / "adapter").mkdir()
        return "run/adapter"

    return make


def evaluation(adapter, **options):
    return resolve(EvalConfig, {"adapter": adapter, "dataset": "own.csv", **options})


def test_its_own_split_and_other_data_are_tested(trained, tmp_path):
    adapter = trained(split_seed=3)
    check(evaluation(adapter, split_seed=3))
    check(evaluation(adapter, test_file="other.csv"))
    check(evaluation(adapter, dataset="other.csv"))
    check(evaluation(adapter, dataset="sst2"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/adapter").rename(tmp_path / "elsewhere/adapter")
    check(evaluation("elsewhere/adapter"))  # nothing is known of it


@pytest.mark.parametrize(
    ("run", "now", "message"),
    [
        ({"split_seed": 3}, {}, "--split-seed 3"),
        ({}, {"test_share": 0.5}, "--test-share 0.2"),
        ({"test_file": "other.csv"}, {}, "--test-file .*other.csv"),
    ],
)
def test_another_split_is_refused(trained, tmp_path, run, now, message):
    adapter = trained(**run)
    with pytest.raises(UserError, match=f"own.csv that are to be tested: its run had {message}"):
        check(evaluation(adapter, **now))
    (tmp_path / "own.csv").rename(tmp_path / "moved.csv")
    with pytest.raises(UserError, match=message):
        check(evaluation(adapter, dataset="moved.csv", **now))


def test_a_test_file_that_was_trained_on_is_refused(trained, tmp_path):
    adapter = trained(test_file="other.csv")
    rows = (tmp_path / "other.csv").read_text().replace("test", "third")
    (tmp_path / "third.csv").write_text(rows)
    check(evaluation(adapter, dataset="third.csv", test_file="other.csv"))
    with pytest.raises(UserError, match=r"trained on rows of own.csv, which are to be tested"):
        check(evaluation(adapter, dataset="third.csv", test_file="own.csv"))


def test_a_whole_model_is_tested_apart_too(trained, tmp_path):
    trained(split_seed=3, method="E2E", trainable="model")
    shutil.copytree(builtin_model_path(), tmp_path / "run/model")
    whole = {"model": "run/model", "dataset": "own.csv"}
    check_evaluate(resolve(EvalConfig, {**whole, "split_seed": 3}))
    for check_of, options in (
        (check_evaluate, EvalConfig),
        (check_analyze_prompts, AttentionConfig),
    ):
        with pytest.raises(UserError, match=r"run/model was trained on rows of own\.csv"):
            check_of(resolve(options, whole))


def test_a_run_older_than_an_option_is_known_too(trained, tmp_path):
    adapter = trained(split_seed=3)
    config = tmp_path / "run/config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("delimiter:")))
    with pytest.raises(UserError, match="its run had --split-seed 3"):
        check(evaluation(adapter))


def test_changed_data_are_refused(trained, tmp_path):
    adapter = trained()
    with (tmp_path / "own.csv").open("a") as file:
        file.write("one more,good\n")
    with pytest.raises(UserError, match="has changed since: restore the file, or give --test-file"):
        check(evaluation(adapter))
    check(evaluation(adapter, test_file="other.csv"))


def test_other_prompts_are_said(trained, tmp_path):
    (tmp_path / "t.yaml").write_text('input_prefix: "review: "\n')
    adapter = trained(template="t.yaml", prompt_form="staicc")
    same = {"template": "t.yaml", "prompt_form": "staicc"}
    predicted = {"adapter": adapter, "demonstrations": "own.csv", "input": "other.csv"}
    assert differences(evaluation(adapter, **same)) == []
    assert differences(resolve(PredictConfig, {**predicted, **same})) == []
    assert differences(resolve(EvalConfig, {})) == []
    (line,) = differences(evaluation(adapter, k=2, quantized=True))
    assert line.startswith("adapter run/adapter was trained with --k 4, --prompt-form staicc, ")
    assert line.endswith(f"no --quantized, --template {tmp_path}/t.yaml")
    (line,) = differences(evaluation(adapter, dataset="other.csv"))  # another task, its own words
    assert line.endswith("with --prompt-form staicc")
    (line,) = differences(resolve(PredictConfig, predicted))
    assert line.endswith(f"--prompt-form staicc, --template {tmp_path}/t.yaml")


def check(config):
    check_tested_apart(config, config.adapter_folders[0])
