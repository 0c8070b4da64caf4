"""The built-in model's study: rows are of the committed weights, docs say what rows say."""

import hashlib
from pathlib import Path
from statistics import fmean

import pytest

from abft_fast.builtin import builtin_model_path
from abft_fast.data import PAPER_DATASETS
from abft_fast.grid import read_cells
from tests.study_rows import largest_class, rows_of

pytestmark = pytest.mark.unit

WEIGHTS = "9ef8d1cd07a50bae04d148bcdfb44ef2100d9b47bdeaa3c2e7850661a4fe79b0"
ROOT = Path(__file__).parents[2]
SCIENCE = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
UNTRAINED = {"Vanilla": "vanilla", "Calibrate (contextual)": "contextual"}


@pytest.fixture(scope="module")
def study():
    return rows_of("builtin_study")


def test_the_rows_are_of_the_committed_weights():
    """With others, run the sweeps of configs/builtin/ and docs/experiments.md again."""
    weights = (builtin_model_path() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == WEIGHTS


@pytest.mark.parametrize("name", ["learning_rates", "study", "wrong_labels"])
def test_the_rows_are_of_cells_of_its_sweeps(name):
    cells = {cell.name for cell in read_cells(ROOT / "configs" / "builtin" / f"{name}.yaml", {})}
    assert {row["cell"] for row in rows_of(f"builtin_{name}")} <= cells


def table(titles):
    """Cells of the table that begins so, without their signs, by the first of each line."""
    lines = SCIENCE[SCIENCE.index(f"| {titles} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" *+") for cell in line.split("|")[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def setting(method):
    return UNTRAINED.get(method, method.removeprefix("ABFT, "))


def same(cells, values, decimals):
    assert [float(cell) for cell in cells] == pytest.approx(values, abs=0.501 * 10**-decimals)


def test_the_table_of_accuracies(study):
    told = table("Method | SST2")
    shares = [100 * largest_class(name) for name in PAPER_DATASETS]
    same(told.pop("Largest class"), [*shares, fmean(shares)], decimals=2)
    assert {setting(method) for method in told} == {row["setting_name"] for row in study}
    for method, cells in told.items():
        means = [
            fmean(
                100 * float(row["accuracy"])
                for row in study
                if (row["setting_name"], row["dataset"]) == (setting(method), name)
                and row["evaluated_on"] == name
            )
            for name in PAPER_DATASETS
        ]
        same(cells, [*means, fmean(means)], decimals=2)


def test_the_table_of_averages(study):
    told = table("Method | Time")
    del told["Vanilla"]
    trained = {row["setting_name"] for row in study} - set(UNTRAINED.values())
    assert {setting(method) for method in told} == trained
    for method, cells in told.items():
        rows = [row for row in study if row["setting_name"] == setting(method)]
        inside = [row for row in rows if row["evaluated_on"] == row["dataset"]]
        outside = [row for row in rows if row["evaluated_on"] != row["dataset"]]
        scores = [
            100 * fmean(float(row[metric]) for row in part)
            for metric in ("accuracy", "macro_f1")
            for part in (inside, outside)
        ]
        same(cells[1:5], scores, decimals=2)
        share = 100 * fmean(float(row["correct_share_above_chance"]) for row in inside)
        heads = fmean(float(row["induction_heads"]) for row in inside)
        same(cells[5:], [share, heads], decimals=1)


def test_the_table_of_wrong_labels():
    told, found = table("wrong labels (%)"), {}
    for row in rows_of("builtin_wrong_labels"):
        method = {"vanilla": ", untrained", "ABFT": ""}[row["method"]]
        found.setdefault(row["dataset"].upper() + method, []).append(row)
    assert set(told) == set(found)
    for name, cells in told.items():
        rates = [f"accuracy_at_{rate}_percent_wrong" for rate in (0, 25, 50, 75, 100)]
        same(
            cells,
            [fmean(100 * float(row[rate]) for row in found[name]) for rate in rates],
            decimals=1,
        )
