"""The study of real models: rows are cells of its sweeps, and pages say what the rows say."""

import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from abft_fast.experiments.grid import read_cells
from tests.study_rows import largest_class, rows_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
NAMES = {
    "Vanilla": "vanilla",
    "Calibrate (contextual)": "contextual",
    "E2E": "E2E",
    "ABFT": "ABFT",
    "ABFT, seen labels": "ABFT, seen labels",
}
FULL_ON_SST2 = "gemma-3-270m.gguf-sst2-ABFT-seed0-11df166d66"


@pytest.fixture(scope="module")
def accuracies():
    """Gemma's, by setting and dataset: of one seed, or mean and standard error over seeds."""
    found = defaultdict(dict)
    for row in rows_of("real_study"):
        if "gemma" in row["model"]:
            of_seeds = found[row["setting_name"], row["dataset"]]
            if row["mixed_precision"] == "no" or row["seed"] not in of_seeds:
                of_seeds[row["seed"]] = 100 * float(row["accuracy"])
    return {cell: shown(list(of_seeds.values())) for cell, of_seeds in found.items()}


def shown(values):
    mean = f"{statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def test_rows_are_cells_of_the_sweeps():
    cells = {
        (precision, cell.name)
        for precision, options in (("no", {}), ("bf16", {"mixed_precision": "bf16"}))
        for sweep in (ROOT / "configs/real").glob("*.yaml")
        for cell in read_cells(sweep, options)
    }
    files = (
        "real_study", "real_streamed", "real_out_of_domain", "real_sensitivity", "real_rates",
        "real_others",
    )  # fmt: skip
    rows = [row for file in files for row in rows_of(file)]
    assert {(row.get("mixed_precision", "no"), row["cell"]) for row in rows} <= cells


def table(title, page="science/real-models.md", after=""):
    """The cells of a table of a page, line by line; its first column has this title."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = text[text.index(after) :]
    of_the_table = text[text.index(f"| {title} |") :].split("\n\n")[0]
    titles, _, *lines = (line.strip("| ").split(" | ") for line in of_the_table.splitlines())
    return [title.lower() for title in titles[1:]], lines


@pytest.mark.parametrize("page", ["science/real-models.md", "../README.md"])
def test_the_tables_of_accuracy_say_what_the_rows_say(page, accuracies):
    """The page's table has all of these rows, README's has some of them."""
    (*datasets, average), lines = table("Method", page)
    assert average == "average"
    said = {}
    for method, *cells, mean in lines:
        if "-" in cells:
            assert mean == "-"
        else:
            values = [float(cell.split(" ± ")[0]) for cell in cells]
            assert float(mean) == pytest.approx(statistics.fmean(values), abs=0.01)
        if method == "Largest class":
            assert cells == [f"{100 * largest_class(dataset):.2f}" for dataset in datasets]
            continue
        setting = NAMES[method]
        said |= {(setting, d): cell for d, cell in zip(datasets, cells, strict=True) if cell != "-"}
    of_the_methods = {cell: text for cell, text in accuracies.items() if cell[0] in NAMES.values()}
    if page == "../README.md":
        of_the_methods = {cell: text for cell, text in of_the_methods.items() if cell in said}
    assert said == of_the_methods


def test_the_table_of_the_control_says_what_the_rows_say():
    rows = {
        (row["setting_name"], row["dataset"]): row
        for row in rows_of("real_study")
        if row["seed"] == "0" and row["mixed_precision"] == "no"
    }
    titles, lines = table("Control of A, seed 0")
    for setting, (_, *cells) in zip(("ABFT", "ABFT, PID x 10"), lines, strict=True):
        found = [rows[setting, dataset] for dataset in titles[::2]]
        figures = ((100 * float(r["accuracy"]), float(r["induction_heads"])) for r in found)
        assert cells == [text for a, heads in figures for text in (f"{a:.2f}", f"{heads:.1f}")]


def test_the_table_of_bfloat16_says_what_the_rows_say():
    rows = {
        (row["setting_name"], row["mixed_precision"]): row
        for row in rows_of("real_study")
        if row["dataset"] == "sst2" and row["seed"] in ("", "0") and "gemma" in row["model"]
    }
    _, lines = table("Gemma on SST2, seed 0")
    for name, *cells in lines:
        setting, precision = name.split(", ")
        row = rows[NAMES[setting], {"float32": "no", "bfloat16": "bf16"}[precision]]
        heads = row["induction_heads"] and f"{float(row['induction_heads']):.1f}"
        assert cells == [f"{100 * float(row['accuracy']):.2f}", heads or "-"]
    assert len(lines) == 4


@pytest.mark.parametrize("trained_on", ["SST2", "TREC"])
def test_the_tables_out_of_domain_say_what_the_rows_say(trained_on, accuracies):
    rows = {
        (r["method"], r["evaluated_on"]): r["accuracy"]
        for r in rows_of("real_out_of_domain")
        if r["dataset"] == trained_on.lower()
    }
    (*datasets, _), lines = table(f"Trained on {trained_on}")
    assert datasets[0] == trained_on.lower() and len(lines) == 3
    for method, *cells, mean in lines:
        if method == "Vanilla":
            assert cells == [accuracies["vanilla", dataset] for dataset in datasets]
        else:
            assert cells == [f"{100 * float(rows[method, dataset]):.2f}" for dataset in datasets]
        assert float(mean) == pytest.approx(statistics.fmean(map(float, cells[1:])), abs=0.01)


def test_the_table_of_qwen_says_what_the_rows_say():
    rows = {
        (row["setting_name"], f"{size} {row['dataset']}"): row
        for row in rows_of("real_study")
        for size in re.findall(r"qwen2\.5-coder-(.*)-instruct", row["model"])
    }
    titles, lines = table("Qwen")
    cells = [title.replace(" in nf4", "").replace(",", "") for title in titles]
    said = {
        (NAMES[name], cell): text
        for name, *texts in lines
        for cell, text in zip(cells, texts, strict=True)
        if text != "-"
    }
    assert said == {cell: f"{100 * float(row['accuracy']):.2f}" for cell, row in rows.items()}


def test_the_table_of_what_is_left_out_says_what_the_rows_say():
    names = {"nothing": "ABFT", "control": "w/o PID", "control, filter": "w/o PID, w/o head filter"}
    rows = {
        (row["setting_name"], row["dataset"]): row
        for row in sorted(rows_of("real_study"), key=lambda row: row["mixed_precision"] == "no")
        if row["seed"] == "0" and "gemma" in row["model"]
    }
    titles, lines = table("Left out, seed 0")
    said = set()
    for name, *cells in lines:
        for dataset, *cell in zip(titles[::2], cells[::2], cells[1::2], strict=True):
            row = rows.get((names[name], dataset))
            said.add((names[name], dataset))
            assert cell == (["-", "-"] if row is None else figures_of(row))
    assert {cell for cell in rows if cell[0].startswith("w/o")} <= said


def figures_of(row):
    """Accuracy and induction heads, as a page shows them."""
    return [f"{100 * float(row['accuracy']):.2f}", f"{float(row['induction_heads']):.1f}"]


def test_the_table_of_consistency_says_what_the_rows_say():
    rows = {(r["setting_name"], r["test_type"]): r for r in rows_of("real_sensitivity")}
    _, lines = table("Consistency")
    said = {
        (NAMES[name], test): cell
        for name, *cells in lines
        for test, cell in zip(("TempSensitivity", "DemoSensitivity"), cells, strict=True)
    }
    assert said == {cell: f"{100 * float(row['consistency']):.2f}" for cell, row in rows.items()}


def test_the_table_of_blocks_says_what_the_rows_say():
    _, (full, *lines) = table("Gradient")
    rows = {row["gradient"]: row for row in rows_of("real_streamed")}
    whole = next(row for row in rows_of("real_study") if row["cell"] == FULL_ON_SST2)
    assert [line[0].split(",")[0].split()[-1] for line in lines] == ["4", "2", "local"]
    for line, row in zip((full, *lines), (whole, rows["4"], rows["2"], rows["local"]), strict=True):
        accuracy, share = (float(row[n]) for n in ("accuracy", "correct_share_above_chance"))
        heads = f"{float(row['induction_heads']):.1f}"
        assert line[1:] == [f"{100 * accuracy:.2f}", heads, f"{100 * share:.1f}"]


def test_the_table_of_rates_says_what_the_rows_say():
    _, lines = table("Gemma on agnews")
    names = {"local": "local", "4": "blocks of 4", "": "Vanilla"}
    rows = {
        f"{names[row['gradient']]}, {row['lr']}".removesuffix(", "): row
        for row in rows_of("real_rates")
        if row["dataset"] == "agnews"
    }
    assert sorted(line[0] for line in lines) == sorted(rows)
    for name, accuracy, heads in lines:
        if name == "Vanilla":
            assert [accuracy, heads] == [f"{100 * float(rows[name]['accuracy']):.2f}", "-"]
        else:
            assert [accuracy, heads] == figures_of(rows[name])


def test_the_table_of_local_says_what_the_rows_say():
    _, lines = table("Gemma, seed 0")
    datasets = [line[0].lower() for line in lines]
    found = {
        (row["setting_name"], row["dataset"]): row
        for row in rows_of("real_study")
        if "gemma" in row["model"] and row["mixed_precision"] == "no" and row["seed"] in ("", "0")
    }
    locally = {r["dataset"]: r for r in rows_of("real_rates") if r["dataset"] != "agnews"}
    assert set(locally) == set(datasets)
    for (_, vanilla, *trained), dataset in zip(lines, datasets, strict=True):
        assert vanilla == f"{100 * float(found['vanilla', dataset]['accuracy']):.2f}"
        full = figures_of(found["ABFT", dataset])
        assert trained == [*figures_of(locally[dataset]), *full]


def reached(rows, setting, dataset):
    """Accuracy and induction heads of a setting, as a page shows them."""
    own = [
        row
        for row in rows_of(rows)
        if row["setting_name"] == setting
        and row["dataset"] == row["evaluated_on"] == dataset
        and "qwen" not in row.get("model", "")
    ]
    heads = statistics.fmean(float(row["induction_heads"]) for row in own)
    return [shown([100 * float(row["accuracy"]) for row in own]), f"{heads:.1f}"]


@pytest.mark.parametrize(
    ("part", "papers", "ours"),
    [
        ("## Gemma 3 270M", "real_study", "real_study"),
        ("## The built-in model", "builtin_study", "builtin_seen_labels"),
    ],
)
def test_the_page_on_seen_labels_says_what_the_rows_say(part, papers, ours, accuracies):
    _, lines = table("Dataset", "science/seen-labels.md", part)
    for name, *cells in lines:
        dataset = name.lower()
        vanilla = [accuracies["vanilla", dataset]] if papers == "real_study" else []
        both = reached(papers, "ABFT", dataset), reached(ours, "ABFT, seen labels", dataset)
        assert cells == [*vanilla, *both[0], *both[1]]


def test_readme_says_what_the_rows_of_qwen_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"from ([\d.]+) to ([\d.]+) on (SST2|TREC|SUBJ)", text)
    rows = [row for row in rows_of("real_study") if "qwen2.5-coder-0.5b" in row["model"]]
    found = {(r["setting_name"], r["dataset"]): f"{100 * float(r['accuracy']):.2f}" for r in rows}
    assert len(said) == 3
    for before, after, name in said:
        assert [before, after] == [found[s, name.lower()] for s in ("vanilla", "ABFT")]


def test_readme_says_what_the_rows_say(accuracies):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = ("Vanilla", "Calibrate (contextual)", "ABFT")
    said = re.search(r"^\| SST2.*\n\| ---.*\n\| accuracy \(%\) \| (.*) \|$", text, re.MULTILINE)
    assert said[1].split(" | ") == [accuracies[NAMES[name], "sst2"] for name in shown]
