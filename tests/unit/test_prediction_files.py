"""What `predict` reads and writes."""

import csv
import json
import math
from pathlib import Path

import pytest

from abft_fast.commands.prediction_files import (
    check_files,
    check_queries,
    open_output,
    read_demonstrations,
    read_queries,
)
from abft_fast.data.rows import Row
from abft_fast.errors import UserError
from abft_fast.options import PredictConfig
from abft_fast.options.resolve import resolve

pytestmark = pytest.mark.unit

WORDS = ("bad", "good")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos.csv").write_text("text,label\nfine,good\ndull,bad\nnice,good\n")
    (tmp_path / "queries.csv").write_text("id,text\n7,so so\n8,well\n")
    return tmp_path


def options(**changes):
    given = {"demonstrations": "demos.csv", "input": "queries.csv", **changes}
    return resolve(PredictConfig, given)


def written(output, rows):
    """The output file's text after some rows of (cells, probabilities)."""
    config = options(output=output)
    with open_output(config, WORDS) as writer:
        for number, (cells, probabilities) in enumerate(rows, start=2):
            writer.write(Row(Path("in.csv"), number, cells), probabilities)
    return Path(output).read_bytes().decode()


def test_the_options_are_those_that_make_sense():
    """Options of datasets and of tests are none of a prediction's."""
    assert set(PredictConfig.model_fields) == {
        "model", "quantized", "bits", "config", "debug", "adapter", "demonstrations", "input",
        "output", "text_column", "label_column", "delimiter", "template", "prompt_form",
        "label_token", "on_long_prompt", "token_budget", "attention_backend", "device",
        "device_map", "mixed_precision", "stream", "stream_states",
    }  # fmt: skip


def test_demonstrations_keep_their_order(folder):
    dataset = read_demonstrations(options())
    assert [(e.text, dataset.label_words[e.label]) for e in dataset.demonstrations] == [
        ("fine", "good"), ("dull", "bad"), ("nice", "good"),
    ]  # fmt: skip
    assert dataset.label_words == WORDS


def test_a_template_says_the_words(folder):
    (folder / "t.yaml").write_text(
        'input_prefix: "review: "\nlabels: {good: yes, bad: no, none: maybe}\n'
    )
    dataset = read_demonstrations(options(template="t.yaml"))
    assert dataset.label_words == ("yes", "no", "maybe")
    assert [e.label for e in dataset.demonstrations] == [0, 1, 0]
    assert (dataset.input_prefix, dataset.label_prefix) == ("review: ", "label: ")
    (folder / "demos.csv").write_text("text,label\nfine,good\ndull,bd\n")
    with pytest.raises(UserError, match=r"demos.csv, row 3, column 'label': 'bd' .* 'bad'\?"):
        read_demonstrations(options(template="t.yaml"))


def test_one_label_is_refused(folder):
    (folder / "demos.csv").write_text("text,label\nfine,good\n")
    with pytest.raises(UserError, match="column 'label': every row has the label 'good'"):
        read_demonstrations(options())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "id,txt\n1,a\n",
            r"queries.csv, row 1: there is no column 'text'; .*'id', 'txt'; did you mean",
        ),
        ("text,prediction\na,b\n", "has a column 'prediction', which the output adds: rename it"),
        ("text,p_good\na,b\n", "has a column 'p_good', which the output adds"),
        ("text\nfine\n  \n", "row 3, column 'text': the text is empty"),
        ("text\n", "queries.csv has no rows"),
    ],
)
def test_queries_that_cannot_be_used(folder, content, message):
    (folder / "queries.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_queries(options(), WORDS))


def test_queries_are_read_as_they_are_asked_for(folder):
    (folder / "queries.csv").write_text('text\nfine\n"broken\n')
    queries = read_queries(options(), WORDS)
    assert next(queries)[1] == "fine"
    with pytest.raises(UserError, match=r"queries.csv, row 3"):
        next(queries)


def test_csv(folder):
    odd = 'a "quote", a\rreturn\r\nand\nfeeds, ü'
    text = written(
        "out.csv",
        [
            ({"id": "7", "text": odd}, [0.25, 0.75]),
            ({"id": None, "text": "b"}, None),
            ({"id": {"a": [1, True]}, "text": "c"}, [0.123456789, 0.876543211]),
        ],
    )
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"id": "7", "text": odd, "prediction": "good", "p_bad": "0.25", "p_good": "0.75"},
        {"id": "", "text": "b", "prediction": "", "p_bad": "", "p_good": ""},
        {"id": '{"a": [1, true]}', "text": "c", "prediction": "good", "p_bad": "0.1234568",
         "p_good": "0.8765432"},
    ]  # fmt: skip
    assert text.startswith("id,text,prediction,p_bad,p_good\n")


def test_csv_needs_the_same_columns(folder):
    (folder / "queries.jsonl").write_text('{"text": "a"}\n{"text": "b", "note": 1}\n')
    for output in ("out.csv", "-"):
        with pytest.raises(UserError, match=r"jsonl, row 2: not all rows have column 'note'"):
            check_queries(options(input="queries.jsonl", output=output), WORDS)
    check_queries(options(input="queries.jsonl", output="out.jsonl"), WORDS)
    rows = [({"text": "a"}, None), ({"text": "b", "note": 1}, None)]
    assert json.loads(written("out.jsonl", rows).splitlines()[1])["note"] == 1


def test_the_last_query_is_checked_as_the_first(folder):
    with (folder / "queries.csv").open("a") as file:
        file.write("9,well\n" * 3000 + "10,\n")
    with pytest.raises(UserError, match=r"queries.csv, row 3004, column 'text': the text is empty"):
        check_queries(options(), WORDS)


def test_json_lines(folder):
    cells = {"text": "ü", "n": 3, "nothing": None, "nan": math.nan, "more": {"a": [True]}}
    text = written("out.jsonl", [(cells, [0.75, 0.25]), (cells, None)])
    first, second = map(json.loads, text.splitlines())
    kept = {**cells, "nan": None}
    assert first == {**kept, "prediction": "bad", "p_bad": 0.75, "p_good": 0.25}
    assert second == {**kept, "prediction": None, "p_bad": None, "p_good": None}
    assert "ü" in text and "NaN" not in text


def test_half_a_character_is_kept_in_json_and_refused_in_csv(folder):
    Path("queries.jsonl").write_text(r'{"text": "a", "more": {"user": "cut \ud83d"}}' + "\n")
    asked = options(input="queries.jsonl", output="out.jsonl")
    check_queries(asked, WORDS)
    ((row, _),) = read_queries(asked, WORDS)
    text = written("out.jsonl", [(row.cells, None)])
    assert r'"cut \ud83d"' in text
    assert json.loads(text)["more"] == row.cells["more"]
    with pytest.raises(UserError, match=r"queries.jsonl, row 1, column 'more': half a character"):
        check_queries(options(input="queries.jsonl", output="out.csv"), WORDS)


def test_json_has_no_nan_at_any_depth(folder):
    text = written("out.jsonl", [({"text": "a", "more": {"x": [1.5, math.nan, -math.inf]}}, None)])
    assert json.loads(text, parse_constant=pytest.fail)["more"] == {"x": [1.5, None, None]}


def test_the_template_is_no_output(folder):
    Path("t.csv").write_text("labels: {good: fine, bad: poor}")
    with pytest.raises(UserError, match=r"--output t.csv is a file that the command reads"):
        check_files(options(output="t.csv", template="t.csv"))


def test_the_output_is_whole_or_as_it_was(folder):
    Path("out.csv").write_text("of yesterday")
    with pytest.raises(RuntimeError), open_output(options(output="out.csv"), WORDS) as writer:
        writer.write(Row(Path("in.csv"), 2, {"text": "a"}), [0.5, 0.5])
        raise RuntimeError
    assert Path("out.csv").read_text() == "of yesterday"
    assert sorted(p.name for p in folder.iterdir()) == ["demos.csv", "out.csv", "queries.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "queries.csv"}, "--output queries.csv is a file that the command reads"),
        ({"output": "./demos.csv"}, "--output demos.csv is a file that the command reads"),
        ({"output": "no/out.csv"}, "folder no does not exist"),
        ({"output": "out.txt"}, "--output out.txt: use a name that ends in .csv or .jsonl"),
        ({"adapter": "nowhere"}, "adapter nowhere holds no adapter_config.json"),
        ({"input": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"label_column": "text"}, "--text-column and --label-column are both text"),
        ({"on_long_prompt": "fewer-demonstrations"}, "--on-long-prompt fewer-demonstrations"),
    ],
)
def test_mistakes_are_said_first(folder, changes, message):
    with pytest.raises(UserError, match=message):
        check_files(options(**changes))
