"""Every mistake in a file of the user's is one line with its file, row and column."""

import os
import shutil

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from abft_fast.errors import UserError
from abft_fast.options import TrainConfig, datasets
from abft_fast.options.resolve import resolve

pytestmark = pytest.mark.unit

GOOD = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(8))
COLUMNS = {"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}


def refusal(**options):
    with pytest.raises(UserError) as caught:
        datasets.from_options(resolve(TrainConfig, options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.csv").write_text(GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "\n\n", "a.csv is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.csv", "txet,label\na,b\n", "a.csv, row 1: there is no column 'text'; the "
         "columns are 'txet', 'label'; did you mean 'txet'?"),
        ("a.csv", "text;lable\na;b\n", "a.csv, row 1: there is no column 'label'; the columns are "
         "'text', 'lable'; did you mean 'lable'?"),
        ("a.csv", "text^label\na^b\n", "the columns are 'text^label'; a comma separates columns, "
         "unless --delimiter names another character"),
        ("a.tsv", "text:label\na:b\n", "the columns are 'text:label'; a tab separates columns"),
        ("a.csv", "sep=;\ntext;label\na;b\n", "row 1: there is no column 'text'; the columns are "
         "'sep=', ''; delete this row, which only Excel reads"),
        ("a.tsv", 'text\tlabel\na\t1\n"b\t2\nc"\t1\n', "a.tsv, row 3: a quote at a cell's begin"),
        ("a.csv", "text,label,text\n", "a.csv, row 1: column 'text' is named twice"),
        ("a.csv", "text,label\na,x\nb, c,y\n", "a.csv, row 3: the row must have 2 cells, not 3"),
        ("a.csv", 'text,label\n"a\nb",x\nc\n', "a.csv, row 4: the row must have 2 cells, not 1: "
         "write a comma for each cell that is missing; put a text of several lines in"),
        ("a.csv", "text,label\na,x\nb,y,,\n", "a.csv, row 3: the row must have 2 cells, not 4: "
         "delete what follows the last cell, or name more columns"),
        ("a.csv", "label,label,text\n1,2,a\n", "a.csv, row 1: column 'label' is named twice"),
        ("a.csv", 'text,label\n"a,x\nb,y\n', "a.csv, row 2: unexpected end of data"),
        ("a.csv", 'text,label\na,x\n"b" c,y\n', "a.csv, row 3: ',' expected after '\"'"),
        ("a.csv", f'text,label\n"{"x" * 140_000}",a\n', "a.csv, row 2: field larger than"),
        ("a.csv", GOOD.encode("utf-16"), "a.csv, row 1: byte 0xff is not UTF-8"),
        ("a.csv", GOOD.encode() + b"caf\xe9,a\n", "a.csv, row 10: byte 0xe9 is not UTF-8"),
        ("a.csv", GOOD + "  ,a\n", "a.csv, row 10, column 'text': the text is empty; fill"),
        ("a.csv", GOOD + "nan,a\n", "a.csv, row 10, column 'text': the text is nan"),
        ("a.csv", GOOD + "text,\n", "a.csv, row 10, column 'label': the label is empty"),
        ("a.csv", GOOD + "text,NaN\n", "a.csv, row 10, column 'label': the label is NaN"),
        ("a.csv", GOOD + "text,None\n", "the label is None; fill it in, or leave "
         "the row out; if None is a label, name it under `labels` in a --template"),
        ("a.csv", "text,label\na,x\nb,x\n", "a.csv, column 'label': every row has the label 'x'"),
        ("a.csv", GOOD + "text,c\n", "'label': this is the only row with the label 'c'"),
        ("a.csv", "{'text': 'a', 'label': 'b'}\n", "file looks like JSON lines: name it .jsonl"),
        ("a.jsonl", '[\n{"text": "a"},\n', "a.jsonl, row 1, character 2: the line is not JSON: "
         "Expecting value: write each object on one line, and nothing else"),
        ("a.jsonl", '{\n"text": "a"\n}\n', "write each object on one line, and nothing else"),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text":\n', "row 2, character 9: the line is not"),
        ("a.jsonl", '["a", "b"]\n', "a.jsonl, row 1: a list is not an object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, row 1: the line cannot be read"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "a", "lable": 1}\n',
         "a.jsonl, row 3: there is no column 'label'; the columns are 'text', 'lable'; did you "
         "mean 'lable'?"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": 1}\n', "the line cannot be read: key"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "column 'text': a text is needed, not int 5"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "row 1, column 'text': the text is empty"),
        ("a.jsonl", '{"text": NaN, "label": 1}\n', "row 1, column 'text': the text is NaN"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "'text': \\ud800 is half a character"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "row 1, column 'label': the label is empty"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "row 1, column 'label': the label is NaN"),
        ("a.jsonl", '{"text": "a", "label": ["x"]}\n', "a label is needed, not a list"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read: "),
        ("a.xlsx", b"PK", "a.xlsx: suffix '.xlsx' is unknown: use .csv"),
    ],
)  # fmt: skip
def test_a_file(name, content, expected, here):
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refusal(dataset=name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("inputprefix: x\n", "t.yaml, row 1: there is no key 'inputprefix'; the keys are "
         "input_prefix, label_prefix, labels; did you mean 'input_prefix'?"),
        ("labels: [good, bad]\n", "t.yaml, row 1: labels must be a mapping"),
        ("labels:\n  a: good\n  b: good \n", "row 3: labels 'a' and 'b' have the same word"),
        ("labels:\n  a: good\n  a: bad\n", "t.yaml, row 3: 'a' is given twice"),
        ("labels: {a: good}\n", "t.yaml: labels must have at least two entries, not 1"),
        ("labels:\n  a: good\n  b:\n", "t.yaml, row 3: label 'b' has no word"),
        ("labels: {a: good, B: bad}\n", "good.csv, row 3, column 'label': 'b' is not among the "
         "labels of t.yaml: 'a', 'B'"),
        ("labels: {a: good, b: bad, c: so}\n", "no row has the label 'c' of t.yaml"),
        ("label_prefix: ' '\n", "t.yaml: label_prefix is empty"),
        ("input_prefix: [a]\n", "t.yaml, row 1: input_prefix must be text"),
        ("input_prefix: Review: \n", "t.yaml, row 1: mapping values are not allowed here"),
        ("- labels\n", "t.yaml, row 1: the file must be a mapping"),
        (b"\xff\xfe", "t.yaml cannot be read"),
    ],
)  # fmt: skip
def test_a_template(content, expected, here):
    (here / "t.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refusal(dataset="good.csv", template="t.yaml")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dataset": "no.csv"}, "no.csv cannot be read: No such file or directory"),
        ({"dataset": "good.csv", "template": "no.yaml"}, "no.yaml cannot be read: No such file"),
        ({"dataset": "good.csv", "test_file": "no.csv"}, "no.csv cannot be read: No such file"),
        ({"dataset": "good.csv", "test_file": "good.csv"}, "good.csv has the content of good.csv"),
        ({"dataset": "good.csv", "label_column": "labels"}, "did you mean 'label'?"),
        ({"dataset": "good.csv", "label_column": "text"}, "--text-column and --label-column are"),
        ({"dataset": "good.csv", "test_share": "1"}, "--test-share 1: input should be less"),
        ({"dataset": "good.csv", "test_file": "b.csv", "split_seed": 1}, "--split-seed: "
         "--test-file gives all test rows"),
        ({"dataset": "sst2", "template": "t.yaml"}, "--template is for your own data"),
        ({"dataset": "."}, "folder . was not saved by `datasets`"),
        ({"dataset": "imdb"}, "or data of your own (.csv, .tsv, .jsonl, .parquet, or a folder"),
    ],
)  # fmt: skip
def test_options(options, expected):
    assert expected in refusal(**options)


def test_a_test_file_has_no_label_that_is_not_trained_on(here):
    (here / "test.csv").write_text("text,label\nx,A\n")
    assert refusal(dataset="good.csv", test_file="test.csv") == (
        "test.csv, row 2, column 'label': 'A' is not among the labels of good.csv: 'a', 'b'; "
        "did you mean 'a'?"
    )


@pytest.mark.parametrize("cell", [None, float("nan")], ids=["null", "nan"])
def test_a_cell_of_parquet(cell):
    parquet.write_table(pa.table({**COLUMNS, "label": [0.0, 1.0, 0.0, cell]}), "a.parquet")
    assert "a.parquet, row 4, column 'label': the label is" in refusal(dataset="a.parquet")


def test_damaged_parquet(here):
    parquet.write_table(pa.table(COLUMNS), "a.parquet")
    whole = (here / "a.parquet").read_bytes()
    (here / "a.parquet").write_bytes(whole[:-7])
    assert "a.parquet cannot be read: " in refusal(dataset="a.parquet")
    (here / "a.parquet").write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])
    assert "a.parquet cannot be read: " in refusal(dataset="a.parquet")


@pytest.mark.parametrize("damage", ["cut", "gone", "info", "state"])
def test_a_damaged_folder(damage, here):
    Dataset.from_dict(COLUMNS).save_to_disk("folder")
    arrow = next((here / "folder").glob("*.arrow"))
    match damage:
        case "cut":
            arrow.write_bytes(arrow.read_bytes()[:100])
        case "gone":
            arrow.unlink()
        case "info":
            (here / "folder/dataset_info.json").write_text("{")
        case "state":
            (here / "folder/state.json").write_text("{}")
    assert refusal(dataset="folder").startswith("folder")


def test_parts_of_a_folder():
    DatasetDict({"training": Dataset.from_dict(COLUMNS)}).save_to_disk("both")
    assert refusal(dataset="both") == "both has no part `train`; its parts are training"
    assert "both holds the parts training: name one" in refusal(
        dataset="good.csv", test_file="both"
    )
    shutil.rmtree("both/training")
    assert "cannot be read" in refusal(dataset="good.csv", test_file="both/training")


def test_a_file_that_gives_no_bytes(here):
    (here / "a.csv").symlink_to("/proc/self/mem")
    assert refusal(dataset="a.csv") == "a.csv cannot be read: Input/output error"


@pytest.mark.parametrize("locked", ["good.csv", "."], ids=["file", "folder"])
def test_a_file_without_permission(locked, here):
    (here / locked).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        assert refusal(dataset="good.csv") == "good.csv cannot be read: Permission denied"
    finally:
        os.seteuid(user)
        (here / locked).chmod(0o700)
