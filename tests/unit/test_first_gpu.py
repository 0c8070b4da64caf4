"""All of `benchmarks/first_gpu.py` on a CPU: no minute of a GPU is to be lost to a mistake."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.unit, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "first_gpu.py"
PHASES = ("correctness", "bandwidth", "fused", "steps")

WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    # A machine with torch, triton, transformers, peft and accelerate, and what these need.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in MISSING:
            return super().find_spec(name, path, target)

MISSING = {missing}
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path[0] = str(__import__("pathlib").Path(script).parent)
runpy.run_path(script, run_name="__main__")
"""
MISSING = (
    "bitsandbytes", "datasets", "gguf", "matplotlib", "pydantic",
    "pydantic_core", "pytest", "pytest_benchmark", "rich", "StaICC", "trl", "typer", "unsloth",
)  # fmt: skip


def dry_run(folder, *options, interpreter=(SCRIPT,)):
    command = [sys.executable, *interpreter, "--dry-run", "--results", folder, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def rows(folder, phase):
    with (folder / f"{phase}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_phase_runs_where_only_the_libraries_of_the_model_are(tmp_path):
    bare = ("-c", WITHOUT.replace("{missing}", repr(MISSING)), SCRIPT)
    run = dry_run(tmp_path, "--commit", "abc1234", interpreter=bare)
    assert run.returncode == 0, run.stdout + run.stderr
    for phase, more in (("large", ""), ("streamed", " and StaICC")):
        line = f"{phase}  packages  needs bitsandbytes and pydantic{more}, not installed  skipped"
        assert line in run.stdout
    assert "cut" not in run.stdout and "FAILED" not in run.stdout
    assert {path.stem for path in tmp_path.iterdir()} == {*PHASES, "kernels"}
    assert {row["phase"] for row in rows(tmp_path, "kernels")} == {"fused", "steps"}
    for phase in (*PHASES, "kernels"):
        found = rows(tmp_path, phase)
        assert all(row["commit"] == "abc1234" and row["torch"] for row in found)
    assert all(row["holds"] == "True" for row in rows(tmp_path, "correctness"))
    contenders = {row["contender"] for row in rows(tmp_path, "steps")}
    assert contenders == {
        "ABFT, local", "ABFT, N = 4", "ABFT, full", "ABFT, full, checkpointing", "E2E",
        "eager, one by one",
    }  # fmt: skip


def test_nf4_under_its_plan(tmp_path):
    run = dry_run(tmp_path, "--from", "large")
    assert run.returncode == 0, run.stdout + run.stderr
    found = rows(tmp_path, "large")
    assert [row["contender"] for row in found] == ["ABFT, local", "ABFT, full, checkpointing"]
    assert all(row["tokens_at_once"] == row["tokens_planned"] == "120" for row in found)
    (row,) = rows(tmp_path, "streamed")
    assert row["shape"] == "5x128" and float(row["seconds_of_steps"]) < float(row["seconds"])


def test_what_has_no_time_is_named(tmp_path):
    run = dry_run(tmp_path, "--from", "fused", "--budget", "0.001")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith(" cut\ncontinue with --from fused\n")
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_an_exit_code_and_stops_no_other_phase(tmp_path):
    (tmp_path / "steps.csv").write_text("other,columns\n")
    run = dry_run(tmp_path, "--from", "steps")
    assert run.returncode == 1, run.stdout
    assert "steps.csv has the columns ['other', 'columns']" in run.stdout
    assert rows(tmp_path, "large")


def test_bad_options_are_refused(tmp_path):
    for options, line in (
        (("--budget", "-3"), "-3 is no number of seconds above 0"),
        (("--budget", "much"), "argument --budget"),
        (("--from", "coffee"), "invalid choice: 'coffee'"),
    ):
        run = dry_run(tmp_path, *options)
        assert run.returncode == 2 and line in run.stderr
    assert not list(tmp_path.iterdir())
