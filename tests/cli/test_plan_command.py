"""`abft-fast plan`, and what `train` makes of it."""

import pytest
import torch

from tests.command_line import abft_fast

pytestmark = pytest.mark.cli


def test_a_plan_needs_no_weights_and_no_network():
    result = abft_fast(
        "plan", "--model", "Qwen/Qwen2.5-32B", "--quantized", "--gpu-memory", "24", "--k", "4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for part in (
        "quantized weights", "16.099", "trained: 16,777,216 parameters", "--gradient local",
        "evaluation", "most demonstrations", "23.0 GB are available",
        "--gradient full: does not fit: try --gradient full --checkpointing",
    ):  # fmt: skip
        assert part in result.stdout, part


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "own"),
        (["--training-datasets", "own.csv,more.csv"], "own.csv, more.csv"),
        (["--stream", "--gradient", "local"], "own"),
    ],
    ids=["one file", "two files", "streamed"],
)
def test_words_that_are_single_tokens_in_the_models_own_tokenizer(tmp_path, more, said):
    """A known shape is planned with the built-in tokenizer, which has fewer words."""
    rows = "".join(f"text {i},{'spam' if i % 2 else 'refund'}\n" for i in range(40))
    for name in ("own.csv", "more.csv"):
        (tmp_path / name).write_text("text,label\n" + rows.replace("text", name[:3]))
    result = abft_fast(
        "plan", "--model", "synthetic:qwen2.5-0.5b", "--gpu-memory", "24", "--dataset", "own.csv",
        *more, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"training prompts of {said}, k=4" in result.stdout


def test_a_gpu_that_is_not_there_is_not_planned_for():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = abft_fast("plan", "--device", "cuda")
    assert result.returncode == 2 and "--device cuda: this machine has no" in result.stderr


def test_train_says_its_plan_and_refuses_what_cannot_fit(tmp_path):
    folder = tmp_path / "run"
    result = abft_fast(
        "train", "--model", "synthetic:llama3.1-405b", "--device", "cpu", "--output-dir", folder
    )
    assert result.returncode == 2
    data, counts, plan, error = result.stderr.strip().splitlines()
    assert data == "data: subj of StaICC"
    assert counts == "on cpu: 512 prompts to train on, 1,024 to test on"
    assert plan.startswith("plan: weights and optimizer 2046")
    assert error.startswith(
        "abft-fast: synthetic:llama3.1-405b with --gradient full does not fit in"
    )
    assert error.endswith("or pass --force")
    assert not folder.exists()


def test_a_streamed_plan_prints_memory_and_seconds():
    result = abft_fast(
        "plan", "--stream", "--gradient", "local", "--model", "Qwen/Qwen2.5-0.5B", "--quantized",
        "--gpu-memory", "8", "--train-samples", "16", "--no-eval", "--disk-bandwidth", "0.1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for part in ("LoRA of all layers", "host: hidden states", "read from the weights' files",
                 "--stream --gradient local: fits"):  # fmt: skip
        assert part in result.stdout, part
    read = next(line for line in result.stdout.splitlines() if "read from" in line)
    amount, seconds = read.split("\u2502")[2:4]
    assert float(seconds) == pytest.approx(float(amount.split()[0]) / 0.1, rel=0.02)
