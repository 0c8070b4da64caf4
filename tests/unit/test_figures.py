"""Figures from the folders of runs: rows by hand, and pictures that say what they show."""

import csv
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from abft_fast import plots
from abft_fast.errors import UserError
from abft_fast.experiments.figures import pictures
from abft_fast.experiments.figures.make import make_figure
from abft_fast.experiments.figures.rows import ROWS
from abft_fast.experiments.records import Record
from abft_fast.options import FigureConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit


def make_run(folder, steps=4, before=None, after=0.5, **options):
    config = resolve(TrainConfig, {"dataset": "subj", **options})
    run = RunFolder(folder)
    run.create(config, 10, {}, {"versions": {}})
    for step in range(1, steps + 1):
        run.append_metrics(
            {
                "step": step, "loss": 1.0, "attention_loss": 10.0 / step + config.seed,
                "induction_heads": 5.0 + step, "seconds": 1.0, "peak_memory_bytes": 1,
                "correct_share_above_chance": None if step == 1 else 0.1 * step,
            }
        )  # fmt: skip
    for side, score in (("before", before), ("after", after)):
        if score is not None:
            metrics = {config.dataset_name: {"accuracy": score}}
            run.record_evaluation(side, metrics, {config.dataset_name: {}})
    return folder


def figure(what, folder, out, **options):
    config = resolve(FigureConfig, {"what": what, "runs": [folder], "output_dir": out, **options})
    table, picture = make_figure(config)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [e.text or "" for e in ElementTree.parse(picture).iter() if e.tag.endswith("}text")]
    return rows, texts


def test_a_seed_that_ran_twice_counts_once():
    rows = [{"seed": s, "accuracy": a} for s, a in ((0, 0.1), (0, 0.3), (1, 0.4), (1, None))]
    assert pictures._values(rows, "accuracy") == pytest.approx([0.2, 0.4])


def test_models_and_calibration_samples_are_not_mixed(tmp_path):
    for model in ("builtin", "synthetic:qwen2.5-0.5b"):
        name = model.rpartition(":")[2]
        make_run(tmp_path / f"runs/{name}", model=model, before=0.4, train_samples=64)
    rows, _ = figure("data", tmp_path / "runs", tmp_path / "out")
    untrained = [row for row in rows if not row["train_samples"]]
    assert len(untrained) == 2 and len({row["setting"] for row in untrained}) == 2
    rows, texts = figure("factors", tmp_path / "runs", tmp_path / "out")
    assert len({row["setting"] for row in rows}) == 2
    assert sum("control of A" in text for text in texts) == 2
    for samples in (32, 512):
        make_run(
            tmp_path / f"calibrated/{samples}", before=0.4, calibration="contextual",
            calibration_samples=samples,
        )  # fmt: skip
    rows, _ = figure("demonstrations", tmp_path / "calibrated", tmp_path / "out")
    assert len({row["setting"] for row in rows if row["seed"]}) == 2


def test_paths_are_short_as_long_as_they_differ(tmp_path):
    for model in ("runs/a/model", "runs/b/model", "gpt2"):
        make_run(tmp_path / f"runs/{model}", model=model)
    rows, _ = figure("data", tmp_path / "runs", tmp_path / "out")
    names = {f"ABFT, model={name}" for name in ("runs/a/model", "runs/b/model", "gpt2")}
    assert {row["setting"] for row in rows} == names


def test_the_legend_names_what_any_panel_shows(runs, tmp_path):
    make_run(tmp_path / "runs/last", dataset="trec", k=8)
    make_run(tmp_path / "runs/unseen", dataset="trec", test_type="UnseenLabel", k=8)
    _, texts = figure("unseen", tmp_path / "runs", tmp_path / "out")
    assert {"Normal", "UnseenLabel", "± s.d. over seeds"} <= set(texts)
    _, texts = figure("data", tmp_path / "runs/last", tmp_path / "out")
    assert "± s.d. over seeds" not in texts
    _, texts = figure("data", tmp_path / "runs", tmp_path / "out")
    assert {"ABFT, k=4, test_type=Normal", "ABFT, k=8, test_type=Normal"} <= set(texts)


def records_of(*runs):
    """Finished records; of each its method, dataset, scores before and after, labels, options."""
    for method, dataset, before, after, labels, options in runs:
        sides = {"before": before, "after": after}
        yield Record(
            Path("nowhere"), method,
            {"model": "m", "dataset": dataset, "seed": 0, "calibration": "none", **options}, labels,
            evaluation={s: {dataset: {"accuracy": x}} for s, x in sides.items() if x is not None},
        )  # fmt: skip


def test_a_score_before_training_stays_unless_a_run_without_training_has_it():
    records = [
        *records_of(
            ("vanilla", "sst2", None, 0.4, {"setting": "full"}, {"stream": True}),
            ("ABFT", "sst2", 0.4, 0.6, {"setting": "full"}, {}),
            ("E2E", "sst2", 0.4, 0.7, {"setting": "full"}, {}),
            ("ABFT", "subj", 0.3, 0.5, {"setting": "full"}, {}),
            ("ABFT", "subj", 0.5, 0.6, {"setting": "full"}, {"calibration": "batch"}),
            ("ABFT", "subj", 0.2, 0.6, {"setting": "full"}, {"model": "n"}),
        )
    ]
    rows = [(*list(row.values())[:3], row["accuracy"]) for row in ROWS["data"](records, "accuracy")]
    assert rows == [
        ("subj", "vanilla, model=m", None, 0.3), ("subj", "batch", None, 0.5),
        ("subj", "vanilla, model=n", None, 0.2), ("sst2", "vanilla, model=m", 0, 0.4),
        ("sst2", "ABFT, full, model=m, calibration=none", 0, 0.6), ("sst2", "E2E, full", 0, 0.7),
        ("subj", "ABFT, full, model=m, calibration=none", 0, 0.5),
        ("subj", "ABFT, full, model=m, calibration=batch", 0, 0.6),
        ("subj", "ABFT, full, model=n, calibration=none", 0, 0.6),
    ]  # fmt: skip


def test_the_last_batch_is_no_larger_than_what_is_left(tmp_path):
    make_run(tmp_path / "runs/a", train_samples=50, epochs=2)
    rows, _ = figure("heads", tmp_path / "runs", tmp_path / "out")
    assert [row["samples"] for row in rows] == ["32", "64", "96", "100"]


def test_a_figure_without_its_subject_is_refused(tmp_path):
    make_run(tmp_path / "runs/normal")
    with pytest.raises(UserError, match="a finished test with --test-type UnseenLabel"):
        figure("unseen", tmp_path / "runs", tmp_path / "out")
    make_run(tmp_path / "runs/unseen", test_type="UnseenLabel")
    rows, _ = figure("unseen", tmp_path / "runs", tmp_path / "out")
    assert {row["test_type"] for row in rows} == {"Normal", "UnseenLabel"}


def test_names_have_no_folders_and_no_options_that_are_newer_than_a_run(tmp_path):
    (tmp_path / "r.csv").write_text("text,label\ngood,yes\nbad,no\n")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("input_prefix: 'Text: '\n")
        files = {"dataset": str(tmp_path / "r.csv"), "template": str(tmp_path / f"{name}.yaml")}
        folder = make_run(tmp_path / "runs" / name, **files)
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("seen_labels_only:", "objective:"))]
    assert len(older) == len(lines) - 2
    (folder / "config.yaml").write_text("".join(older))
    rows, _ = figure("data", tmp_path / "runs", tmp_path / "out")
    assert {row["setting"] for row in rows} == {"ABFT, template=a.yaml", "ABFT, template=b.yaml"}


@pytest.fixture
def runs(tmp_path):
    """Two datasets, two methods, two seeds."""
    for dataset in ("subj", "sst2"):
        for method in ("ABFT", "E2E"):
            for seed in (0, 1):
                after = 0.6 + 0.1 * seed + 0.05 * (method == "E2E")
                make_run(
                    tmp_path / f"runs/{dataset}-{method}-{seed}", dataset=dataset, method=method,
                    seed=seed, before=0.4, after=after,
                )  # fmt: skip
    return tmp_path / "runs"


def test_heads_are_a_row_a_step_over_samples(runs, tmp_path):
    rows, texts = figure("heads", runs, tmp_path / "out")
    assert len(rows) == 8 * 4
    assert {row["setting"] for row in rows} == {"ABFT", "E2E"}
    first = [r for r in rows if (r["dataset"], r["setting"], r["seed"]) == ("subj", "E2E", "1")]
    assert [(r["samples"], r["induction_heads"]) for r in first] == [
        ("32", "6.0"), ("64", "7.0"), ("96", "8.0"), ("128", "9.0"),
    ]  # fmt: skip
    assert {"subj", "sst2", "ABFT", "E2E", "induction heads a prompt"} <= set(texts)


def test_losses_have_every_methods_attention_loss_and_share(runs, tmp_path):
    rows, texts = figure("losses", runs, tmp_path / "out")
    seed_1 = [r for r in rows if (r["dataset"], r["setting"], r["seed"]) == ("sst2", "E2E", "1")]
    assert [float(r["attention_loss"]) for r in seed_1] == pytest.approx([11, 6, 10 / 3 + 1, 3.5])
    assert [r["correct_share_above_chance"] for r in seed_1[:2]] == ["", "0.2"]
    assert texts.count("ABFT's loss of a batch") == 2
    assert texts.count("correct share above chance (%)") == 2


def test_scores_over_prompts_have_the_untrained_model_once(tmp_path):
    for count in (32, 512):
        for seed in (0, 1):
            make_run(
                tmp_path / f"runs/{count}-{seed}", train_samples=count, seed=seed, before=0.4,
                after=count / 1024 + seed / 10,
            )  # fmt: skip
    rows, texts = figure("data", tmp_path / "runs", tmp_path / "out")
    assert [(r["setting"], r["train_samples"]) for r in rows if r["setting"] == "vanilla"] == [
        ("vanilla", "")
    ]
    trained = sorted((r["train_samples"], r["accuracy"]) for r in rows[1:])
    assert trained == [("32", "0.03125"), ("32", "0.13125"), ("512", "0.5"), ("512", "0.6")]
    assert {"32", "512", "training prompts", "accuracy (%)"} <= set(texts)


def test_factors_are_means_of_seeds_by_a_and_b_and_control(tmp_path):
    cells = [(c, a, b) for c in ("pid", "none") for a in (0.25, 0.5) for b in (1, 2)]
    for i, (control, penalty, reward) in enumerate(cells):
        for seed in (0, 1):
            make_run(
                tmp_path / f"runs/{i}-{seed}", adaptation=control, penalty=penalty,
                reward=reward, seed=seed, after=(i + seed) / 10,
            )  # fmt: skip
    rows, texts = figure("factors", tmp_path / "runs", tmp_path / "out")
    assert len(rows) == 16
    assert [t for t in texts if "." in t and t not in ("0.25", "0.5")][:8] == [
        f"{10 * i + 5:.1f}" for i in range(8)
    ]
    assert {"A at the start, penalty", "B, reward"} <= set(texts)


def test_factors_that_lack_a_dataset_are_left_empty(tmp_path):
    for penalty, dataset, score in ((0.5, "sst2", 0.9), (0.5, "trec", 0.3), (1.0, "sst2", 0.8)):
        make_run(
            tmp_path / f"runs/{penalty}-{dataset}", penalty=penalty, dataset=dataset, after=score
        )
    _, texts = figure("factors", tmp_path / "runs", tmp_path / "out")
    assert "60.0" in texts and "80.0" not in texts
    assert any(text.endswith("mean of 2 datasets") for text in texts)
    shutil.rmtree(tmp_path / "runs/0.5-sst2")
    with pytest.raises(UserError, match="no A and B was tested on all of 2 datasets"):
        figure("factors", tmp_path / "runs", tmp_path / "out")


def test_templates_are_settings_and_files_of_one_name_are_refused(tmp_path):
    """Else two runs would be two seeds of one."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.csv").write_text("text,label\ngood,yes\nbad,no\n")
    (tmp_path / "t.yaml").write_text("input_prefix: 'Text: '\n")
    own = str(tmp_path / "x/r.csv")
    make_run(tmp_path / "runs/plain", dataset=own, after=0.9)
    make_run(tmp_path / "runs/other", dataset=own, after=0.5, template=str(tmp_path / "t.yaml"))
    rows, _ = figure("data", tmp_path / "runs", tmp_path / "out")
    assert len({row["setting"] for row in rows}) == 2
    make_run(tmp_path / "runs/third", dataset=str(tmp_path / "y/r.csv"), after=0.1)
    with pytest.raises(UserError, match="two datasets are called r"):
        figure("data", tmp_path / "runs", tmp_path / "out")


def test_unseen_labels_and_demonstrations(tmp_path):
    for test in ("Normal", "UnseenLabel"):
        for k in (2, 4):
            score = 0.7 if test == "Normal" else 0.2
            make_run(tmp_path / f"runs/{test}-{k}", test_type=test, k=k, after=score)
    rows, texts = figure("unseen", tmp_path / "runs", tmp_path / "out")
    found = {(r["setting"], r["test_type"]): r["accuracy"] for r in rows}
    assert found["ABFT, k=2", "UnseenLabel"] == "0.2" and found["ABFT, k=4", "Normal"] == "0.7"
    assert {"Normal", "UnseenLabel"} <= set(texts)
    rows, texts = figure("demonstrations", tmp_path / "runs/Normal-2", tmp_path / "out")
    assert [(r["k"], r["accuracy"]) for r in rows] == [("2", "0.7")] and "demonstrations" in texts


@pytest.mark.parametrize("what", ROWS)
def test_runs_without_what_is_shown_are_one_line(what, tmp_path):
    make_run(tmp_path / "runs/a", steps=0, after=None)
    with pytest.raises(UserError, match=f"^figure {what}: none of 1 run.s. has what it shows: "):
        figure(what, tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_or_folder_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        figure("heads", tmp_path / "none", tmp_path / "out")
    monkeypatch.setattr(plots, "NEEDED", ("not_there",))
    with pytest.raises(UserError, match=r"abft-fast figure needs not_there.*abft-fast\[plots\]"):
        figure("heads", tmp_path / "none", tmp_path / "out")
