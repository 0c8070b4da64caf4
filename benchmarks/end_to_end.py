"""Where the time of `abft-fast train` goes, from the start of its process to its end.

    pytest benchmarks/end_to_end.py [-k 64] [--rounds 3]

The installed command, as a user types it, on the built-in model: with no options (`default`, what
`make train` runs), and on SUBJ's first 64 + 64 texts as files of one's own. A phase ends with what
the run itself says or writes: a line on stderr as it arrives, the time a file in its folder was
written. CPython's own clock of imports is on, so that a phase's row also has its share of imports,
which the command does when it needs them. The phases add up to `whole`; the floor of that is a
process that imports torch, transformers, accelerate and peft and does nothing. No row without a
finished run: every step taken, an adapter, both evaluations, and at default options accuracy above
that of before. Nothing is run on a GPU that is not run on a CPU.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from abft_fast import data
from benchmarks.paired import Timing, compare
from benchmarks.record import GPU, append, quick_first

COMMAND = Path(sys.executable).with_name("abft-fast")
LIBRARIES = "libraries imported"
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|")  # microseconds without those within
ENDS = {  # what ends a phase: what a line of stderr matches, or a file and which of its states
    "imports": r"import time:.* abft_fast\.training$",
    "data": "prompts to train on",
    "plan of memory": "^loading ",
    "model": "^checking packed attention",
    "check of attention": "^attention: ",
    "LoRA and run folder": ("environment.json", 0),
    "evaluation before": ("evaluation.json", 0),
    "first step": ("metrics.jsonl", 1),  # it is empty at first
    "other steps": ("metrics.jsonl", -1),
    "saving": ("adapter", -1),
    "evaluation after": ("evaluation.json", 1),
}
FILES = {mark[0] for mark in ENDS.values() if isinstance(mark, tuple)}


@dataclass(frozen=True)
class Case:
    """Options of a run on SUBJ.

    Attributes:
        texts: to train and to test on, as files of one's own; 0 for the command without options.
    """

    texts: int

    @property
    def prompts(self) -> int:
        """To train on."""
        return self.texts or 512

    @property
    def test_prompts(self) -> int:
        """Every text is asked twice."""
        return 2 * (self.texts or 512)

    @property
    def epochs(self) -> int:
        return 1 if self.texts else 2

    @property
    def steps(self) -> int:
        return math.ceil(self.prompts * self.epochs / 32)

    def options(self, folder: Path) -> list[str | Path]:
        """Of the command; its data are written to the folder."""
        if not self.texts:
            return []
        subj = data.load("subj")
        for name, examples in (("train", subj.training), ("test", subj.test)):
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["text", "label"])
                rows.writerows([e.text, subj.label_words[e.label]] for e in examples[: self.texts])
        return [
            "--dataset", folder / "train.csv", "--test-file", folder / "test.csv",
            "--train-samples", str(self.prompts), "--epochs", str(self.epochs),
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.texts}-texts" if self.texts else "default"


DEFAULT, SMALL = Case(0), Case(64)
QUICK = (DEFAULT, SMALL) if GPU else (SMALL,)


@dataclass
class Run:
    """A run, and when it said and wrote what, in seconds from its start."""

    folder: Path
    lines: list[tuple[float, str]] = field(default_factory=list)
    files: dict[str, list[float]] = field(default_factory=dict)
    end: float = 0.0

    def phases(self) -> dict[str, tuple[float, float]]:
        """When each began and ended, in their order."""
        ends = [*map(self._at, ENDS.values()), self.end]
        assert ends == sorted(ends), f"not in the order of its phases: {ends}"
        return dict(zip([*ENDS, "report and exit"], pairwise([0.0, *ends]), strict=True))

    def _at(self, mark: str | tuple[str, int]) -> float:
        if isinstance(mark, str):
            return next(at for at, line in self.lines if re.search(mark, line))
        return self.files[mark[0]][mark[1]]

    def imports(self, begin: float, end: float) -> float:
        """Seconds of imports that ended in between."""
        found = (IMPORT.match(line) for at, line in self.lines if begin < at <= end)
        return sum(int(line[1]) for line in found if line) / 1e6

    def steps(self) -> list[dict]:
        """A row each, as the run wrote them."""
        return list(map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines()))

    def accuracies(self) -> list[float]:
        """Before and after."""
        sides = json.loads((self.folder / "evaluation.json").read_text())
        return [next(iter(sides[side].values()))["accuracy"] for side in ("before", "after")]


def started(command: list) -> subprocess.Popen:
    """A process that says what it imports."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def train(options: list, folder: Path) -> Run:
    """`abft-fast train`, watched."""
    run = Run(folder)
    began = time.time()
    with started([COMMAND, "train", *options, "--output-dir", folder]) as process:

        def listen() -> None:
            for line in process.stderr:
                run.lines.append((time.time() - began, line.rstrip()))

        listener = threading.Thread(target=listen)
        listener.start()
        while process.poll() is None:
            look(run, began)
            time.sleep(0.005)
        run.end = time.time() - began
        listener.join()
    said = [line for _, line in run.lines if not IMPORT.match(line)]
    assert process.returncode == 0, said[-1]
    return run


def look(run: Run, began: float) -> None:
    """Note which files have been written, and when."""
    for name in FILES:
        try:
            written = (run.folder / name).stat().st_mtime - began
        except FileNotFoundError:
            continue
        states = run.files.setdefault(name, [])
        if written not in states:
            states.append(written)


def libraries() -> float:
    """Seconds of what no such command can do without."""
    began = time.time()
    with started([sys.executable, "-c", "import torch, transformers, accelerate, peft"]) as process:
        process.communicate()
    assert process.returncode == 0
    return time.time() - began


def check(case: Case, run: Run) -> None:
    """Nothing is recorded of a run that has not done its work."""
    assert len(run.steps()) == case.steps, f"{len(run.steps())} steps"
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
    before, after = run.accuracies()
    assert case.texts or after > before, f"accuracy {before:.1%}, then {after:.1%}"


@pytest.mark.parametrize("case", quick_first([SMALL, DEFAULT], QUICK))
def bench_end_to_end(case, benchmark, rounds, tmp_path):
    options = case.options(tmp_path)
    runs = []

    def one_run() -> float:
        run = train(options, tmp_path / f"run-{len(runs)}")
        check(case, run)
        runs.append(run)
        return run.end

    contenders = {LIBRARIES: libraries, "whole": one_run}
    found = compare(
        benchmark, contenders, floor=LIBRARIES, rounds=rounds(1), warmup_rounds=0,
        clock=lambda seconds: seconds(),
    )  # fmt: skip
    phases = [run.phases() for run in runs]
    spans = {name: [of_run[name] for of_run in phases] for name in phases[0]}
    spans["until the first step"] = [(0.0, of_run["first step"][1]) for of_run in phases]
    spans["whole"] = [(0.0, run.end) for run in runs]
    steps = [statistics.median(row["seconds"] for row in run.steps()[1:]) for run in runs]
    before, after = runs[-1].accuracies()
    for name in [*spans, "a step", LIBRARIES]:
        span = spans.get(name, [])
        timing = found.get(name) or Timing.alone([end - begin for begin, end in span] or steps)
        imports = [run.imports(*ends) for run, ends in zip(runs, span, strict=bool(span))]
        row = {
            "case": str(case), "dataset": "subj", "prompts": case.prompts, "steps": case.steps,
            "test_prompts": case.test_prompts, "phase": name, **timing.columns(),
            "import_seconds": f"{statistics.median(imports):.3g}" if span else "",
            "accuracy_before": before, "accuracy_after": after,
        }  # fmt: skip
        append("end_to_end", row)
        share = timing.seconds.p50 / found["whole"].seconds.p50
        print(f"{case} {name:22} {timing.seconds.p50:7.2f} s, {share:4.0%} of the whole")
