"""All datasets of the paper in one run, on fewer test examples than StaICC's."""

import dataclasses
import json

import pytest

from abft_fast import data
from abft_fast.commands.evaluate import keep_rows_of_labels, prepare_tests
from abft_fast.commands.printing import print_run
from abft_fast.commands.session import Session
from abft_fast.commands.train import train
from abft_fast.core.label_logits import label_columns, label_logits
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from abft_fast.training.run_folder import RunFolder

pytestmark = [pytest.mark.unit, pytest.mark.slow]


@pytest.fixture
def few_test_examples(monkeypatch):
    load = data.load

    def cut(name):
        dataset = load(name)
        return dataclasses.replace(dataset, test=dataset.test[:3])

    monkeypatch.setattr(data, "load", cut)


OPTIONS = {
    "dataset": "mr", "k": 2, "train_samples": 8, "pseudo_batch_size": 8, "epochs": 1,
    "generalization_test": True, "device": "cpu", "calibration": "contextual",
    "calibration_samples": 2,
}  # fmt: skip


def test_before_and_after_on_all_datasets(few_test_examples, tmp_path, capsys):
    config = resolve(TrainConfig, OPTIONS | {"output_dir": tmp_path / "run"})
    run = RunFolder.reserve(config)
    train(config, run, Progress())
    for name in ("evaluation.json", "attention.json"):
        content = json.loads((run.folder / name).read_text())
        for when in ("before", "after"):
            assert list(content[when]) == ["mr", *(d for d in data.PAPER_DATASETS if d != "mr")]
    print_run(run)
    table = capsys.readouterr().out
    after = {d: m["accuracy"] for d, m in run.evaluation["after"].items()}
    outside = sum(v for d, v in after.items() if d != "mr") / 7
    assert f"{100 * after['mr']:.1f}" in line_of(table, "in-domain: accuracy")
    assert f"{100 * outside:.1f}" in line_of(table, "out-of-domain, mean of 7: accuracy")


def line_of(table, title):
    [line] = [line for line in table.splitlines() if f"│ {title}" in line]
    return line


def test_the_head_keeps_the_rows_of_all_datasets(few_test_examples):
    config = resolve(TrainConfig, OPTIONS | {"calibration": "none"})
    session = Session(config, Progress())
    tests = prepare_tests(session)
    session.load()

    def logits_of(test):
        encoded = test.encoded[0]
        return label_logits(session.model, encoded.prompts[:2], encoded.label_ids)[0]

    expected = [logits_of(test) for test in tests]
    vocabulary = session.model.lm_head.weight.shape[0]
    keep_rows_of_labels(session, tests)
    assert session.model.lm_head.weight.shape[0] < vocabulary
    for test, logits in zip(tests, expected, strict=True):
        label_columns(session.model, test.encoded[0].label_ids)
        assert (logits_of(test) - logits).abs().max() < 1e-4
