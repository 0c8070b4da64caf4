import json
from pathlib import Path

import pytest

from abft_fast.errors import UserError
from abft_fast.experiments.grid import read_cells
from abft_fast.experiments.sweep_file import parse_overrides
from abft_fast.options.data import ScoringOptions
from abft_fast.options.model import ModelOptions

pytestmark = pytest.mark.unit

PAPER = sorted((Path(__file__).parents[2] / "configs/paper").glob("*.yaml"))


def cells(tmp_path, text, **overrides):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_cells(path, overrides)


def test_a_grid_is_every_combination(tmp_path):
    found = cells(
        tmp_path, "options: {k: 3}\ngrid: {dataset: [sst2, subj], seed: [0, 1], lr: [1e-4, 2e-4]}"
    )
    chosen = [(c.config.dataset, c.config.seed, c.config.lr) for c in found]
    assert chosen == [(d, s, r) for d in ("sst2", "subj") for s in (0, 1) for r in (1e-4, 2e-4)]
    assert {(c.config.k, c.command, c.method) for c in found} == {(3, "train", "ABFT")}
    assert found[0].title == "sst2 seed=0 lr=1e-4"
    assert len({c.name for c in found}) == 8


GROUPS = """
grid:
  seed: [0, 1]
  model:
    - small: {model: gpt2, trainable: full, seed: [5, 6, 7]}
    - {big: {model: Qwen/Qwen2.5-32B, quantized: true}}
  method: [vanilla, ABFT]
settings:
  standard:
  w/o PID: {adaptation: none}
  longer: {method: ABFT, epochs: 3, seed: 9}
"""


def test_what_a_named_group_says_takes_the_place_of_an_axis(tmp_path):
    found = cells(tmp_path, GROUPS)
    trained = [
        (c.labels["model"], c.labels["setting"], c.config.adaptation, c.config.seed)
        for c in found
        if c.command == "train"
    ]
    expected = [
        (model, setting, adaptation, seed)
        for model, seeds in (("small", (5, 6, 7)), ("big", (0, 1)))
        for setting, adaptation in (("standard", "pid"), ("w/o PID", "none"))
        for seed in seeds
    ]
    expected += [(model, "longer", "pid", 9) for model in ("small", "big")]
    assert sorted(trained) == sorted(expected)
    small, big = (next(c.config for c in found if c.labels["model"] == m) for m in ("small", "big"))
    assert (small.quantized, big.quantized) == (False, True)


def test_what_trains_nothing_is_one_cell_whatever_the_seed_or_a_setting_of_training(tmp_path):
    evaluated = [c for c in cells(tmp_path, GROUPS) if c.command == "eval"]
    assert [c.labels for c in evaluated] == [{"model": "small"}, {"model": "big"}]
    assert [c.method for c in evaluated] == ["vanilla", "vanilla"]
    both = cells(
        tmp_path, "grid: {method: [contextual, vanilla]}\nsettings: {a: {k: 2}, b: {k: 3}}"
    )
    assert [(c.config.calibration, c.labels["setting"]) for c in both] == [
        ("contextual", "a"), ("none", "a"), ("contextual", "b"), ("none", "b"),
    ]  # fmt: skip


def test_a_cell_is_named_by_what_it_is(tmp_path):
    text = "options: {k: 2, dataset: sst2}\ngrid: {seed: [0]}"
    (first,) = cells(tmp_path, text)
    more = cells(tmp_path, "grid: {seed: [1, 0], dataset: [0], k: [2], lr: [3e-3]}", device="cpu")
    assert first.name == more[1].name != more[0].name  # lr is the built-in model's own
    assert first.name.startswith("builtin-sst2-ABFT-seed0-")
    twice = cells(tmp_path, text + "\nsettings: {a: {}, b: {k: 2}}")
    assert [c.name for c in twice] == [first.name]


def test_a_cell_has_its_name_wherever_its_data_are(tmp_path):
    names = set()
    for place in (tmp_path / "here", tmp_path / "there"):
        place.mkdir()
        for file in ("mails.csv", "more.csv"):
            (place / file).write_text("text,label\n" + "good,yes\nbad,no\n" * 5)
        (place / "template.yaml").write_text("input_prefix: 'Text: '\n")
        options = {
            "k": 2, "dataset": f"{place}/mails.csv", "template": f"{place}/template.yaml",
            "training_datasets": f"{place}/more.csv,sst2",
        }  # fmt: skip
        names.add(cells(place, f"options: {json.dumps(options)}")[0].name)
    assert len(names) == 1


def test_changed_data_are_another_cell_and_a_mistake_in_them_is_seen_first(tmp_path):
    data = tmp_path / "mails.csv"
    names = set()
    for text in ("good,yes\nbad,no\n" * 5, "good,yes\nsad,no\n" * 5):
        data.write_text("text,label\n" + text)
        (cell,) = cells(tmp_path, f"options: {{k: 2, dataset: {data}}}")
        names.add(cell.name)
    assert len(names) == 2 and all(n.startswith("builtin-mails-ABFT-seed0-") for n in names)
    plain = tmp_path / "plain.txt"
    for text in ("one", "two"):
        plain.write_text(text)
        names.add(cells(tmp_path, f"options: {{method: PICL, plain_text: {plain}}}")[0].name)
    assert len(names) == 4
    data.write_text("text,kind\ngood,yes\n")
    with pytest.raises(UserError, match=r"mails\.csv"):
        cells(tmp_path, f"options: {{dataset: {data}}}")


def test_overrides_replace_axes_groups_and_settings(tmp_path):
    found = cells(tmp_path, GROUPS, model="builtin", seed=[3, 4], adaptation="p")
    assert {(c.config.model, c.config.quantized) for c in found} == {("builtin", False)}
    trained = [c.config for c in found if c.command == "train"]
    assert {(c.seed, c.adaptation, c.trainable) for c in trained} == {
        (3, "p", "lora"), (4, "p", "lora"),
    }  # fmt: skip
    assert parse_overrides(["seed=[0, 1]", "train-samples=8", "adaptation=none"]) == {
        "seed": [0, 1], "train_samples": 8, "adaptation": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grids: {}", "the file: there is no part grids; did you mean 'grid'?"),
        ("options: {k: 1, k: 2}", "k is given twice, line 1"),
        ("options: {sede: 1}", "options: there is no option sede; did you mean 'seed'?"),
        ("grid: {datasets: [subj]}", "grid: there is no option datasets; did you mean 'dataset'?"),
        (
            "settings: {a: {head-filtre: 1}}",
            "settings: a: there is no option head_filtre; did you mean 'he",
        ),
        ("options: {output_dir: x}", "options: there is no option output_dir"),
        ("options: {k: [1, 2]}", "options: k is a list: put several values under `grid`"),
        ("options: {test_type: []}", r"options: an option cannot have the value \[\]"),
        ("options: {test_type: [GLER, [Normal]]}", "options: an option cannot have the value"),
        ("options: {test_type: [GLER, gler]}", "'gler' is no test: .*; did you mean 'GLER'"),
        ("grid: {k: 4}", r"grid: k must be a list of one value or more, such as \[4\]"),
        ("settings: {x: {k: []}}", "settings: x: k must be a list of one value or more"),
        ("grid: {k: []}", "grid: k must be a list"),
        ("grid: [k]", "grid must be a mapping"),
        ("grid: {model: [{a: {k: 1}}]}", "grid: model: a does not set model"),
        ("grid: {model: [{model: gpt2, k: 1}]}", "an entry must be a value, or one name and its"),
        ("grid: {k: [0, 1]}", "k=0: --k 0: input should be greater"),
        ("grid: {method: [AFBT]}", "--method: there is no method AFBT; did you mean 'ABFT'"),
        ("grid: {method: [vanilla], k: [-1]}", "vanilla k=-1: --k -1"),
        (
            "grid: {model: [{a: {model: gpt2, method: E2E}}], method: [{b: {method: ABFT}}]}",
            "model: a sets method, and the named entries of grid: method set it too",
        ),
        (
            "grid: {method: [{v: {method: vanilla, k: 2}}]}\nsettings: {x: {method: ABFT}}",
            "settings: x sets method, and the named entries",
        ),
        ("grid: {model: [{a: {model: x}}, {a: {model: y}}]}", "two entries are called a"),
        (
            "options: {calibration: batch}\ngrid: {method: [vanilla]}",
            "method vanilla uses calibration none, not batch: set calibration for",
        ),
        ("settings: {a: {quantized: true, trainable: full}}", "a: --trainable full needs float"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(text, message, tmp_path):
    with pytest.raises(UserError, match=f"sweep.yaml.*: .*{message}"):
        cells(tmp_path, text)


def test_several_tests_are_one_value_or_an_axis(tmp_path):
    def tests(text, **overrides):
        return [cell.config.test_type for cell in cells(tmp_path, text, **overrides)]

    both = "Normal,GLER"
    assert tests("options: {test-type: [GLER, Normal]}") == [both]
    assert tests("options: {test_type: 'GLER, Normal'}") == [both]
    assert tests("grid: {test_type: [GLER, Normal]}") == ["GLER", "Normal"]
    assert tests("grid: {test_type: [[GLER, Normal], Normal]}") == [both, "Normal"]
    assert tests("settings: {a: {test_type: [[GLER, Normal]]}, b: {test_type: [GLER]}}") == [
        both, "GLER",
    ]  # fmt: skip
    for pair, expected in (
        ("test_type=[GLER, Normal]", ["GLER", "Normal"]),
        ("test_type=[[GLER, Normal]]", [both]),
        ("test_type=GLER,Normal", [both]),
    ):
        assert (
            tests("options: {test_type: [GLER, TripletBias]}", **parse_overrides([pair]))
            == expected
        )
    (one,), (other,) = (
        cells(tmp_path, f"options: {{test_type: [{names}]}}")
        for names in ("GLER, Normal", "Normal, GLER")
    )
    assert one.name == other.name
    (single,), (plain,) = (
        cells(tmp_path, "options: {test_type: [Normal]}"),
        cells(tmp_path, "options: {k: 4}"),
    )
    assert single.name == plain.name


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_files_train_nothing_twice(path):
    """Cells that train have different options of training, whatever they test."""
    tests = {*ScoringOptions.model_fields, "test_type", "no_eval_before"} - set(
        ModelOptions.model_fields
    )
    trained = [
        cell.config.model_dump_json(exclude=tests)
        for cell in read_cells(path, {})
        if cell.command == "train"
    ]
    assert trained and len(set(trained)) == len(trained)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("seed", "use NAME=VALUE"),
        ("sede=1", "no option sede; did you mean 'seed'"),
        ("seed=[1", "is not YAML"),
    ],
)
def test_a_mistake_in_an_override(pair, message):
    with pytest.raises(UserError, match=message):
        parse_overrides([pair])


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_files_resolve_here_too(path):
    for overrides in ({}, {"model": "builtin"}):
        found = read_cells(path, overrides)
        for cell in found:
            config = cell.config
            if cell.command == "train" and not overrides:
                expected = ("lora", 1e-4) if config.quantized else ("full", 2e-5)
                if cell.method in ("MetaICL", "PICL"):
                    expected = ("model", 1e-5)
                assert (config.trainable, config.lr) == expected
                above_10b = not {"gpt2-large", "gpt2-xl", "Falcon3-7B-Base", "Meta-Llama-3-8B"} & {
                    config.model.split("/")[1]
                }
                assert not above_10b or (config.quantized and config.seed < 2)
    assert {cell.config.model for cell in found} == {"builtin"}


def test_the_papers_files_are_there():
    names = {path.stem for path in PAPER}
    assert {"table1", "table2", "table3", "table4"} <= names
    table1 = read_cells(next(path for path in PAPER if path.stem == "table1"), {})
    assert len({cell.labels["model"] for cell in table1}) == 9
    abft = [cell for cell in table1 if cell.method == "ABFT"]
    assert len(abft) == 8 * (4 * 4 + 5 * 2)
