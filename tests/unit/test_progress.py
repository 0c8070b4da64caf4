from pathlib import Path

import pytest
from rich.table import Table

from abft_fast.commands import printing
from abft_fast.options import TrainConfig
from abft_fast.runtime import progress
from abft_fast.runtime.progress import Progress
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_plain_line_says_the_rate_and_the_time_left(clock, tmp_path):
    reporter = Progress()
    reporter.keep(tmp_path / "run.log")
    with reporter.bar("evaluating", 8, tokens=1000) as advance:
        for tokens in (400, 200, 200, 200):  # the first batch holds the longest prompts
            clock.now += tokens / 5
            advance(2, tokens)
    assert (tmp_path / "run.log").read_text().splitlines() == [
        "evaluating: 2/8, 5 tokens/s, 0:02:00 left",
        "evaluating: 4/8, 5 tokens/s, 0:01:20 left",
        "evaluating: 6/8, 5 tokens/s, 0:00:40 left",
        "evaluating: 8/8, 5 tokens/s, 0:00:00 left",
    ]


NAMES = ["run[final]", "a[/b]x", "[red]", ":cat:"]


def test_names_are_no_markup(tmp_path, capsys, monkeypatch):
    table = Table(*NAMES, title=NAMES[0])
    table.add_row(*NAMES)
    reporter = Progress()
    reporter.keep(tmp_path / "run.log")
    reporter.say(" ".join(NAMES))
    reporter.show(table)
    printed = capsys.readouterr().err
    for name in NAMES:
        assert printed.count(name) == 3 + (name == NAMES[0])
        assert (tmp_path / "run.log").read_text().count(name) == 3 + (name == NAMES[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_title_of_a_bar_is_no_markup(name, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    reporter = Progress()
    assert reporter.console.is_terminal
    with reporter.bar(name, 1, tokens=1) as advance:
        advance(1, 1, note=f"note {name}")
    printed = capsys.readouterr().err
    assert name in printed and f"note {name}" in printed


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_of_results_show_names_as_they_are(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path(name))
    run.create(TrainConfig(), 1, {}, {})
    run.append_metrics({"step": 1, "seconds": 1.0, "peak_memory_bytes": 1})
    printing.print_run(run)
    behavior = {"induction_heads": 1.0, "correct_share_above_chance": None}
    printing.print_evaluation("Normal", {name: {"accuracy": 0.5}}, {name: behavior})
    printing.print_findings([(name, f"{name}!")])
    printed = capsys.readouterr().out
    assert f"run folder: {name}\n" in printed
    assert f"abft-fast eval: {name}" in printed and f"{name}!" in printed


def test_a_figure_may_be_defined_on_one_side_only(tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    run.create(TrainConfig(), 1, {}, {})
    run.append_metrics({"step": 1, "seconds": 1.0, "peak_memory_bytes": 1})
    sides = {"before": (2.0, 0.25), "after": (0.0, None)}  # training may leave no head
    for side, (heads, share) in sides.items():
        behavior = {"induction_heads": heads, "correct_share_above_chance": share}
        behavior["label_mass"] = 0.125
        run.record_evaluation(side, {"subj": {"accuracy": 0.5}}, {"subj": behavior})
    printing.print_run(run)
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "│" in line]
    table = {title.strip(): (before.strip(), after.strip()) for title, before, after in rows}
    assert table["label mass on correct labels, above chance (%)"] == ("+25.0", "-")
    assert table["label mass, mean of all heads (%)"] == ("", "12.5")


def test_a_resumed_block_counts_its_own_tokens_only(clock, tmp_path):
    reporter = Progress()
    reporter.keep(tmp_path / "run.log")
    with reporter.bar("training", 4, tokens=6000, done=2) as advance:
        clock.now += 2
        advance(1, 3000, "loss 1.000")
    assert (tmp_path / "run.log").read_text() == (
        "training: 3/4, loss 1.000, 1,500 tokens/s, 0:00:02 left\n"
    )
