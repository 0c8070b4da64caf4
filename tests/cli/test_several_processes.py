"""Two processes, started by torchrun, end where one does."""

import json
import sys

import pytest
import torch

from tests.close import close
from tests.command_line import FEW_QUERIES, QUICK, abft_fast
from tests.several_processes import (
    LONG,
    SMALL,
    TORCHRUN,
    adapter_error,
    launch,
    metrics,
    said,
    train_in_float64,
)

pytestmark = pytest.mark.cli

CALIBRATION = ["--calibration", "contextual", "--calibration-samples", 16]
OPTIONS = [*QUICK, *FEW_QUERIES, *CALIBRATION, "--lr", "1e-3"]
OPTIONS += ["--train-samples", 33]  # the last pseudo-batch has 2 prompts


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    result = abft_fast("train", *OPTIONS, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Without a name, as that has the time in it."""
    cwd = tmp_path_factory.mktemp("two")
    result = launch(TORCHRUN, "-m", "abft_fast", "train", *OPTIONS, cwd=cwd)
    assert result.returncode == 0, result.stderr
    (folder,) = (cwd / "runs").iterdir()
    return folder, result


def test_the_result_is_that_of_one_process(one, two):
    assert adapter_error(two[0], one[0]) <= 1e-5
    ours, theirs = metrics(two[0]), metrics(one[0])
    assert len(ours) == len(theirs) == 3
    for row, expected in zip(ours, theirs, strict=True):
        assert row == close(expected, rel=1e-5)
    for name in ("evaluation.json", "attention.json"):
        found, expected = (json.loads((f / name).read_text()) for f in (two[0], one[0]))
        for when in ("before", "after"):
            assert found[when]["trec"] == close(expected[when]["trec"], rel=1e-5), name


def test_one_process_writes_and_speaks(one, two):
    names = [{p.name for p in folder.iterdir()} for folder, _ in (one, two)]
    assert names[0] == names[1]
    assert json.loads((two[0] / "environment.json").read_text())["processes"] == 2
    log = (two[0] / "run.log").read_text().splitlines()
    assert log.count("loading builtin") == two[1].stderr.count("loading builtin") == 1
    assert two[1].stdout.count("trained adapter:") == 1
    assert "warn" not in two[1].stderr.lower(), two[1].stderr


def test_eval_of_two_processes(two, tmp_path):
    output = tmp_path / "metrics.json"
    result = launch(
        TORCHRUN, "-m", "abft_fast", "eval", "--dataset", "trec", "--k", 2, "--device", "cpu",
        "--adapter", two[0] / "adapter", "--output", output, *FEW_QUERIES, *CALIBRATION,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("accuracy (%)") == 1
    expected = json.loads((two[0] / "evaluation.json").read_text())["after"]
    assert json.loads(output.read_text()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imdb"], "dataset 'imdb' is unknown"),
        (["--device-map", "auto"], "2 processes were launched: start the run without a launcher"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_once(arguments, message, tmp_path):
    result = launch(
        TORCHRUN, "-m", "abft_fast", "train", "--device", "cpu", *arguments, cwd=tmp_path
    )
    assert result.returncode != 0
    (line,) = said(result.stderr)
    assert message in line
    assert "exitcode  : 2" in result.stderr  # the others may have been ended while they started
    assert not list(tmp_path.iterdir())


def test_all_processes_must_read_the_same_data(tmp_path):
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        rows = [f"text {rank} {i},{'ab'[i % 2]}\n" for i in range(20)]
        (folder / "own.csv").write_text("text,label\n" + "".join(rows))
    code = "import os; os.chdir(os.environ['RANK']); from abft_fast.cli import main; main()"
    (tmp_path / "apart.py").write_text(code)
    options = ["train", "--dataset", "own.csv", "--device", "cpu"]
    result = launch(TORCHRUN, "apart.py", *options, cwd=tmp_path)
    assert said(result.stderr) == [
        "abft-fast: not every process reads the same own.csv: give all of them the same file"
    ]
    assert not list(tmp_path.glob("*/runs"))


def test_a_process_that_fails_alone_says_why(tmp_path):
    """Before the processes have found each other, as on a machine that lacks the file."""
    for rank, content in enumerate(("text,label\n" + "good,yes\nbad,no\n" * 10, None)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        if content is not None:
            (folder / "own.csv").write_text(content)
    code = "import os; os.chdir(os.environ['RANK']); from abft_fast.cli import main; main()"
    (tmp_path / "apart.py").write_text(code)
    options = ["train", "--dataset", "own.csv", "--device", "cpu"]
    result = launch(TORCHRUN, "apart.py", *options, cwd=tmp_path)
    assert result.returncode != 0
    (line,) = [line for line in said(result.stderr) if "own.csv" in line]
    assert line.startswith("abft-fast: process 1: own.csv cannot be read")


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    result = launch(TORCHRUN, "-m", "tests.several_processes", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "timeouts.json").read_text() == json.dumps([7 * 24 * 3600.0] * 2)
    return folder


def assert_same_but_for_rounding(found, expected, rows, expected_rows):
    for name, parameter in expected.items():
        assert (found[name] - parameter).norm() <= 1e-9 * parameter.norm(), name
    for row, same in zip(rows, expected_rows, strict=True):
        assert row == close(same, rel=1e-6)  # losses are added up in float32


@pytest.mark.parametrize("gradient", ["full", "local", "2"])
def test_nothing_but_rounding_differs(gradient, worker, tmp_path):
    """In float64, as Adam enlarges the rounding of gradients near 0."""
    expected = train_in_float64(tmp_path / "one", **SMALL, gradient=gradient)
    rows = metrics(tmp_path / "one")
    assert len(rows) == 5
    found = torch.load(worker / f"{gradient}.pt")
    assert_same_but_for_rounding(found, expected, metrics(worker / gradient), rows)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_one_process_may_run_out_of_memory(worker, tmp_path):
    """For real, in the second process, which goes on with smaller batches."""
    expected = train_in_float64(tmp_path / "one", **LONG)
    found = torch.load(worker / "memory.pt")
    rows = metrics(tmp_path / "one")
    assert_same_but_for_rounding(found, expected, metrics(worker / "memory"), rows)
    budget = json.loads((worker / "memory" / "token_budget.json").read_text())["tokens"]
    line = f"out of memory on another process: going on with {budget} tokens a batch"
    assert line in (worker / "memory" / "run.log").read_text()


def test_an_error_of_one_process_is_everyones(worker):
    errors = json.loads((worker / "errors.json").read_text())
    assert errors == ["UserError('only here')", "SaidByMain(2)"]
