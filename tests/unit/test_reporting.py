"""The page of runs: its statistics by hand, what it says of a run, and how a browser shows it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from abft_fast import plots
from abft_fast.commands.report import report, report_of_training
from abft_fast.errors import UserError
from abft_fast.evaluation.intervals import wilson
from abft_fast.options import TrainConfig
from abft_fast.reporting import pictures
from abft_fast.reporting.run_data import read_run
from abft_fast.reporting.statistics import calibration, confusion, paired_difference
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def test_wilsons_interval_is_the_textbooks():
    """Brown, Cai, DasGupta 2001: the interval's ends solve |p - x| = z sqrt(p (1 - p) / n)."""
    found = wilson(0.3, 50)
    for end in (found.low, found.high):
        assert abs(end - 0.3) == pytest.approx(1.959964 * (end * (1 - end) / 50) ** 0.5, rel=1e-5)
    assert wilson(0.0, 8).low == 0 and wilson(1.0, 8).high == 1
    assert wilson(0.0, 8).high == pytest.approx(1 - wilson(1.0, 8).low)


def test_the_bootstrap_of_pairs_agrees_with_its_theory():
    generator = np.random.default_rng(1)
    before = generator.random(1000) < 0.5
    after = before | (generator.random(1000) < 0.3)
    found = paired_difference(before, after, range(1000))
    gain = after.astype(float) - before
    error = gain.std() / 1000**0.5
    assert found.value == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(gain.mean() + 1.96 * error, abs=0.1 * error)
    # Each query asked twice with the same answers: no more is known than by asking once.
    twice = paired_difference([*before, *before], [*after, *after], [*range(1000)] * 2)
    assert twice == pytest.approx(found)


def test_the_same_answers_leave_no_doubt_about_the_difference():
    assert paired_difference([True, False] * 9, [True, False] * 9, range(18)) == (0, 0, 0)


def test_confusion_and_calibration_by_hand():
    assert confusion([0, 0, 1, 2], [0, 1, 1, 0], 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    bins = calibration([0.51, 0.55, 1.0, 0.2], [True, False, True, False])
    assert bins == [(1, 0.2, 0.0), (2, pytest.approx(0.53), 0.5), (1, 1.0, 1.0)]


def details(right, tokens=("a <b> : ", "sad", " x :", "glad", " y :")):
    """Of 6 prompts of 3 queries, the first `right` answered rightly, the last one left out."""
    labels = [0, 1, 0, 1, 0, 1]
    rows = [
        [0.8, 0.2] if (label == 0) == (i < right) else [0.3, 0.7] for i, label in enumerate(labels)
    ]
    prompt = {
        "index": 0, "tokens": list(tokens), "attention": [0.1, 0.5, 0.1, 0.2, 0.1],
        "label_positions": [1, 3], "label_is_correct": [True, False],
    }  # fmt: skip
    layers = {"label_mass": [0.1, 0.7], "correct_mass": [0.1, 0.5], "induction_heads": [0, 2]}
    return {
        "dataset": "subj", "label_words": ["sad", "glad"], "queries": [0, 1, 2, 0, 1, 2],
        "labels": labels, "probabilities": [*rows[:5], []], "layers": layers, "prompts": [prompt],
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder as `train` leaves it, with few prompts."""
    folder = RunFolder(tmp_path / "my <run>")
    about = {
        "python": "3.11", "platform": "Linux", "processes": 1, "threads": 2, "gpus": [],
        "versions": {"torch": "2.13.0", "flash-attn": None},
    }  # fmt: skip
    folder.create(TrainConfig(), 1234, {}, about)
    for step in (1, 2, 3):
        folder.append_metrics(
            {
                "step": step, "loss": 3.0 - step, "attention_loss": 3.0 - step,
                "induction_heads": 2.0, "seconds": 1.5, "peak_memory_bytes": 2**30,
                "correct_share_above_chance": None if step == 2 else 0.1 * step,
                "tokens_per_second": 1000.0,
            }
        )  # fmt: skip
    for side, right in (("before", 2), ("after", 4)):
        metrics = {"accuracy": right / 5, "macro_f1": None}
        attention = {"induction_heads": 2.0, "correct_share_above_chance": None}
        folder.record_evaluation(side, {"subj": metrics}, {"subj": attention}, details(right))
    return folder.folder


class Page(HTMLParser):
    """A page's text, its tags, and everything that it would load."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.loads, self.ids = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_run_found(run, tmp_path):
    report([run], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    (found,) = read_run(run)
    assert found.sides["before"].right == [True, True, False, False, False]
    assert found.sides["after"].accuracy.value == 0.8
    assert "my <run>" in page.text and "a <b>" in page.text  # escaped, not markup
    for words in ("40.0 %", "80.0 %", "+40.0", "1,024 MiB", "1,234 parameters", "torch 2.13.0"):
        assert words in page.text, words
    assert page.tags.count("svg") == 6 and page.tags.count("details") == 3
    losses = ("Training loss", "Loss of ABFT at the initial A and B")
    for title in (*losses, "Induction heads", "by layer", "Calibration", "Confusion"):
        assert title in page.text


def test_the_trained_loss_has_a_picture_of_its_own(run):
    steps = [{**row, "loss": 7.0, "attention_loss": 3.0} for row in read_run(run)[0].steps]
    for steps_of_run, titles in (
        (steps, {"Training loss": 7.0, "Loss of ABFT at the initial A and B": 3.0}),
        ([{**row, "attention_loss": None} for row in steps], {"Training loss": 7.0}),
    ):
        figures = pictures._figures(replace(read_run(run)[0], steps=steps_of_run, sides={}))
        found = {
            title: figure.axes[0].lines[0].get_ydata()[0]
            for title, figure in figures.items()
            if "loss" in title.lower()
        }
        assert found == titles


def test_the_page_loads_nothing_and_has_no_script(run, tmp_path):
    report([run, run], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert page.loads == [] and "script" not in page.tags and "link" not in page.tags
    style = (tmp_path / "r.html").read_text()
    assert "@import" not in style and not re.search(r"url\((?!#)", style)
    shared = {name for name in page.ids if page.ids.count(name) > 1}
    assert not shared, shared


def test_a_report_is_the_same_each_time(run, tmp_path):
    for name in ("a", "b"):
        report([run], tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_run_without_evaluation_or_details_has_a_page(run, tmp_path):
    for name in ("evaluation", "attention", "details-before", "details-after"):
        (run / f"{name}.json").unlink()
    report([run], tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "no evaluation" in page.text and page.tags.count("svg") == 4


def test_other_prompts_after_give_no_difference(run, tmp_path):
    other = details(4)
    other["probabilities"][0] = []
    (run / "details-after.json").write_text(json.dumps(other))
    assert read_run(run)[0].gain is None
    report([run], tmp_path / "r.html")
    assert "points of accuracy" not in Page(tmp_path / "r.html").text


def test_bad_folders_are_one_line_and_nothing_is_written(run, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report([run, tmp_path / "none"], tmp_path / "r.html")
    (run / "details-after.json").write_text('{"labels": [1]}')
    with pytest.raises(UserError, match="cannot be read"):
        report([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_failing_report_is_one_line_for_a_training_run(run, monkeypatch):
    said = []
    report_of_training(run, said.append)
    assert said == [] and (run / "report.html").is_file()
    (run / "details-after.json").write_text('{"labels": [1]}')
    report_of_training(run, said.append)
    assert len(said) == 1 and "no report.html (UserError" in said[0]
    monkeypatch.setattr(plots, "NEEDED", ("not_there",))
    report_of_training(run, said.append)
    assert said[1:] == ["no report.html, which needs not_there: `pip install 'abft-fast[plots]'`"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_scrolling_sideways(run, tmp_path, width):
    report([run, run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    # A frame has the width asked for; a browser's own window is never narrower than 500 px.
    probe = (
        f'<iframe id=f srcdoc="{text.replace("&", "&amp;").replace(chr(34), "&quot;")}" '
        f'style="width:{width}px;height:900px;border:0"></iframe><pre id=o></pre><script>'
        "onload=()=>{let d=f.contentDocument;o.textContent=`sizes ${d.documentElement.scrollWidth}"
        " ${[...d.querySelectorAll('svg')].filter(s=>s.getBoundingClientRect().width>99).length}`}"
        "</script>"
    )
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    browser = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p",
         "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    scroll, drawn = map(int, re.search(r"sizes (\d+) (\d+)", browser.stdout).groups())
    assert scroll <= width
    assert drawn == 10
