"""What every benchmark stands on: turns, ratios within a round, rows, fresh processes."""

import csv
import os
import subprocess
import sys
from json import loads
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.peak_memory import in_fresh_process, peak_of

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

TURNS = """
import pytest
from benchmarks.paired import compare


@pytest.mark.parametrize("warmup_rounds", [0, 1])
def test_turns(benchmark, warmup_rounds):
    calls = []
    # A round's disturbance is in both contenders.
    taken = {"slow": [8.0, 4.0, 40.0, 2.0], "quick": [4.0, 2.0, 20.0, 1.0]}
    clocks = {name: iter(times) for name, times in taken.items()}
    found = compare(
        benchmark,
        {name: lambda name=name: calls.append(name) or name for name in taken},
        floor={"slow": "quick", "quick": "slow"},
        baseline="slow",
        rounds=3,
        warmup_rounds=warmup_rounds,
        clock=lambda run: next(clocks[run()]),
    )
    kept = slice(warmup_rounds, warmup_rounds + 3)
    assert benchmark.extra_info["seconds"] == {name: v[kept] for name, v in taken.items()}
    assert found["slow"].to_floor == (2.0, 2.0, 2.0)
    assert found["quick"].to_floor == (0.5, 0.5, 0.5)
    assert found["quick"].speedup == (2.0, 2.0, 2.0)
    assert found["slow"].seconds.p50 == sorted(taken["slow"][kept])[1]
    rounds = list(zip(calls[::2], calls[1::2]))
    assert all(set(each) == set(taken) for each in rounds) and len(rounds) == 3 + warmup_rounds
"""


def run_pytest(*arguments):
    # Beside pytest-xdist's processes, pytest-benchmark would run everything once.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_contenders_take_turns_and_ratios_are_of_one_round(tmp_path):
    (tmp_path / "test_turns.py").write_text(TURNS)
    run = run_pytest("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, tmp_path / "test_turns.py")
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_a_benchmark_runs_checks_itself_and_leaves_its_rows(tmp_path):
    heads = "32/8x128" if record.GPU else "4/1x64"
    case = f"benchmarks/fused_attention.py::bench_fused_attention[128-{heads}-forward]"
    json = tmp_path / "rounds.json"
    run = run_pytest(case, "--rounds", 2, "--results", tmp_path, "--benchmark-json", json)
    assert run.returncode == 0, run.stdout + run.stderr
    with (tmp_path / "fused_attention.csv").open(newline="") as rows:
        found = {row["contender"]: row for row in csv.DictReader(rows)}
    assert set(found) == {"attention", "fused", "eager", "flex"}
    assert found["attention"]["to_floor_p50"] == "1"
    assert all(float(row["seconds_p50"]) > 0 and row["commit"] for row in found.values())
    assert len(loads(json.read_text())["benchmarks"][0]["extra_info"]["seconds"]["fused"]) == 2


def test_rows_of_other_columns_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.append("question", {"contender": "a", "seconds": 1})
    record.append("question", {"contender": "b", "seconds": 2})
    with pytest.raises(ValueError, match=r"question\.csv has the columns"):
        record.append("question", {"contender": "c", "bytes": 3})
    lines = (tmp_path / "question.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[2].endswith(",b,2")


def _peak_of(megabytes: int) -> tuple[int, int]:
    return peak_of(lambda: bytearray(megabytes * 2**20)), os.getpid()


@pytest.mark.slow
@pytest.mark.skipif(record.GPU, reason="a GPU's counter counts its own memory")
def test_a_fresh_process_tells_its_own_peak():
    (peak, pid), (_, another) = (in_fresh_process(_peak_of, 20) for _ in range(2))
    assert 19 * 2**20 <= peak <= 24 * 2**20
    assert len({pid, another, os.getpid()}) == 3
    with pytest.raises(TypeError):
        in_fresh_process(_peak_of, "much")
