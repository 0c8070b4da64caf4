"""Runs killed with SIGKILL and resumed end in the very bytes of a run left alone."""

import random
import shutil
import time

import pytest

from tests.command_line import QUICK, abft_fast, start

pytestmark = pytest.mark.kill

OPTIONS = [
    *QUICK, "--train-samples", "24", "--epochs", "4", "--pseudo-batch-size", "8",
    "--save-steps", "1", "--no-eval",
]  # fmt: skip
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "whole"
    result = abft_fast("train", *OPTIONS, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


def steps_taken(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_when(process, condition):
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    process.kill()
    process.wait()
    return True


def same_result(folder, uninterrupted):
    assert (folder / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()
    assert steps_taken(folder) == steps_taken(uninterrupted) == 12


def test_two_runs_are_bitwise_equal(uninterrupted, tmp_path):
    result = abft_fast("train", *OPTIONS, "--output-dir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    same_result(tmp_path / "again", uninterrupted)


def test_killed_at_random_moments(uninterrupted, tmp_path):
    generator = random.Random(1)
    folder = tmp_path / "run"
    process = start("train", *OPTIONS, "--output-dir", folder)
    for _ in range(2):
        target = steps_taken(folder) + generator.randint(1, 5)
        pause = generator.uniform(0, 0.5)
        if not kill_when(process, lambda target=target: steps_taken(folder) >= target):
            break
        time.sleep(pause)
        process = start("train", "--resume", folder)
    process.wait(timeout=300)
    assert process.returncode == 0
    same_result(folder, uninterrupted)


def test_killed_during_a_save(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start("train", *OPTIONS, "--output-dir", folder)
    checkpoints = folder / "checkpoints"

    def saving():
        return steps_taken(folder) >= 3 and any(checkpoints.glob(".step-*.tmp/*"))

    assert kill_when(process, saving), "the run ended before a save was caught"
    assert list(checkpoints.glob(".step-*.tmp"))
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    same_result(folder, uninterrupted)


def test_killed_before_the_first_checkpoint(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start("train", *OPTIONS, "--output-dir", folder)
    assert kill_when(process, (folder / "config.yaml").exists)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    same_result(folder, uninterrupted)
