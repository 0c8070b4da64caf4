"""`abft-fast predict` as a user runs it."""

import csv
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from abft_fast import data
from tests.command_line import COMMAND, abft_fast, environment

pytestmark = pytest.mark.cli

PAGE = (Path(__file__).parents[2] / "docs/guides/label-a-file.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Reviews; demonstrations and queries."""
    reviews = data.load("mr")
    write(
        tmp_path / "demos.csv",
        [(e.text, reviews.label_words[e.label]) for e in reviews.training[:4]],
        "text", "label",
    )  # fmt: skip
    write(tmp_path / "queries.csv", [(e.text,) for e in reviews.test[:12]], "text")
    return tmp_path


def write(path, rows, *columns):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def predict(folder, *arguments, **options):
    files = ("--demonstrations", "demos.csv", "--input", "queries.csv")
    return abft_fast("predict", *files, "--device", "cpu", *arguments, cwd=folder, **options)


def test_what_the_guide_says_runs(tmp_path):
    demos, queries, template = re.findall(r"```(?:csv|yaml)\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "demos.csv").write_text(demos)
    (tmp_path / "queries.csv").write_text(queries)
    (tmp_path / "reviews.yaml").write_text(template)
    command = re.search(r"abft-fast (predict .*?)\n```", PAGE, re.DOTALL)[1]
    result = abft_fast(*command.replace("\\\n", "").split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [line.split(",", 1)[1] for line in queries.splitlines()[1:]]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        likely = {word: float(row[f"p_{word}"]) for word in ("negative", "positive")}
        assert sum(likely.values()) == pytest.approx(1, abs=1e-6)
        assert row["prediction"] == max(likely, key=likely.get)


def test_a_file_a_pipe_and_standard_input_are_read_alike(folder):
    text = (folder / "queries.csv").read_text()
    expected = predict(folder).stdout
    os.mkfifo(folder / "pipe.csv")
    files = ["--demonstrations", "demos.csv", "--device", "cpu"]
    for name, given in (("pipe.csv", ""), ("-", text), ("/dev/stdin", text)):
        if name == "pipe.csv":
            writer = threading.Thread(target=(folder / name).write_text, args=(text,), daemon=True)
            writer.start()
        result = subprocess.run(
            [COMMAND, "predict", *files, "--input", name],
            capture_output=True, text=True, cwd=folder, input=given, timeout=200, check=False,
            env=environment(),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected


def test_standard_output_holds_the_rows_alone(folder):
    result = predict(folder)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert "12 rows labelled" in result.stderr
    with (folder / "queries.csv").open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert [row["text"] for row in rows] == texts
    assert list(rows[0]) == ["text", "prediction", "p_negative", "p_positive"]
    assert {path.name for path in folder.iterdir()} == {"demos.csv", "queries.csv"}


def test_a_reader_that_leaves_is_said(folder):
    process = subprocess.Popen(
        [COMMAND, "predict", "--demonstrations", "demos.csv", "--input", "queries.csv"],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    assert said.splitlines()[-1] == "abft-fast: standard output was closed before all was written"


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = predict(folder, "--output", "out.csv")
    assert result.returncode == 2
    assert "predict runs in one process" in result.stderr
    merged = abft_fast("merge", "--adapter", folder, "--output-dir", folder / "merged")
    assert merged.returncode == 2 and "merge runs in one process" in merged.stderr


# A small process in between, as Linux counts the memory of the process that starts another.
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(folder, rows):
    """Most bytes resident while that many rows of 8 kB are labelled."""
    with (folder / "queries.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "notes"])
        for i in range(rows):
            writer.writerow([f"film {i % 977}", "x" * 8000])
    arguments = ("--demonstrations", "demos.csv", "--input", "queries.csv", "--output", "out.csv")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURED, COMMAND, "predict", *arguments],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    with open("out.csv", "rb") as file:
        assert sum(1 for _ in file) == rows + 1
    return int(measured.stdout.split()[-1]) * 1024


def test_memory_does_not_grow_with_the_input(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder / "demos.csv", [("nice", "good"), ("dull", "bad")], "text", "label")
    # A peak varies by several MB from process to process; kept rows would be there each time.
    growths = (peak_memory(folder, 6_600) - peak_memory(folder, 1_100) for _ in range(2))
    assert any(growth < 20e6 for growth in growths)  # of 53 MB and 9 MB
