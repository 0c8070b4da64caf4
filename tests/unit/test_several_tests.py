"""A run that is trained once and tested in several ways, on fewer test examples than StaICC's."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from abft_fast import data
from abft_fast.commands.evaluate import evaluate
from abft_fast.commands.printing import print_evaluation, print_run
from abft_fast.commands.report import report
from abft_fast.commands.train import train
from abft_fast.experiments.figures.make import make_figure
from abft_fast.experiments.records import read_records
from abft_fast.experiments.results import write_results
from abft_fast.experiments.tables.format import FORMATS
from abft_fast.experiments.tables.layouts import make_table
from abft_fast.options import EvalConfig, FigureConfig, TableConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from abft_fast.training.run_folder import RunFolder

pytestmark = [pytest.mark.unit, pytest.mark.slow]

TESTS = ["Normal", "GLER", "UnseenLabel"]
OPTIONS = {"dataset": "mr", "k": 4, "device": "cpu"}
TRAINING = {"train_samples": 8, "pseudo_batch_size": 8, "epochs": 1, "no_report": True}


def trained(folder, **options):
    config = resolve(TrainConfig, OPTIONS | TRAINING | {"output_dir": folder} | options)
    return train(config, RunFolder.reserve(config), Progress())


@pytest.fixture(scope="module", autouse=True)
def few_test_examples():
    load = data.load

    def cut(name):
        dataset = load(name)
        return dataclasses.replace(dataset, test=dataset.test[:8])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", cut)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "several"
    return trained(folder, test_type="UnseenLabel,Normal,GLER")


def read(run, name):
    return json.loads((run.folder / f"{name}.json").read_text())


def test_its_files_have_what_a_run_with_one_test_has(run, tmp_path):
    assert run.options["test_type"] == "Normal,GLER,UnseenLabel"  # in one order, so one cell
    files = ("evaluation", "attention", "details-before", "details-after")
    several = {name: read(run, name) for name in files}
    single = trained(tmp_path / "single", test_type="UnseenLabel")
    one = {name: read(single, name) for name in files}
    for name in ("evaluation", "attention"):
        assert list(several[name]["after"]) == TESTS
        sides = {side: several[name][side]["UnseenLabel"] for side in ("before", "after")}
        assert sides == one[name]
    for name in ("details-before", "details-after"):
        assert list(several[name]) == TESTS and several[name]["UnseenLabel"] == one[name]
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run.folder / name).read_bytes() == (single.folder / name).read_bytes()
    metrics = several["evaluation"]["after"]
    assert metrics["Normal"] != metrics["UnseenLabel"] and len(metrics["GLER"]["mr"]) > 4


def test_eval_and_a_resumed_run_find_the_same(run, tmp_path, capsys):
    several = OPTIONS | {"test_type": ["GLER", "Normal"], "output": tmp_path / "e.json"}
    config = resolve(EvalConfig, several | {"adapter": str(run.folder / "adapter")})
    found = evaluate(config, Progress())
    expected = read(run, "evaluation")["after"]
    assert json.loads((tmp_path / "e.json").read_text()) == {t: expected[t] for t in TESTS[:2]}
    print_evaluation(config.test_type, *found)
    printed = capsys.readouterr().out
    for test in TESTS[:2]:
        assert f"{test}: induction heads a prompt" in printed

    whole = (run.folder / "evaluation.json").read_bytes()
    content = json.loads(whole)
    (run.folder / "evaluation.json").write_text(json.dumps({"before": content["before"]}))
    again, config = RunFolder.open(run.folder, {"resume": run.folder})
    train(config, again, Progress())
    assert (run.folder / "evaluation.json").read_bytes() == whole


def test_each_test_is_streamed_too(run, tmp_path):
    options = {"gradient": "local", "stream": True, "test_type": "Normal,UnseenLabel"}
    streamed = trained(tmp_path / "streamed", **options)
    for test in ("Normal", "UnseenLabel"):
        ours, theirs = (each.evaluation["before"][test]["mr"] for each in (streamed, run))
        assert ours == pytest.approx(theirs, abs=1e-4)
        for side in ("before", "after"):
            ours, theirs = (each.details(side)[test]["labels"] for each in (streamed, run))
            assert ours == theirs and len(ours) == 16


def test_a_table_a_figure_and_results_have_a_run_for_each_test(run, tmp_path):
    folder = run.folder.parent
    after = read(run, "evaluation")["after"]
    records = read_records(folder)
    assert [record.options["test_type"] for record in records] == TESTS
    table = FORMATS["markdown"](make_table(resolve(TableConfig, {"folder": folder}), records))
    for test in ("Normal", "UnseenLabel"):
        assert f"ABFT (test_type={test}) | 1 | " in table
        assert f" {100 * after[test]['mr']['accuracy']:.2f} " in table.replace("**", " ")
    write_results(tmp_path / "results.csv", records)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["test_type"], row["side"]) for row in rows] == [
        (test, side) for test in TESTS for side in ("before", "after")
    ]
    assert float(rows[-1]["accuracy"]) == after["UnseenLabel"]["mr"]["accuracy"]
    for what, count in (("unseen", 4), ("heads", 1), ("demonstrations", 4)):
        config = resolve(FigureConfig, {"what": what, "runs": [folder], "output_dir": tmp_path})
        with make_figure(config)[0].open(newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == count, what
    settings = {row["setting"]: row["accuracy"] for row in found}
    assert float(settings["ABFT, test_type=Normal"]) == after["Normal"]["mr"]["accuracy"]
    assert {"vanilla, test_type=Normal", "vanilla, test_type=UnseenLabel"} < set(settings)


def test_the_report_and_the_printed_table_have_every_test(run, tmp_path, capsys):
    report([run.folder], tmp_path / "r.html")
    page = Path(tmp_path / "r.html").read_text(encoding="utf-8")
    sections = page.split("<section")[1:]
    titles = [f"<h2>several, {test}</h2>" for test in TESTS]
    assert all(title in text for title, text in zip(titles, sections, strict=True))
    # What is of training stands once; GLER has no single right answer, so no calibration.
    assert [text.count("<svg") for text in sections] == [6, 0, 2]
    for test, text in zip(TESTS, sections, strict=True):
        accuracy = read(run, "evaluation")["after"][test]["mr"].get("accuracy")
        assert accuracy is None or f"{100 * accuracy:.1f}</td>" in text
    print_run(run)
    printed = capsys.readouterr().out
    for test in TESTS:
        assert f"│ {test}: induction heads a prompt" in printed
