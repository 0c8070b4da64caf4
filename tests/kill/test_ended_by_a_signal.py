"""A command that a signal ends leaves nothing half written, and says how to go on."""

import signal
import subprocess
import time

import pytest

from abft_fast.errors import UserError
from abft_fast.runtime.lock import check_free
from tests.command_line import COMMAND, QUICK, environment

pytestmark = pytest.mark.kill

both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])


def end_when(condition, number, *arguments, cwd):
    """Start a command, send it a signal, and return its exit code and last line."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment(),
        cwd=cwd,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509 - under nohup
    )  # fmt: skip
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return process.returncode, stderr.splitlines()[-1]


def is_held(folder):
    try:
        check_free(folder, "held")
    except UserError:
        return True
    return False


@both_signals
def test_predict_leaves_no_temporary_file(number, tmp_path):
    (tmp_path / "demos.csv").write_text("text,label\na delight,good\ntwo hours lost,bad\n")
    rows = "".join(f"a film {i} was dull or warm\n" for i in range(20_000))
    (tmp_path / "queries.csv").write_text("text\n" + rows)
    there = {path.name for path in tmp_path.iterdir()}
    ended, line = end_when(
        lambda: any(tmp_path.glob(".out.csv.*.tmp")), number,
        "predict", "--demonstrations", "demos.csv", "--input", "queries.csv",
        "--output", "out.csv", "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert ended == 130
    assert line == "abft-fast: interrupted"
    assert {path.name for path in tmp_path.iterdir()} == there


@both_signals
def test_train_says_how_to_continue(number, tmp_path):
    run = tmp_path / "run"

    def goes_on():
        """Whether steps are taken, and no other process may work in the folder."""
        return (run / "metrics.jsonl").exists() and is_held(run)

    ended, line = end_when(
        goes_on, number, "train", *QUICK, "--no-eval", "--output-dir", "run", cwd=tmp_path
    )
    assert not is_held(run)
    assert ended == 130
    assert line == "abft-fast: interrupted; continue with `abft-fast train --resume run`"


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup."""
    (tmp_path / "demos.csv").write_text("text,label\na delight,good\ntwo hours lost,bad\n")
    (tmp_path / "queries.csv").write_text("text\nwarm\n")
    options = "--demonstrations demos.csv --input queries.csv --output out.csv --device cpu"
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' HUP; exec '{COMMAND}' predict {options}"],
        env=environment(), cwd=tmp_path,
    )  # fmt: skip
    while not list(tmp_path.glob(".out.csv.*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
