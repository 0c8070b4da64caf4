"""The study of label words: rows are cells of its sweep, and the page says what the rows say."""

import re
from pathlib import Path
from statistics import fmean

import pytest

from abft_fast.data import PAPER_DATASETS
from abft_fast.experiments.grid import read_cells
from tests.study_rows import rows_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
METRICS = ("own", "rotated", "symbols", "override_rate", "prior_rate")
NAMES = {"none": "vanilla", "own (the paper)": "own", "ABFT, permuted": "permuted"}


@pytest.fixture(scope="module")
def rows():
    """By setting and dataset."""
    return {(row["setting_name"], row["dataset"]): row for row in rows_of("builtin_labels")}


def lines_of(title):
    text = (ROOT / "docs/science/label-words.md").read_text(encoding="utf-8")
    table = text[text.index(f"| {title}") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, *cells = re.split(r" \| ", line.strip("| "))
        yield NAMES.get(name, name), cells


def test_rows_are_cells_of_the_sweep(rows):
    cells = {cell.name for cell in read_cells(ROOT / "configs/builtin/labels.yaml", {})}
    assert {row["cell"] for row in rows.values()} <= cells


def test_the_page_has_the_means_of_the_rows(rows):
    said = dict(lines_of("Training | Own"))
    assert said.keys() == {setting for setting, _ in rows}
    for setting, cells in said.items():
        for metric, cell in zip(METRICS, cells, strict=True):
            values = [float(rows[setting, dataset][metric]) for dataset in PAPER_DATASETS]
            assert cell == f"{100 * fmean(values):.1f}", (setting, metric)


def test_the_page_has_the_rotated_accuracy_of_each_dataset(rows):
    for setting, cells in lines_of("Training | SST2"):
        exact = [float(rows[setting, dataset]["rotated"]) for dataset in PAPER_DATASETS]
        assert cells == [f"{100 * value:.1f}" for value in exact]


def test_rows_of_gemma_are_cells_of_its_sweeps():
    cells = {
        (precision, cell.name)
        for name in ("gemma_labels", "gemma_following")
        for precision, options in (("no", {}), ("bf16", {"mixed_precision": "bf16"}))
        for cell in read_cells(ROOT / f"configs/real/{name}.yaml", options)
    }
    assert {(row["mixed_precision"], row["cell"]) for row in rows_of("real_labels")} <= cells


@pytest.mark.parametrize(
    ("title", "dataset"),
    [("Training of Gemma", "sst2"), ("Training on TREC", "trec"), ("Training on SUBJ", "subj")],
)
def test_the_page_has_the_rows_of_gemma(title, dataset):
    own = {r["setting_name"]: r for r in rows_of("real_labels") if r["dataset"] == dataset}
    said = dict(lines_of(title))
    assert said.keys() == own.keys()
    for setting, cells in said.items():
        row = {name: f"{100 * float(own[setting][name]):.1f}" for name in METRICS}
        for rate in ("override_rate", "prior_rate"):
            low, high = (float(own[setting][f"{rate}_{end}"]) for end in ("low", "high"))
            row[rate] += f" ({100 * low:.1f} to {100 * high:.1f})"
        assert cells == list(row.values()), setting


def test_the_page_has_the_rows_of_both_objectives(rows):
    share = {(row["setting_name"], row["dataset"]): row for row in rows_of("builtin_share")}
    sweep = read_cells(ROOT / "configs/builtin/share.yaml", {})
    assert {row["cell"] for row in share.values()} <= {cell.name for cell in sweep}
    said = set()
    for line, cells in lines_of("Dataset, labels, objective"):
        dataset, labels, objective = line.split(", ")
        place = (f"share, {labels}" if objective == "share" else labels, dataset.lower())
        row = (share if objective == "share" else rows)[place]
        assert cells == [f"{100 * float(row[name]):.1f}" for name in METRICS], line
        said |= {place}
    assert share.keys() <= said
