"""A real sweep, ended in the middle by SIGTERM and by SIGKILL, continued each time."""

import csv
import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.command_line import COMMAND, abft_fast, environment

pytestmark = pytest.mark.cli

SWEEP = """
options:
  dataset: trec
  k: 2
  train_samples: 24
  epochs: 4
  pseudo_batch_size: 8
  save_steps: 1
  no_eval: true
  device: cpu
grid:
  method:
    - vanilla: {method: vanilla, k: 0, test_type: [[Normal, UnseenLabel]], test_samples: 64}
    - ABFT
settings:
  w/o PID: {adaptation: none}
"""
STEPS = 12


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SWEEP)
    return path


def end_once_there_are(steps, ended_by, file, folder):
    """Start the sweep and end it in the middle of training; its exit code, stderr, and the rows."""
    process = subprocess.Popen(
        [COMMAND, "sweep", file, "--output-dir", folder],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while len(rows(folder)) < steps:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(ended_by)
    _, stderr = process.communicate(timeout=60)
    child.wait(timeout=10)  # it has not outlived the sweep
    kept = rows(folder)
    assert steps <= len(kept) < STEPS
    return process.returncode, stderr.splitlines(), kept


def rows(folder):
    lines = [x for p in folder.glob("cells/*ABFT*/run/metrics.jsonl") for x in p.open()]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_goes_on_where_it_was_ended(file, tmp_path):
    folder = tmp_path / "sweep"
    code, said, first = end_once_there_are(2, signal.SIGTERM, file, folder)
    assert code == 130
    assert said[-1].startswith("abft-fast: interrupted, and the cells were ended; continue with")
    assert said[-1].endswith(f": abft-fast sweep {file} --output-dir {folder}")
    (vanilla,) = folder.glob("cells/builtin-trec-vanilla-*/metrics.json")
    evaluated = vanilla.stat().st_mtime_ns
    assert [row["status"] for row in results(folder)] == ["waiting", "finished", "finished"]

    code, _, second = end_once_there_are(5, signal.SIGKILL, file, folder)
    assert code == -signal.SIGKILL
    saved = len(first) - 1  # the step that was under way is taken again
    assert second[:saved] == first[:saved]  # with their seconds, so none of them was

    result = abft_fast("sweep", file, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    assert f"{folder}: 1 of 2 cells are finished" in result.stderr
    whole = rows(folder)
    assert len(whole) == STEPS and whole[: len(second) - 1] == second[:-1]
    assert vanilla.stat().st_mtime_ns == evaluated

    trained, untrained, unseen = results(folder)
    assert (trained["status"], trained["setting_name"]) == ("finished", "w/o PID")
    assert float(trained["training_seconds"]) == pytest.approx(sum(r["seconds"] for r in whole))
    assert int(trained["peak_memory_bytes"]) == max(r["peak_memory_bytes"] for r in whole)
    assert (untrained["test_type"], unseen["test_type"]) == ("Normal", "UnseenLabel")
    accuracy = json.loads(vanilla.read_text())["Normal"]["trec"]["accuracy"]
    assert (untrained["method"], untrained["evaluated_on"]) == ("vanilla", "trec")
    assert (untrained["seed"], float(untrained["accuracy"])) == ("", accuracy)
    table = abft_fast("table", folder)
    line = f"| builtin | Vanilla (test_type=Normal) | 1 | {100 * accuracy:.2f} |"
    assert line in table.stdout


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_cells_at_once_of_which_one_fails(engine, file, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    options = ["--engine", engine, "--jobs", 2, "--output-dir", tmp_path / "sweep"]
    changes = ["--set", "method=ABFT", "--set", "k=[2, 500]", "--set", "epochs=1"]
    result = abft_fast("sweep", file, *options, *changes)
    assert result.returncode == 1
    assert "1 of 2 cells failed" in result.stderr and "k=500: trec: a prompt of" in result.stderr
    found = {row["k"]: (row["status"], row["error"][:20]) for row in results(tmp_path / "sweep")}
    assert found == {"2": ("finished", ""), "500": ("failed", "trec: a prompt of 10")}


def test_planning_a_sweep_and_making_a_table_need_no_torch(file, tmp_path):
    code = """
import sys
from abft_fast.cli.app import main
for arguments in (["sweep", sys.argv[1], "--dry-run"], ["table", sys.argv[2]]):
    sys.argv = ["abft-fast", *arguments]
    try: main()
    except SystemExit as error: print(error.code)
assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code, file, tmp_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "trec ABFT w/o PID  builtin-trec-ABFT-seed0-" in result.stdout
    assert "holds no run" in result.stderr


def test_two_sweeps_in_one_folder(file, tmp_path):
    import fcntl

    folder = tmp_path / "sweep"
    folder.mkdir()
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = abft_fast("sweep", file, "--output-dir", folder)
    assert result.returncode == 2 and "another sweep runs in" in result.stderr
