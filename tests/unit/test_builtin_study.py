"""The built-in model's study: rows are of the committed weights, pages say what rows say."""

import hashlib
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest

from abft_fast.builtin import builtin_model_path
from abft_fast.data import PAPER_DATASETS
from abft_fast.experiments.grid import read_cells
from tests.study_rows import largest_class, rows_of

pytestmark = pytest.mark.unit

WEIGHTS = "9ef8d1cd07a50bae04d148bcdfb44ef2100d9b47bdeaa3c2e7850661a4fe79b0"
ROOT = Path(__file__).parents[2]
SCIENCE = ROOT / "docs/science/built-in-model.md"
NAMES = {"Vanilla": "vanilla", "Calibrate (contextual)": "contextual"}


@pytest.fixture(scope="module")
def study():
    """Rows by setting and seed; what trains nothing was evaluated once, on all datasets."""
    found = {}
    for row in rows_of("builtin_study"):
        found.setdefault(row["setting_name"], {}).setdefault(row["seed"], []).append(row)
    return found


def test_the_rows_are_of_the_committed_weights():
    """With others, run the sweeps of configs/builtin/ again."""
    weights = (builtin_model_path() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == WEIGHTS


@pytest.mark.parametrize("name", ["learning_rates", "study", "wrong_labels"])
def test_the_rows_are_of_all_cells_of_its_sweeps(name):
    cells = {cell.name for cell in read_cells(ROOT / "configs" / "builtin" / f"{name}.yaml", {})}
    assert {row["cell"] for row in rows_of(f"builtin_{name}")} == cells


def table(page, titles):
    """Cells of the table that begins so, by the setting or dataset that each line is of."""
    text = page.read_text(encoding="utf-8")
    lines = text[text.index(f"| {titles} |") :].split("\n\n")[0].splitlines()[2:]
    signs = str.maketrans("", "", "*+\N{MULTIPLICATION SIGN}")
    cells = [[cell.strip() for cell in line.translate(signs).split("|")[1:-1]] for line in lines]
    return {NAMES.get(first, first.removeprefix("ABFT, ")): rest for first, *rest in cells}


def same(cell: str, values: Iterable[float]):
    """The cell is the mean of the values, of one a seed, and after ± their deviation."""
    values = list(values)
    told = cell.split(" ± ")
    exact = [fmean(values), *([stdev(values)] if len(values) > 1 else [])]
    assert len(told) == len(exact), cell
    for number, value in zip(told, exact, strict=True):
        decimals = len(number.partition(".")[2])
        assert float(number) == pytest.approx(value, abs=0.501 * 10**-decimals), cell


def percent(rows, metric):
    return 100 * fmean(float(row[metric]) for row in rows)


def inside(rows):
    return [row for row in rows if row["evaluated_on"] == row["dataset"]]


def outside(rows):
    """Without training there is no domain, and all are the same."""
    return [row for row in rows if row["evaluated_on"] != row["dataset"]] or rows


def seconds(seeds):
    return fmean(float(row["training_seconds"]) for rows in seeds.values() for row in rows)


def test_the_table_of_accuracies(study):
    told = table(SCIENCE, "Method | SST2")
    largest = [100 * largest_class(name) for name in PAPER_DATASETS]
    largest += [fmean(largest)] * 2
    for cell, share in zip(told.pop("Largest class"), largest, strict=True):
        same(cell, [share])
    assert set(told) == set(study)
    for name, cells in told.items():
        seeds = [inside(rows) for rows in study[name].values()]
        *in_domain, average, out_of_domain = cells
        for dataset, cell in zip(PAPER_DATASETS, in_domain, strict=True):
            mine = [[row for row in rows if row["dataset"] == dataset] for rows in seeds]
            same(cell, (percent(rows, "accuracy") for rows in mine))
        same(average, (percent(rows, "accuracy") for rows in seeds))
        same(out_of_domain, (percent(outside(rows), "accuracy") for rows in study[name].values()))


def test_the_table_of_averages(study):
    told = table(SCIENCE, "Method | Time")
    assert set(told) == set(study) - {"contextual"}
    for name, (time, *scores, share, heads) in told.items():
        seeds = study[name].values()
        for cell, (metric, part) in zip(
            scores, product(("accuracy", "macro_f1"), (inside, outside)), strict=True
        ):
            same(cell, (percent(part(rows), metric) for rows in seeds))
        if name != "vanilla":  # `eval` keeps no attention
            same(time, [seconds(study[name]) / seconds(study["ABFT"])])
            same(share, (percent(inside(rows), "correct_share_above_chance") for rows in seeds))
            same(heads, (percent(inside(rows), "induction_heads") / 100 for rows in seeds))


def test_the_table_of_wrong_labels():
    told, found = table(SCIENCE, "wrong labels (%)"), {}
    names = {"vanilla": "untrained", "E2E": "E2E", "ABFT": "ABFT"}
    for row in rows_of("builtin_wrong_labels"):
        name = f"{row['dataset'].upper()}, {names[row['method']]}"
        found.setdefault(name, []).append(row)
    assert set(told) == set(found)
    for name, cells in told.items():
        for rate, cell in zip((0, 25, 50, 75, 100), cells, strict=True):
            metric = f"accuracy_at_{rate}_percent_wrong"
            same(cell, (percent([row], metric) for row in found[name]))
