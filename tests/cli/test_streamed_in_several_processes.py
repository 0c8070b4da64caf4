"""`--stream` in several processes: each has some of the blocks, or a share of the prompts."""

import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from abft_fast.builtin import builtin_model_path
from tests.close import close
from tests.command_line import FEW_QUERIES, QUICK, abft_fast, environment, start
from tests.several_processes import TORCHRUN, adapter_error, kill_one, launch, metrics, said

pytestmark = pytest.mark.cli

OPTIONS = [*QUICK, *FEW_QUERIES, "--gradient", "local", "--pseudo-batch-size", "16", "--stream"]
OPTIONS += ["--train-samples", "33"]  # the last pseudo-batch has 2 prompts
ADAPTER = "adapter/adapter_model.safetensors"
THREE, FOUR = ([count if part == "2" else part for part in TORCHRUN] for count in "34")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    result = abft_fast("train", *OPTIONS, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run of three processes that share the prompts."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    result = launch(THREE, "-m", "abft_fast", "train", *OPTIONS, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


def begin(launcher, folder, *more):
    """Start a launched run."""
    return subprocess.Popen(
        [*launcher, "-m", "abft_fast", "train", *OPTIONS, *more, "--output-dir", folder],
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", **environment()},
    )


def figures(folder):
    names = ("evaluation.json", "attention.json")
    return [*metrics(folder), *(json.loads((folder / name).read_text()) for name in names)]


def test_a_pipeline_writes_the_bytes_of_one_process(one, tmp_path):
    """Four blocks: of three processes one has two."""
    folder = tmp_path / "run"
    command = ["-m", "abft_fast", "train", *OPTIONS, "--pipeline", "--output-dir", folder]
    result = launch(THREE, *command)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (one / ADAPTER).read_bytes()
    assert figures(folder) == figures(one)
    base = "adapter/base.json"
    assert json.loads((folder / base).read_text()) == json.loads((one / base).read_text())
    assert not list((folder / "checkpoints").iterdir())


def test_w_q_and_w_k_themselves_are_trained_in_a_pipeline(tmp_path):
    options = [*OPTIONS, "--trainable", "full", "--lr", "1e-3", "--no-eval", "--output-dir"]
    expected, folder = tmp_path / "one", tmp_path / "two"
    assert abft_fast("train", *options, expected).returncode == 0
    result = launch(TORCHRUN, "-m", "abft_fast", "train", "--pipeline", *options, folder)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes()


def test_two_pipelines_write_the_bytes_of_two_processes_that_share_the_prompts(tmp_path):
    """Of the last step's one prompt the second process, or pipeline, has none."""
    command = ["-m", "abft_fast", "train", *OPTIONS, "--train-samples", "17", "--epochs", "1"]
    shared, folder = tmp_path / "shared", tmp_path / "pipelines"
    result = launch(TORCHRUN, *command, "--output-dir", shared)
    assert result.returncode == 0, result.stderr
    command += ["--pipeline", "--pipeline-size", "2"]
    result = launch(FOUR, *command, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    assert len(metrics(folder)) == 2
    assert (folder / ADAPTER).read_bytes() == (shared / ADAPTER).read_bytes()
    assert figures(folder) == figures(shared)


def test_three_processes_share_the_prompts(one, shared, tmp_path):
    """Of the last step's two prompts one process has none."""
    folder, output = shared, tmp_path / "out.json"
    assert adapter_error(folder, one) <= 1e-5
    for found, expected in zip(figures(folder), figures(one), strict=True):
        assert found == close(expected, rel=1e-5)
    result = launch(
        TORCHRUN, "-m", "abft_fast", "eval", "--dataset", "trec", "--k", "2", "--device", "cpu",
        "--stream", "--adapter", folder / "adapter", "--output", output, "--token-budget", 400,
        *FEW_QUERIES,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = json.loads((folder / "evaluation.json").read_text())["after"]["trec"]
    assert json.loads(output.read_text())["trec"] == close(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lr", "1e30", "--no-eval"], "not finite"),
        (["--stream-states", "disk"], "--stream-states disk"),
        (["--pipeline-size", "3"], "2 processes do not form pipelines of 3"),
    ],
    ids=["in-the-walk", "disk", "size"],
)
def test_one_process_says_what_is_wrong(more, words, tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--pipeline", *more, "--output-dir", folder]
    result = launch(TORCHRUN, "-m", "abft_fast", "train", *options)
    assert result.returncode != 0
    (line,) = said(result.stderr)
    assert words in line


def test_a_mistake_found_in_a_pipeline_leaves_no_folder(tmp_path):
    """Weights of the first block that are not finite: the main process finds them."""
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(builtin_model_path(), model)
    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    tensors[min(n for n in tensors if n.endswith("input_layernorm.weight"))][0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    options = [*OPTIONS, "--pipeline", "--no-eval", "--model", model, "--output-dir", folder]
    result = launch(TORCHRUN, "-m", "abft_fast", "train", *options)
    assert result.returncode != 0
    (line,) = said(result.stderr)
    assert "not finite" in line
    assert not folder.exists()


def wait_for(process, *paths):
    while not all(path.exists() for path in paths):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)


def test_a_pipeline_that_is_killed_before_its_first_state_starts_again(one, tmp_path):
    folder = tmp_path / "run"
    process = begin(TORCHRUN, folder, "--pipeline")
    log = folder / "run.log"
    wait_for(process, log)
    while "attention: " not in log.read_text():  # said on the first block
        time.sleep(0.002)
    kill_one(process, rank=1)
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert "--pipeline has one process" in result.stderr
    assert (folder / ADAPTER).read_bytes() == (one / ADAPTER).read_bytes()


def test_a_killed_pipeline_goes_on_from_the_step_that_all_have_saved(one, tmp_path):
    folder = tmp_path / "run"
    process = begin(THREE, folder, "--pipeline", "--save-steps", "2")
    states = [folder / "checkpoints" / "step-000002" / f"state-{rank}" for rank in range(3)]
    wait_for(process, *states)
    facts = [json.loads((state / "state.json").read_text()) for state in states]
    kill_one(process, rank=1)
    result = abft_fast("train", "--resume", folder)
    assert result.returncode != 0 and "resume the run with 3 processes" in result.stderr
    result = launch(THREE, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (one / ADAPTER).read_bytes()
    assert figures(folder) == figures(one)
    assert not list((folder / "checkpoints").iterdir())
    # The first two steps were not taken again: their seconds are those that were saved.
    of_blocks = [known["stages"][3]["between"].values() for known in facts]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for step, row in enumerate(map(json.loads, lines[:2])):
        seconds = [sum(b["rows"][step]["seconds"] for b in blocks) for blocks in of_blocks]
        assert row["seconds"] == max(seconds)


def test_two_killed_pipelines_go_on(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    more = ["--pipeline", "--pipeline-size", "2", "--save-steps", "1", "--trainable", "full"]
    command = ["-m", "abft_fast", "train", *OPTIONS, *more, "--lr", "1e-3", "--output-dir"]
    result = launch(FOUR, *command, whole)
    assert result.returncode == 0, result.stderr
    process = begin(FOUR, folder, *more, "--lr", "1e-3")
    wait_for(process, *(folder / "checkpoints/step-000001" / f"state-{r}" for r in range(4)))
    kill_one(process, rank=3)
    result = launch(FOUR, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert figures(folder) == figures(whole)


def test_a_damaged_state_of_a_pipeline_is_named(tmp_path):
    folder = tmp_path / "run"
    process = begin(TORCHRUN, folder, "--pipeline", "--save-steps", "1", "--no-eval")
    states = [folder / "checkpoints" / "step-000001" / f"state-{rank}" for rank in range(2)]
    wait_for(process, *states)
    kill_one(process, rank=1)
    steps = [state.parent for state in folder.glob("checkpoints/step-*/state-1")]
    newest = max(step for step in steps if (step / "state-0").exists())
    (newest / "state-1" / "state.safetensors").write_bytes(b"no tensors")
    result = launch(TORCHRUN, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode != 0
    assert f"{newest.name}/state-1 cannot be read" in result.stderr


def test_a_killed_walk_of_three_processes_goes_on_in_three(shared, tmp_path):
    folder = tmp_path / "run"
    process = begin(THREE, folder, "--save-steps", "1")
    block = folder / "checkpoints" / "block-000001"
    wait_for(process, *(block / f"state-{rank}" for rank in range(3)))
    kill_one(process, rank=1)
    written = (block / "trained.safetensors").stat().st_mtime_ns
    result = abft_fast("train", "--resume", folder)
    assert result.returncode != 0 and "resume the run with 3 processes" in result.stderr
    assert (block / "trained.safetensors").stat().st_mtime_ns == written
    result = launch(THREE, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (shared / ADAPTER).read_bytes()
    assert figures(folder) == figures(shared)


def test_a_pipeline_does_not_forget_a_walk_that_one_process_saved(tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--pipeline", "--save-steps", "1", "--no-eval"]
    process = start("train", *options, "--output-dir", folder)
    wait_for(process, folder / "checkpoints" / "block-000001" / "state-0")
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = launch(TORCHRUN, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode != 0
    (line,) = said(result.stderr)
    assert "resume the run with one process" in line
    assert list(folder.glob("checkpoints/block-*/state-0"))
