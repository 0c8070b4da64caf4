"""What a user gets wrong is answered in one line, with exit code 2, and writes nothing."""

import shutil

import pytest

from abft_fast import builtin_model_path
from tests.command_line import QUICK, abft_fast

pytestmark = pytest.mark.cli


def last_line(result):
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "imdb"], "dataset 'imdb' is unknown"),
        (["train", "--k", "0"], "--k 0"),
        (["train", "--k", "500"], "longer than the model's context of 2048 tokens"),
        (["train", "--k", "2000"], "k=2000: subj has 1024 training examples"),
        (["train", "--model", "./nowhere"], "model folder ./nowhere does not exist"),
        (["train", "--model", "no/such"], "offline: no/such is not in the local cache"),
        (["train", "--epocs", "1"], "No such option: --epocs"),
        (["tain"], "No such command 'tain'"),
        (["train", "--config", "nowhere.yaml"], "config nowhere.yaml does not exist"),
        (["train", "--resume", "nowhere"], "--resume nowhere: no run there"),
        (["train", "--device", "cuda"], "--device cuda: this machine has no usable GPU"),
        (["train", "--tracker", "wandb"], "--tracker wandb: not installed"),
        (["train", "--seed", "99999999999"], "--seed 99999999999"),
        (["train", "--bits", "5"], "--bits 5: use 4 or 8"),
        (["train", "--quantized", "--trainable", "full"], "drop --quantized, or use lora"),
        (["train", "--token-budget", "0"], "--token-budget 0: use auto or a number of tokens"),
        (["train", "--attention-backend", "varlen"], "attention backend varlen: it runs on a GPU"),
        (["train", "--bits", "8"], "--bits 8 needs --quantized"),
        (["eval", "--adapter", "nowhere"], "adapter nowhere holds no adapter_config.json"),
        (["eval", "--output", "no/where.json"], "folder no does not exist"),
        (["eval", "--test-type", "GLER", "--k", "0"], "--k 0: GLER changes demonstrations"),
        (["eval", "--test-type", "Gler"], "--test-type Gler: input should be 'Normal'"),
        (["eval", "--dataset", "fp", "--k", "513"], "k=513: fp has 512 demonstrations"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_and_nothing_written(arguments, message, tmp_path):
    if "cuda" in arguments or "varlen" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    result = abft_fast(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in last_line(result)
    assert not list(tmp_path.iterdir())


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
    result = abft_fast(
        "train", "--model", snapshot if where == "folder" else "some/model", cwd=here
    )
    assert result.returncode == 2
    assert f"{weights} is damaged, {weights.stat().st_size} bytes" in last_line(result)
    assert last_line(result).endswith("download it again")
    assert not list(here.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for options, message in (
        ([], "is not empty"),
        (["--overwrite"], "holds thesis.tex, which is not of a run"),
    ):
        result = abft_fast("train", *QUICK, "--output-dir", folder, *options)
        assert result.returncode == 2
        assert message in last_line(result)
        assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_a_run(tmp_path):
    folder = tmp_path / "run"
    quick = [*QUICK, "--epochs", 1, "--train-samples", 8, "--no-eval", "--output-dir", folder]
    assert abft_fast("train", *quick).returncode == 0
    (folder / "evaluation.json").write_text("old")
    assert abft_fast("train", *quick).returncode == 2
    assert abft_fast("train", *quick, "--overwrite").returncode == 0
    assert not (folder / "evaluation.json").exists()


def test_resume_takes_no_other_options(tmp_path):
    result = abft_fast("train", "--resume", tmp_path, "--k", "3", cwd=tmp_path)
    assert result.returncode == 2
    assert "leave out --k" in last_line(result)


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
    assert "not finite; lower --lr" in last_line(result)


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
