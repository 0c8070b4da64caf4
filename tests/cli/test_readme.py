"""The code of README and of the pages runs, and prints what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from abft_fast import options
from abft_fast.cli.options_table import VERBS, insert
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[2]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_loop_of_readme_runs():
    [code] = blocks("README.md", "python")
    rows = [[float(x) for x in line.split()] for line in run(code).splitlines()]
    assert len(rows) == 2 and all(loss > 0 and heads > 0 for loss, heads in rows)


@pytest.mark.parametrize("page", ["concepts/packing.md", "guides/kernels-alone.md"])
def test_a_page_prints_what_it_says(page):
    [code] = blocks(f"docs/{page}", "python")
    [printed] = blocks(f"docs/{page}", "text")
    assert run(code) == printed


def test_the_page_of_the_loop_prints_what_it_says():
    page = "docs/get-started/own-loop.md"
    numbers = re.compile(r"\d+\.\d+")
    [printed] = blocks(page, "text")
    found = run("".join(blocks(page, "python")))
    assert numbers.sub("", found) == numbers.sub("", printed)
    expected = map(float, numbers.findall(printed))
    assert list(map(float, numbers.findall(found))) == pytest.approx(list(expected), abs=0.02)


def test_the_table_of_options_is_fresh():
    text = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    assert insert(text) == text, "run `make options`"


def test_the_table_of_options_has_every_verb():
    there = {verb.__name__ for verb in VERBS.values()}
    assert there == {name for name in options.__all__ if name.endswith("Config")}


@pytest.mark.parametrize(
    ("page", "before"),
    [("README.md", r"1e-4 in float32\): "), ("docs/reference/models.md", r"1e-4 in float32:\s+")],
)
def test_the_families_named_are_the_families_tested(page, before):
    named = re.search(before + r"([^.]*)\.", (ROOT / page).read_text(encoding="utf-8"))[1]
    assert sorted(named.replace("\n", " ").split(", ")) == sorted(FAMILIES)
