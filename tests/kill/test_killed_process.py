"""One of two processes killed with SIGKILL: the run ends, says so, and goes on in any number."""

import signal
import subprocess
import sys
import time

import pytest

from tests.command_line import QUICK, abft_fast, environment
from tests.several_processes import ACCELERATE, TORCHRUN, adapter_error, kill_one, metrics, said

pytestmark = pytest.mark.kill

OPTIONS = [
    *QUICK, "--train-samples", "24", "--epochs", "4", "--pseudo-batch-size", "8",
    "--save-steps", "1", "--no-eval", "--lr", "1e-3",
]  # fmt: skip

# A background process of a shell would ignore them.
HEEDS_INTERRUPTS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from abft_fast.cli.app import main
main()
"""


def wait_for_steps(process, folder, steps):
    path = folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)


def interrupt_at_step(step, folder):
    """Ctrl-C on a run of one process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDS_INTERRUPTS, "train", "--resume", folder],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    wait_for_steps(process, folder, step)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = said(stderr)
    assert line.endswith(f"interrupted; continue with `abft-fast train --resume {folder}`")


def kill_one_of_two(launcher, rank, steps, folder, *arguments):
    """Kill a process of a run once it has taken some steps; what the run's end looks like."""
    process = subprocess.Popen(
        [*launcher, "-m", "abft_fast", "train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", **environment()},
    )
    wait_for_steps(process, folder, steps)
    kill_one(process, rank)


def test_a_killed_process_ends_the_run_which_goes_on_in_any_number(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    result = abft_fast("train", *OPTIONS, "--output-dir", whole)
    assert result.returncode == 0, result.stderr

    kill_one_of_two(TORCHRUN, 1, 2, folder, *OPTIONS, "--output-dir", folder)
    interrupt_at_step(5, folder)
    kill_one_of_two(ACCELERATE, 0, 8, folder, "--resume", folder)
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr

    assert adapter_error(folder, whole) <= 1e-5
    ours, theirs = metrics(folder), metrics(whole)
    assert len(ours) == len(theirs) == 12
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
