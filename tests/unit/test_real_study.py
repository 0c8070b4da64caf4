"""The study of real models: rows are cells of its sweeps, and pages say what the rows say."""

import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from abft_fast.experiments.grid import read_cells
from tests.study_rows import rows_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
NAMES = {
    "Vanilla": "vanilla",
    "Calibrate (contextual)": "contextual",
    "E2E": "E2E",
    "ABFT": "ABFT",
}


@pytest.fixture(scope="module")
def accuracies():
    """By setting and dataset: of one seed, or the mean and its standard error over seeds."""
    found = defaultdict(list)
    for row in rows_of("real_study"):
        found[row["setting_name"], row["dataset"]].append(100 * float(row["accuracy"]))
    return {cell: shown(values) for cell, values in found.items()}


def shown(values):
    mean = f"{statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def test_rows_are_cells_of_the_sweeps():
    sweeps = (ROOT / "configs/real").glob("*.yaml")
    cells = {cell.name for sweep in sweeps for cell in read_cells(sweep, {})}
    assert {row["cell"] for row in rows_of("real_study")} <= cells


def test_the_page_says_what_the_rows_say(accuracies):
    text = (ROOT / "docs/science/real-models.md").read_text(encoding="utf-8")
    titles, *lines = re.findall(r"^\| (.*) \|$", text[text.index("| Method |") :], re.MULTILINE)
    datasets = [title.lower() for title in titles.split(" | ")[1:]]
    said = {}
    for line in lines[1:]:
        method, *cells = line.split(" | ")
        said |= {
            (NAMES[method], d): cell for d, cell in zip(datasets, cells, strict=True) if cell != "-"
        }
    of_the_table = {cell: text for cell, text in accuracies.items() if cell[0] in NAMES.values()}
    assert said == of_the_table


def test_readme_says_what_the_rows_say(accuracies):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = ("Vanilla", "Calibrate (contextual)", "ABFT")
    said = re.search(r"^\| SST2.*\n\| ---.*\n\| accuracy \(%\) \| (.*) \|$", text, re.MULTILINE)
    assert said[1].split(" | ") == [accuracies[NAMES[name], "sst2"] for name in shown]
