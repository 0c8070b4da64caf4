"""`abft-fast analyze` leaves a table and a picture, of the built-in model and its adapter."""

import csv

import pytest
import torch

from abft_fast.models.loading import load
from abft_fast.models.trainable import add_lora, save_adapter
from tests.command_line import abft_fast

pytestmark = pytest.mark.cli

FEW = ("--dataset", "subj", "--device", "cpu", "--prompts", 6)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters of the built-in model, of random numbers: one strong, one of zeros."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, size in (("strong", 0.3), ("zeros", 0.0)):
        model = add_lora(load("builtin", torch.device("cpu"), torch.float32), 4)
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=size)
        (folder / name).mkdir()
        save_adapter(model, folder / name)
    return folder


def analyze(verb, folder, *options, adapter="strong", data=FEW):
    result = abft_fast("analyze", verb, "--adapter", folder / adapter, *options, *data, cwd=folder)
    assert result.returncode == 0, result.stderr
    paths = [folder / line for line in result.stdout.splitlines()]
    for path in paths:
        assert path.stat().st_size > 100
        if path.suffix == ".svg":
            assert path.read_text().startswith("<?xml") and "</svg>" in path.read_text()
    with next(path for path in paths if path.suffix == ".csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, result, paths


def test_attention(adapters):
    rows, _, paths = analyze("attention", adapters, "--output-dir", "a")
    assert [path.name for path in paths] == ["attention.csv", "attention.svg"]
    assert len(rows) == 2 * 4 * (1 + 6)
    assert {row["model"] for row in rows} == {"before", "after"}
    for row in rows:
        assert 0 <= float(row["correct_mass"]) <= float(row["label_mass"]) <= 1
    changed = [
        before["label_mass"] != after["label_mass"]
        for before, after in zip(rows[:28], rows[28:], strict=True)
    ]
    assert sum(changed) > 20


def test_attention_without_the_query_s_label(adapters):
    data = ("--dataset", "trec", "--test-type", "UnseenLabel", "--device", "cpu", "--prompts", 5)
    rows, _, _ = analyze("attention", adapters, data=data)
    assert {float(row["correct_mass"]) for row in rows} == {0}


def test_show(adapters):
    rows, _, paths = analyze(
        "show", adapters, "--prompt-index", 3, "--layers", "3,1", "--also", adapters / "zeros",
        data=("--device", "cpu"),
    )  # fmt: skip
    assert [path.suffix for path in paths] == [".csv", ".svg", ".html"]
    models = ["base", "tuned", str(adapters / "zeros")]
    assert list(dict.fromkeys(row["model"] for row in rows)) == models
    assert list(dict.fromkeys(row["layer"] for row in rows)) == ["3", "1"]
    by_head = {}
    for row in rows:
        key = row["model"], row["layer"], row["head"]
        by_head.setdefault(key, []).append(float(row["attention"]))
    assert len(by_head) == 3 * 2 * 6
    for (model, *place), values in by_head.items():
        assert sum(values) == pytest.approx(1, abs=1e-3)
        if model == models[2]:  # an adapter of zeros is the base
            assert values == by_head["base", *place]
    tokens = [row["token"] for row in rows[: len(next(iter(by_head.values())))]]
    assert "".join(tokens).count("review:") == 5
    assert sum(row["label"] != "" for row in rows) == 4 * len(by_head)
    page = paths[2].read_text()
    assert page.count("<td") == len(rows) and "http" not in page


def test_show_a_text(adapters):
    rows, _, _ = analyze("show", adapters, "--text", "<b>bold & new", data=("--device", "cpu"))
    assert {row["layer"] for row in rows} == {"2", "3"}
    assert {row["label"] for row in rows} == {""}


def test_shift(adapters):
    rows, _, _ = analyze("shift", adapters, data=("--device", "cpu"))
    assert len(rows) == 4 * 2 * 7
    assert all(float(row["change"]) > 0 for row in rows)
    rows, _, _ = analyze("shift", adapters, data=("--device", "cpu"), adapter="zeros")
    assert {float(row["change"]) for row in rows} == {0}


def test_cmap(adapters):
    rows, result, _ = analyze("cmap", adapters, "--output-dir", "c", "--random-draws", 2)
    by_group = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    assert {name: len(group) for name, group in by_group.items()} == {
        "receiver": 2, "giver": 2, "none": 1, "all": 1, "head": 24, "layer": 4, "induction": 1,
        "other": 1, "top": 6, "random": 10,
    }  # fmt: skip
    assert float(by_group["all"][0]["recovered_log_odds"]) == pytest.approx(1, abs=1e-3)
    assert float(by_group["none"][0]["recovered_log_odds"]) == pytest.approx(0, abs=1e-3)
    assert float(by_group["top"][-1]["recovered_log_odds"]) == pytest.approx(1, abs=1e-3)
    assert "all (24.0 heads): 100 % of the log-odds" in result.stderr


@pytest.mark.parametrize("options", [("--what", "pattern"), ("--what", "values", "--reverse")])
def test_cmap_of_parts(adapters, options):
    rows, _, _ = analyze("cmap", adapters, *options, "--groups", "layer,induction")
    assert [row["group"] for row in rows] == [
        "receiver", "giver", "none", "all", *["layer"] * 4, "induction"
    ]  # fmt: skip


def test_path(adapters):
    rows, _, _ = analyze("path", adapters)
    assert len(rows) == 2 * 3 * 24
    effects = {}
    for row in rows:
        effects.setdefault((row["model"], row["path"], row["layer"]), []).append(row["effect"])
    assert any(float(effect) for effect in effects["after", "values", "2"])
    assert {abs(float(effect)) < 1e-4 for effect in effects["before", "queries", "3"]} == {True}


def test_dcm(adapters):
    rows, result, paths = analyze(
        "dcm", adapters, "--desiderata", "label-word,text-prior", "--steps", 3, "--batch-size", 2,
        "--output-dir", "d",
    )  # fmt: skip
    assert [path.name for path in paths] == ["dcm.csv", "dcm.svg"]
    assert len(rows) == 2 * 2 * (24 + 3)
    by_group = {}
    for row in rows:
        by_group.setdefault((row["model"], row["desideratum"], row["group"]), []).append(row)
    for model in ("before", "after"):
        for name in ("label-word", "text-prior"):
            masks = [float(row["mask"]) for row in by_group[model, name, "head"]]
            assert 0 < max(masks) <= 1 and min(masks) >= 0
            (chosen,) = by_group[model, name, "chosen"]
            assert int(chosen["heads"]) == sum(mask > 0.5 for mask in masks)
            (every,) = by_group[model, name, "all"]
            assert every["heads"] == "24" and 0 <= float(every["answered"]) <= 1
    assert result.stderr.count("heads; ") == 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_plane(precision, adapters):
    result = abft_fast(
        "analyze", "plane", "--a", "strong", "--e", "zeros", "--grid", "0:1:2", *FEW,
        "--mixed-precision", precision, "--output-dir", precision, cwd=adapters,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"{precision}/plane.csv", f"{precision}/plane.svg"]
    with (adapters / precision / "plane.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["grid"] * 4 + ["path"] * 11 + ["ray"] * 11
    by_point = {(float(row["alpha_e"]), float(row["alpha_a"])): row["loss"] for row in rows}
    assert by_point[0, 0] == by_point[1, 0] != by_point[0, 1] == by_point[1, 1]


def test_restrict(adapters):
    rows, _, _ = analyze("restrict", adapters, "--random-draws", 1)
    assert [float(row["heads"]) for row in rows if row["group"] == "top"] == [1, 2, 4, 8, 16, 24]
    assert float(rows[-1]["recovered_log_odds"]) == pytest.approx(1, abs=1e-4)
    some, result, _ = analyze("restrict", adapters, "--heads", "2.0,3.5")
    assert [(row["group"], row["heads"]) for row in some[2:]] == [("chosen", "2")]
    assert "% of the base, " in result.stderr and "\nchosen (2.0 heads): " in result.stderr


def test_heads_are_not_ranked_on_one_prompt(adapters):
    refused = abft_fast(
        "analyze", "restrict", "--adapter", adapters / "strong", *FEW[:-1], 1, cwd=adapters
    )
    assert refused.returncode == 2
    assert "use --prompts 2 or more, or name --heads" in refused.stderr


def test_an_adapter_of_zeros(adapters):
    rows, result, _ = analyze("cmap", adapters, adapter="zeros")
    assert {row["recovered_log_odds"] for row in rows} == {""}
    assert "the two models answer alike: there is nothing to recover" in result.stderr
    refused = abft_fast("analyze", "restrict", "--adapter", adapters / "zeros", *FEW, cwd=adapters)
    assert refused.returncode == 2
    assert "the two models answer alike, so no head can be ranked: name --heads" in refused.stderr


def test_a_new_folder_each_time(adapters):
    folders = {analyze("shift", adapters, data=("--device", "cpu"))[2][0].parent for _ in range(2)}
    assert len(folders) == 2
    assert {folder.parent.name for folder in folders} == {"analysis"}
