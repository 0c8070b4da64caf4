"""One of two processes killed with SIGKILL: the run ends, says so, and goes on in any number."""

import signal
import subprocess
import time

import psutil
import pytest

from tests.command_line import QUICK, abft_fast, environment, start
from tests.several_processes import ACCELERATE, TORCHRUN, adapter_error, metrics, said

pytestmark = pytest.mark.kill

OPTIONS = [
    *QUICK, "--train-samples", "24", "--epochs", "4", "--pseudo-batch-size", "8",
    "--save-steps", "1", "--no-eval", "--lr", "1e-3",
]  # fmt: skip


def wait_for_steps(process, folder, steps):
    path = folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)


def kill_one_of_two(launcher, rank, steps, folder, *arguments):
    """Kill a process of a run once it has taken some steps; what the run's end looks like."""
    process = subprocess.Popen(
        [*launcher, "-m", "abft_fast", "train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", **environment()},
    )
    wait_for_steps(process, folder, steps)
    (victim,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    )
    victim.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    (line,) = said(stderr)
    assert "another process of this run ended" in line
    assert "abft-fast train --resume RUN" in line


def test_a_killed_process_ends_the_run_which_goes_on_in_any_number(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    result = abft_fast("train", *OPTIONS, "--output-dir", whole)
    assert result.returncode == 0, result.stderr

    kill_one_of_two(TORCHRUN, 1, 2, folder, *OPTIONS, "--output-dir", folder)
    alone = start("train", "--resume", folder)
    wait_for_steps(alone, folder, 5)
    alone.kill()
    alone.wait()
    kill_one_of_two(ACCELERATE, 0, 8, folder, "--resume", folder)
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr

    assert adapter_error(folder, whole) <= 1e-5
    ours, theirs = metrics(folder), metrics(whole)
    assert len(ours) == len(theirs) == 12
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
