"""Tables of run folders whose numbers are worked out by hand."""

import re
from dataclasses import replace

import pytest

from abft_fast.errors import UserError
from abft_fast.experiments.cell_folder import CellFolder
from abft_fast.experiments.grid import read_cells
from abft_fast.experiments.records import read_records
from abft_fast.experiments.results import write_results
from abft_fast.experiments.tables.format import FORMATS
from abft_fast.experiments.tables.layouts import make_table
from abft_fast.experiments.tables.types import Entry, Table
from abft_fast.options import TableConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.files import write_json
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit


def write_run(root, before=None, after=None, seconds=None, parameters=1, **options):
    """A run folder as `train` writes it, with the accuracies given."""
    folder = root / re.sub(r"[^\w.]+", "-", "-".join(map(str, ("run", *options.values()))))
    config = resolve(TrainConfig, options)
    run = RunFolder(folder)
    run.create(config, parameters, {}, {})
    metric = "accuracy" if config.test_type == "Normal" else "consistency"
    for side, given in (("before", before), ("after", after)):
        scores = {config.dataset_name: given} if isinstance(given, float) else given
        if scores:
            metrics = {dataset: {metric: score} for dataset, score in scores.items()}
            run.record_evaluation(side, metrics, {})
    for step, taken in enumerate(seconds or [], 1):
        run.append_metrics({"step": step, "seconds": taken, "peak_memory_bytes": 5})
    return folder


def show(folder, form="markdown", **options):
    config = resolve(TableConfig, {"folder": folder, "format": form, **options})
    text = FORMATS[form](make_table(config, read_records(folder)))
    return text.replace("\N{MULTIPLICATION SIGN}", "x").splitlines()


@pytest.fixture
def seeds(tmp_path):
    """Two seeds on two datasets, and one of another method on one of them."""
    for seed, sst2, subj in ((0, 0.60, 0.70), (1, 0.64, 0.72)):
        write_run(tmp_path, 0.50, sst2, dataset="sst2", seed=seed)
        write_run(tmp_path, 0.55, subj, dataset="subj", seed=seed)
    write_run(tmp_path, None, 0.80, dataset="subj", seed=0, method="E2E")
    return tmp_path


def test_layout_1(seeds):
    assert show(seeds) == [
        "| Model | Method | Seeds | SST2 | SUBJ | Average |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| builtin | Vanilla | 1 | 50.00 | 55.00 | 52.50 |",
        "|  | E2E | 1 | missing | **80.00** | 80.00 (1 of 2 datasets) |",
        "|  | ABFT | 2 | **62.00** ± 2.83 | 71.00 ± 1.41 | **66.50** ± 2.12 |",
        "",
        "±: sample standard deviation over seeds.",
    ]


def test_layout_1_in_latex(seeds):
    assert show(seeds, "latex") == [
        r"\begin{tabular}{lllrrr}",
        r"\toprule",
        r"Model & Method & Seeds & SST2 & SUBJ & Average \\",
        r"\midrule",
        r"builtin & Vanilla & 1 & 50.00 & 55.00 & 52.50 \\",
        r" & E2E & 1 & missing & \textbf{80.00} & 80.00 (1 of 2 datasets) \\",
        r" & ABFT & 2 & \textbf{62.00}$_{2.83}$ & 71.00$_{1.41}$ & \textbf{66.50}$_{2.12}$ \\",
        r"\bottomrule",
        r"\end{tabular}",
        "% Subscripts: sample standard deviation over seeds.",
    ]


def test_a_seed_that_lacks_a_dataset_gives_the_average_no_deviation(seeds):
    write_run(seeds, None, 0.74, dataset="subj", seed=2)
    line = show(seeds)[-3]
    assert line.endswith("| 2-3 | **62.00** ± 2.83 | 72.00 ± 2.00 | **67.00** |")


def test_other_options_are_other_rows_and_latex_is_escaped(seeds):
    write_run(seeds, 0.40, 0.45, dataset="sst2", seed=0, k=8)
    write_run(seeds, 0.50, 0.47, dataset="sst2", seed=0, head_filter=False, adaptation="pid")
    methods = [line.split(" | ")[1] for line in show(seeds)[2:-2]]
    assert methods == [
        "Vanilla (k=4)", "Vanilla (k=8)", "E2E", "ABFT (k=4, head_filter=True)",
        "ABFT (k=8, head_filter=True)", "ABFT (k=4, head_filter=False)",
    ]  # fmt: skip
    assert any(r"head\_filter=False" in line for line in show(seeds, "latex"))


def test_the_best_is_that_of_one_test(tmp_path):
    """Fewer demonstrations are another test, and calibration is another method of the same one."""
    write_run(tmp_path, 0.4, 0.5, dataset="sst2", k=8)
    write_run(tmp_path, 0.6, 0.9, dataset="sst2", k=4)
    calibration = {"calibration": "contextual", "calibration_samples": 32}
    write_run(tmp_path, 0.7, 0.8, dataset="sst2", k=8, **calibration)
    scores = {line.split("|")[2].strip(): line.split("|")[4].strip() for line in show(tmp_path)[2:]}
    assert [name for name, score in scores.items() if score.startswith("**")] == [
        "ABFT (k=4, calibration=none, calibration_samples=512)",
        "ABFT (k=8, calibration=contextual, calibration_samples=32)",
    ]


def test_methods_are_in_order_whatever_their_settings(tmp_path):
    for method in ("MetaICL", "E2E", "ABFT"):
        for k in (4, 8):
            write_run(tmp_path, None, 0.5, dataset="sst2", method=method, k=k)
    names = [line.split(" | ")[1].split(" ")[0] for line in show(tmp_path)[2:]]
    assert names == ["E2E", "E2E", "MetaICL", "MetaICL", "ABFT", "ABFT"]


def test_names_are_text_in_every_format():
    names = ["[b]|x", "*a* _b_ a_b", "<i>$x$ `c`~d\\"]
    table = Table([*names], [[*names], ["[2]", "two\n\nlines", Entry(0.5, note="a|_b_")]])
    _, _, first, second = FORMATS["markdown"](table).splitlines()
    assert first == (
        r"| \[b\]\|x | \*a\* \_b\_ a_b | \<i\>\$x\$ \`c\`\~d\\ |"
    )  # fmt: skip
    assert second == r"| \[2\] | two lines | 50.00 (a\|\_b\_) |"
    latex = FORMATS["latex"](table).splitlines()
    assert latex[2] == (
        r"{[}b]\textbar{}x & {*}a{*} \_b\_ a\_b & \textless{}i\textgreater{}\$x\$ "
        r"`c`\textasciitilde{}d\textbackslash{} \\"
    )
    assert latex[-3] == r"{[}2] & two lines & 50.00 (a\textbar{}\_b\_) \\"  # \\[2] is a length


def test_a_corpus_that_is_not_the_papers_is_named(tmp_path):
    for method in ("MetaICL", "PICL"):
        write_run(
            tmp_path, 0.5, 0.6, [1.0], dataset="sst2", method=method, train_samples=64, lr=1e-3
        )
    write_run(tmp_path, 0.5, 0.7, [1.0], dataset="sst2")
    meta, picl = (
        f"{method} (on 64 prompts, not its paper's corpus)" for method in ("MetaICL", "PICL")
    )
    for layout in ("1", "2", "4"):
        names = [line.split(" | ")[1] for line in show(tmp_path, layout=layout)[2:]]
        assert names[-3:] == [meta, picl, "ABFT"]
    write_run(tmp_path, 0.5, 0.6, [1.0], dataset="sst2", method="PICL", train_samples=32, lr=1e-3)
    names = [line.split(" | ")[1] for line in show(tmp_path)[2:]]
    assert {meta, picl, "PICL (on 32 prompts, not its paper's corpus)"} <= set(names)


def test_layout_3_names_a_corpus_that_is_not_the_papers(tmp_path):
    write_run(tmp_path, 0.5, 0.6, dataset="sst2", method="PICL", test_type="TempSensitivity")
    titles = show(tmp_path, layout="3")[0]
    assert "| Template, w/ PICL (on 512 prompts, not its paper's corpus) |" in titles


def test_layout_2(tmp_path):
    """Out of domain is the mean over the datasets a run was not trained on."""
    before = {"sst2": 0.50, "subj": 0.60, "trec": 0.40}
    for method, factor, parameters in (("ABFT", 1, 2_500_000), ("E2E", 3, 40_000)):
        write_run(
            tmp_path, before, {"sst2": 0.70, "subj": 0.50, "trec": 0.30}, [factor, factor],
            parameters, dataset="sst2", method=method,
        )  # fmt: skip
        write_run(
            tmp_path, before, {"sst2": 0.48, "subj": 0.80, "trec": 0.42}, [2 * factor],
            parameters, dataset="subj", method=method,
        )  # fmt: skip
    assert show(tmp_path, layout="2") == [
        "| Model | Method | Seeds | Param. | Time | In domain | Out of domain |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| builtin | Vanilla | 1 | - | - | 55.00 | 47.50 |",
        "|  | E2E | 1 | 40.0K | 3.0x | 75.00 | 42.50 |",
        "|  | ABFT | 1 | 2.5M | 1.0x | 75.00 | 42.50 |",
    ]


def test_layout_3(tmp_path):
    for test_type, before, after in (("TempSensitivity", 0.8, 0.9), ("DemoSensitivity", 0.6, 0.7)):
        write_run(tmp_path, before, after, dataset="sst2", test_type=test_type)
        write_run(tmp_path, before, after + 0.02, dataset="subj", test_type=test_type)
    write_run(tmp_path, 0.1, 0.1, dataset="subj", test_type="Normal")
    assert show(tmp_path, layout="3") == [
        "| Model | Seeds | Template, w/o | Template, w/ ABFT | Demonstration, w/o "
        "| Demonstration, w/ ABFT |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| builtin | 1 | 80.00 | 91.00 | 60.00 | 71.00 |",
    ]


def test_layout_3_of_runs_with_both_tests(tmp_path):
    both = ("TempSensitivity", "DemoSensitivity")
    run = RunFolder(write_run(tmp_path, seconds=[1.0], dataset="sst2", test_type=",".join(both)))
    for side, scores in (("before", (0.8, 0.6)), ("after", (0.9, 0.7))):
        metrics = {
            test: {"sst2": {"consistency": score}} for test, score in zip(both, scores, strict=True)
        }
        run.record_evaluation(side, metrics, {})
    assert show(tmp_path, layout="3")[-1] == "| builtin | 1 | 80.00 | 90.00 | 60.00 | 70.00 |"


def test_layout_4(tmp_path):
    write_run(tmp_path, 0.5, 0.7, [2.0, 2.0], dataset="sst2")
    write_run(tmp_path, 0.5, 0.6, [5.0], dataset="sst2", adaptation="none")
    assert show(tmp_path, layout="4") == [
        "| Model | Method | Seeds | Time | Average |",
        "| --- | --- | --- | ---: | ---: |",
        "| builtin | Vanilla | 1 | - | 50.00 |",
        "|  | ABFT (adaptation=pid) | 1 | 1.0x | 70.00 |",
        "|  | ABFT (adaptation=none) | 1 | 1.2x | 60.00 |",
    ]


def test_settings_that_differ_in_their_time_alone_are_lines_of_their_own(tmp_path):
    """The setting `ABFT` is the method itself, as a run without a sweep is."""
    runs = []
    for setting, seconds, options in (
        ("", 10.0, {"seed": 0}),
        ("ABFT", 10.0, {"seed": 1}),
        ("w/ checkpointing", 30.0, {"checkpointing": True}),
        ("w/o PID", 10.0, {"adaptation": "none"}),
    ):
        folder = write_run(tmp_path, None, 0.7, [seconds], dataset="sst2", **options)
        (record,) = [r for r in read_records(tmp_path) if r.folder == folder]
        runs.append(replace(record, labels={"setting": setting} if setting else {}))
    config = resolve(TableConfig, {"folder": tmp_path, "format": "markdown", "layout": "4"})
    lines = FORMATS["markdown"](make_table(config, runs)).replace("\N{MULTIPLICATION SIGN}", "x")
    assert lines.splitlines()[2:] == [
        "| builtin | ABFT | 2 | 1.0x | 70.00 ± 0.00 |",
        "|  | ABFT, w/ checkpointing | 1 | 3.0x | 70.00 |",
        "|  | ABFT, w/o PID | 1 | 1.0x | 70.00 |",
        "",
        "±: sample standard deviation over seeds.",
    ]


def test_a_setting_called_like_its_method_says_what_differs_from_a_run_without_one(tmp_path):
    for k, own in ((4, 0.5), (8, 0.9)):
        folder = write_run(tmp_path, dataset="sst2", test_type="LabelFollowing", k=k)
        RunFolder(folder).record_evaluation("after", {"sst2": {"own": own}}, {})
    runs = [
        replace(record, labels={"setting": "ABFT"} if record.options["k"] == 8 else {})
        for record in read_records(tmp_path)
    ]
    config = resolve(TableConfig, {"folder": tmp_path, "format": "markdown", "layout": "labels"})
    lines = FORMATS["markdown"](make_table(config, runs)).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["ABFT (k=4)", "ABFT (k=8)"]


def test_layout_labels(tmp_path):
    names = ("own", "rotated", "symbols", "override_rate", "prior_rate")
    for dataset, shift in (("sst2", 0.0), ("subj", 0.1)):
        options = {"dataset": dataset, "test_type": "LabelFollowing"}
        run = RunFolder(write_run(tmp_path, **options))
        for side, first in (("before", 0.1), ("after", 0.2)):
            scores = {name: first + 0.1 * i + shift for i, name in enumerate(names)}
            run.record_evaluation(side, {dataset: scores}, {})
    assert show(tmp_path, layout="labels") == [
        "| Model | Method | Seeds | Own | Rotated | New words "
        "| Follows rotation | Keeps own label |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| builtin | Vanilla | 1 | 15.00 | 25.00 | 35.00 | 45.00 | 55.00 |",
        "|  | ABFT | 1 | 25.00 | 35.00 | 45.00 | 55.00 | 65.00 |",
    ]
    with pytest.raises(UserError, match="layout 1: no run"):
        show(tmp_path)


def test_data_of_ones_own_are_columns_by_name(tmp_path):
    """Options that go with a dataset make no rows; two datasets of one name are refused."""
    for folder, name in (("a", "reviews.csv"), ("a", "mails.csv"), ("b", "reviews.csv")):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text,label\ngood,yes\nbad,no\n")
    runs = tmp_path / "runs"
    write_run(runs, 0.5, 0.7, seed=1, dataset=f"{tmp_path}/a/reviews.csv", label_column="label")
    write_run(runs, 0.5, 0.9, seed=2, dataset=f"{tmp_path}/a/mails.csv", label_column="kind")
    assert show(runs)[0] == "| Model | Method | Seeds | mails | reviews | Average |"
    assert show(runs)[-1] == "|  | ABFT | 1 | **90.00** | **70.00** | **80.00** |"
    write_run(runs, 0.5, 0.7, seed=3, dataset=f"{tmp_path}/b/reviews.csv")
    with pytest.raises(UserError, match="two datasets are called reviews: "):
        show(runs)


def test_runs_on_a_file_that_has_changed_are_no_seeds_of_one_another(tmp_path):
    data = tmp_path / "mails.csv"
    (tmp_path / "sweep.yaml").write_text(f"options: {{dataset: {data}, method: vanilla, k: 2}}")
    for text in ("good,yes\nbad,no\n" * 5, "good,no\nbad,yes\n" * 5):
        data.write_text("text,label\n" + text)
        (cell,) = read_cells(tmp_path / "sweep.yaml", {})
        place = CellFolder(tmp_path / "cells" / cell.name)
        place.prepare(cell)
        write_json(place.metrics, {"mails": {"accuracy": 0.5}})
    with pytest.raises(UserError, match=r"mails\.csv changed between .*vanilla.* and .*vanilla"):
        show(tmp_path)
    write_results(tmp_path / "results.csv", read_records(tmp_path))
    assert "data_sha256" in (tmp_path / "results.csv").read_text()


def test_what_tells_rows_of_results_apart(tmp_path):
    """Two models of one name; training runs whose tests were calibrated or not."""
    text = "grid: {model: [{big: {model: MODEL}}], calibration: [none, batch]}"
    for name in ("gpt2", "builtin"):
        (tmp_path / "sweep.yaml").write_text(text.replace("MODEL", name))
        for cell in read_cells(tmp_path / "sweep.yaml", {}):
            place = CellFolder(tmp_path / "cells" / cell.name)
            place.prepare(cell)
            score = 0.1 * len(name) + 0.01 * len(cell.config.calibration)
            place.run.mkdir()
            RunFolder(place.run).record_evaluation("after", {"subj": {"accuracy": score}}, {})
            place.finish(0, 1.0)
    assert [line.split(" | ")[:4] for line in show(tmp_path)[2:]] == [
        ["| big (builtin)", "ABFT (calibration=none)", "1", "74.00"],
        ["| ", "ABFT (calibration=batch)", "1", "**75.00**"],
        ["| big (gpt2)", "ABFT (calibration=none)", "1", "44.00"],
        ["| ", "ABFT (calibration=batch)", "1", "**45.00**"],
    ]
    write_results(tmp_path / "results.csv", read_records(tmp_path))
    header, *rows = (tmp_path / "results.csv").read_text().splitlines()
    place = header.split(",").index("calibration")
    assert sorted(row.split(",")[place] for row in rows) == ["batch", "batch", "none", "none"]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        show(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        show(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/config.yaml").write_text("model: {value: builtin}")
    with pytest.raises(UserError, match="holds no run"):
        show(tmp_path)
    folder = write_run(tmp_path, dataset="sst2")
    with pytest.raises(UserError, match=r"layout 1: no run below .* was evaluated for accuracy"):
        show(tmp_path)
    write_run(tmp_path, 0.5, 0.6, dataset="subj")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"run-sst2.evaluation.json is damaged"):
        show(tmp_path)


def test_cells_that_have_not_run_are_missing(tmp_path):
    (tmp_path / "sweep.yaml").write_text("grid: {method: [ABFT, vanilla], seed: [0, 1]}")
    for cell in read_cells(tmp_path / "sweep.yaml", {}):
        place = CellFolder(tmp_path / "cells" / cell.name)
        place.prepare(cell)
        place.prepare(cell)
        if cell.method == "vanilla":
            write_json(place.metrics, {"subj": {"accuracy": 0.5}})
    assert show(tmp_path)[2:] == [
        "| builtin | Vanilla | 1 | 50.00 | 50.00 |",
        "|  | ABFT | 0 | missing | missing |",
    ]
    options = place.folder / "cell.yaml"
    options.write_text(options.read_text().replace("k: 4", "k: 5"))
    with pytest.raises(UserError, match="was run with k 5, but this sweep asks for 4"):
        place.prepare(cell)


def test_a_cell_that_fails_again_is_not_said_to_fail_as_before(tmp_path):
    (tmp_path / "sweep.yaml").write_text("options: {method: vanilla, k: 2}")
    (cell,) = read_cells(tmp_path / "sweep.yaml", {})
    place = CellFolder(tmp_path / "cell")
    place.prepare(cell)
    place.start({"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}).wait()
    assert place.finish(1, 0.0)[1] != "exit code 1"
    with (place.folder / "output.log").open("a") as log:
        log.write("abft-fast: the disk is full\n")
    assert place.finish(1, 0.0)[1] == "the disk is full"
    place.start({"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}).wait()
    assert "full" not in place.finish(1, 0.0)[1]
