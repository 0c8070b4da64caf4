"""Training on a file of the user's, as the guide has it."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command_line import abft_fast

pytestmark = pytest.mark.cli

PAGE = (Path(__file__).parents[2] / "docs/guides/own-data.md").read_text(encoding="utf-8")
FEW = ["--train-samples", 8, "--epochs", 1, "--k", 2, "--device", "cpu"]


def write_reviews(path, header="text,label"):
    praise = ["a warm and funny film", "a great cast", "moving, bright and clever"]
    blame = ["a dull mess", "slow and empty", "a poor script, badly told"]
    rows = random.Random(0)
    with path.open("w") as file:
        file.write(header + "\n")
        for i in range(40):
            label = rows.randrange(2)
            file.write(f'"{rows.choice(praise if label else blame)}, part {i}",{label}\n')


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The guide's two commands, with little to train on; their folder and results."""
    commands, template, *_ = re.findall(r"```(?:bash|yaml)\n(.*?)```", PAGE, re.DOTALL)
    folder = tmp_path_factory.mktemp("own")
    write_reviews(folder / "reviews.csv")
    (folder / "reviews.yaml").write_text(template)
    train, evaluate = (shlex.split(line)[1:] for line in commands.splitlines())
    trained = abft_fast(*train, *FEW, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    evaluated = abft_fast(*evaluate, "--k", 2, "--output", "after.json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    return folder, trained, evaluated


def test_train_and_eval_test_on_the_same_split(example):
    folder, _, evaluated = example
    expected = json.loads((folder / "mine/evaluation.json").read_text())["after"]
    assert set(expected) == {"reviews"}
    assert json.loads((folder / "after.json").read_text()) == expected
    assert "was trained with" not in evaluated.stderr
    assert (folder / "mine/adapter/adapter_model.safetensors").is_file()


def test_the_table_before_a_run(example):
    folder, trained, evaluated = example
    log = (folder / "mine/run.log").read_text()
    assert log.startswith("data: reviews.csv; to test on: 0.2 of each label's rows")
    assert log.index("longest prompt") < log.index("plan:") < log.index("loading builtin")
    rows = [re.findall(r"[\w]+", line) for line in log.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows[:2]] == [["0", "negative"], ["1", "positive"]]
    assert rows[2][0] == "together" and int(rows[2][1]) + int(rows[2][2]) == 40
    assert int(rows[0][3]) + int(rows[1][3]) == int(rows[2][1])
    for result in (trained, evaluated):
        assert "texts both to train and to test on: 0\n" in result.stderr
        assert re.search(r"longest prompt: \d+ of the model's 2048 tokens", result.stderr)


def test_a_run_is_not_resumed_on_changed_data(example, tmp_path):
    folder, _, _ = example
    options = yaml.safe_load((folder / "mine/config.yaml").read_text())
    assert options["dataset"] == str(folder / "reviews.csv")
    before = (folder / "reviews.csv").read_text()
    with (folder / "reviews.csv").open("a") as file:
        file.write("another,1\n")
    result = abft_fast("train", "--resume", folder / "mine", cwd=tmp_path)
    (folder / "reviews.csv").write_text(before)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "reviews.csv has changed since run" in line and "SHA-256 differs" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split-seed", 1], "its run had --split-seed 0; give the same, or other rows"),
        (["--output", "reviews.csv"], "--output reviews.csv is a file that the command reads"),
    ],
)
def test_eval_refuses_to_spoil_results_or_data(example, options, message):
    folder, _, _ = example
    before = (folder / "reviews.csv").read_bytes()
    given = ["--dataset", "reviews.csv", "--template", "reviews.yaml", "--adapter", "mine/adapter"]
    result = abft_fast("eval", *given, *options, cwd=folder)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert (folder / "reviews.csv").read_bytes() == before


def test_plan_shows_the_table_and_writes_nothing(example, tmp_path):
    folder, _, _ = example
    result = abft_fast("plan", "--config", folder / "mine/config.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "together" in result.stderr and "texts with two labels: 0" in result.stderr
    assert "training prompts of reviews, k=2" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "eval", "plan"])
def test_a_mistake_is_said_before_torch_is_imported(verb, tmp_path):
    write_reviews(tmp_path / "reviews.csv", header="text,lable")
    code = (
        f"import sys; sys.argv = ['abft-fast', {verb!r}, '--dataset', 'reviews.csv']\n"
        "from abft_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 2\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "abft-fast: reviews.csv, row 1: there is no column 'label'; the columns are 'text', "
        "'lable'; did you mean 'lable'?\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["reviews.csv"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("very good", "very bad"), [], "use other words by --template or another model"),
        (("good", "bad"), ["--split-seed", "x"], "--split-seed x"),
    ],
    ids=["words of several tokens", "seed"],
)
def test_what_the_model_and_the_options_do_not_allow(labels, options, message, tmp_path):
    rows = "".join(f"text {i},{labels[i % 2]}\n" for i in range(40))
    (tmp_path / "own.csv").write_text("text,label\n" + rows)
    result = abft_fast("train", "--dataset", "own.csv", *options, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["own.csv"]
