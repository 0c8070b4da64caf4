"""What a user gets wrong, where bad_inputs.py does not do: hubs, GPUs, runs that go on."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from abft_fast import builtin_model_path
from tests.command_line import QUICK, abft_fast, abft_fast_afresh

pytestmark = pytest.mark.cli


def last_line(result):
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "--device cuda: this machine has no usable GPU"),
        (["--attention-backend", "varlen"], "attention backend varlen: it runs on a GPU"),
    ],
    ids=["device", "attention"],
)
def test_what_needs_a_gpu(options, message, tmp_path):
    result = abft_fast("train", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert message in last_line(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_missing_gpu_is_said_before_what_is_slow_to_import(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    result = abft_fast_afresh(command, "--device", "cuda", cwd=tmp_path)
    assert result.returncode == 2
    imported = {line.rpartition("| ")[2].strip() for line in result.stderr.splitlines()}
    assert "torch" in imported
    assert not imported & {"transformers", "accelerate", "bitsandbytes", "peft"}


def test_the_hub_does_not_count_its_retries():
    """Its own logger takes its level from the environment when it is imported."""
    code = (
        "from abft_fast.cli import app; app._quiet(); from huggingface_hub.utils import logging;"
        "assert logging.get_verbosity() == logging.ERROR"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_VERBOSITY"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_damaged_model_is_named_and_nothing_written(where, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--some--model/snapshots/0123"
    shutil.copytree(builtin_model_path(), snapshot)
    refs = tmp_path / "hub/models--some--model/refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    here = tmp_path / "here"
    here.mkdir()
    result = abft_fast_afresh(
        "train", "--model", snapshot if where == "folder" else "some/model", cwd=here
    )
    assert result.returncode == 2
    assert f"{weights} is damaged, {weights.stat().st_size} bytes" in last_line(result)
    assert last_line(result).endswith("download it again")
    assert not list(here.iterdir())


def test_overwrite_replaces_a_run(tmp_path):
    folder = tmp_path / "run"
    quick = [*QUICK, "--epochs", 1, "--train-samples", 8, "--no-eval", "--output-dir", folder]
    assert abft_fast("train", *quick).returncode == 0
    (folder / "evaluation.json").write_text("old")
    assert abft_fast("train", *quick).returncode == 2
    assert abft_fast("train", *quick, "--overwrite").returncode == 0
    assert not (folder / "evaluation.json").exists()


def test_debug_shows_the_traceback(tmp_path):
    result = abft_fast("train", "--model", "./nowhere", "--debug", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_divergence_ends_the_run_with_exit_code_1(tmp_path):
    result = abft_fast(
        "train", *QUICK, "--trainable", "full", "--lr", "1e20", "--no-eval",
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 1
    assert "not finite: lower --lr" in last_line(result)


def test_a_disk_that_takes_no_more(tmp_path):
    """Files may not pass 200 kB, so the first checkpoint fails; the run goes on afterwards."""
    folder = tmp_path / "run"
    options = [*QUICK, "--train-samples", 8, "--epochs", 1, "--no-eval", "--output-dir", folder]
    result = abft_fast("train", *options, largest_file=200_000)
    assert result.returncode == 1
    assert "File too large" in last_line(result)
    assert not list((folder / "checkpoints").glob("step-*"))
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_help_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['abft-fast', 'train', '--dataset', 'x']\n"
        "from abft_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_doctor():
    result = abft_fast("doctor")
    assert result.returncode == 0, result.stderr
    for expected in ("torch", "transformers", "StaICC", "attention", "data subj", "as pinned"):
        assert expected in result.stdout
