"""`--stream` in several processes: each has some of the blocks, or a share of the prompts."""

import json
import signal
import subprocess
import time

import pytest

from tests.close import close
from tests.command_line import QUICK, abft_fast, environment, start
from tests.several_processes import TORCHRUN, adapter_error, kill_one, launch, metrics, said

pytestmark = pytest.mark.cli

OPTIONS = [*QUICK, "--gradient", "local", "--pseudo-batch-size", "16", "--stream"]
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
    assert "a pipeline saves no state of the walk" in result.stderr
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


def test_a_killed_process_ends_the_pipeline_which_starts_again(one, tmp_path):
    folder = tmp_path / "run"
    process = begin(TORCHRUN, folder, "--pipeline")
    log = folder / "run.log"
    while not (log.exists() and "attention: " in log.read_text()):  # said on the first block
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    kill_one(process, rank=1)
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert "--pipeline has one process" in result.stderr
    assert (folder / ADAPTER).read_bytes() == (one / ADAPTER).read_bytes()


def test_a_killed_walk_of_three_processes_goes_on_in_three(shared, tmp_path):
    folder = tmp_path / "run"
    process = begin(THREE, folder, "--save-steps", "1")
    saved = [folder / "checkpoints" / "block-000001" / f"state-{rank}" for rank in range(3)]
    while not all(state.is_dir() for state in saved):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    kill_one(process, rank=1)
    trained = folder / "checkpoints" / "block-000001" / "trained.safetensors"
    written = trained.stat().st_mtime_ns
    result = abft_fast("train", "--resume", folder)
    assert result.returncode != 0 and "resume the run with 3 processes" in result.stderr
    assert trained.stat().st_mtime_ns == written
    result = launch(THREE, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (shared / ADAPTER).read_bytes()
    assert figures(folder) == figures(shared)


def test_a_pipeline_does_not_forget_a_walk_that_one_process_saved(tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--pipeline", "--save-steps", "1", "--no-eval"]
    process = start("train", *options, "--output-dir", folder)
    state = folder / "checkpoints" / "block-000001" / "state-0"
    while not state.is_dir():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = launch(TORCHRUN, "-m", "abft_fast", "train", "--resume", folder)
    assert result.returncode != 0
    (line,) = said(result.stderr)
    assert "resume the run without a launcher" in line
    assert list(folder.glob("checkpoints/block-*/state-0"))
