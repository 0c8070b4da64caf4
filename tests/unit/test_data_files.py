"""Rows of every format, and the place each is said to be at."""

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from contextlib import contextmanager

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from abft_fast.data.tables import is_table, name_of, note, place_to_save, read_rows
from abft_fast.data.text_lines import read_lines
from abft_fast.errors import UserError

pytestmark = pytest.mark.unit

CELLS = [{"text": f'a "b", c{i}', "label": i % 2, "more": "x"} for i in range(5)]


def quoted(value, mark):
    return '"' + str(value).replace('"', '""') + '"' if {'"', mark} & set(str(value)) else value


def write(path):
    """The five rows in the path's format."""
    match path.suffix:
        case ".csv" | ".tsv":
            mark = "," if path.suffix == ".csv" else "\t"
            lines = [list(CELLS[0]), *(list(row.values()) for row in CELLS)]
            text = "".join(mark.join(str(quoted(v, mark)) for v in line) + "\n" for line in lines)
            path.write_text(text)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in CELLS))
        case ".parquet":
            parquet.write_table(pa.Table.from_pylist(CELLS), path, row_group_size=2)
        case "":
            Dataset.from_list(CELLS).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "folder"])
def test_every_format_has_the_same_rows(name, tmp_path):
    path = write(tmp_path / name)
    rows = list(read_rows(path))
    first = {"csv": 2, "tsv": 2}.get(name[2:], 1)  # below the header
    assert [row.number for row in rows] == list(range(first, first + 5))
    assert [row.text("text") for row in rows] == [cells["text"] for cells in CELLS]
    assert [row.category("label") for row in rows] == ["0", "1", "0", "1", "0"]
    assert rows[0].place("label") == f"{path}, row {first}, column 'label'"
    (cells,) = {tuple(row.cells) for row in read_rows(path, ["label", "text"])}
    assert set(cells) == {"label", "text"}
    with pytest.raises(
        UserError, match=r"no column 'txt'; the columns are .*; did you mean 'text'\?"
    ):
        list(read_rows(path, ["txt"]))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_a_row_is_the_line_an_editor_shows(end, tmp_path):
    path = tmp_path / "a.csv"
    lines = ["\ufefftext,label", '"one', "two", 'three",a', "", "four,b"]
    path.write_bytes(end.join(lines).encode())
    rows = list(read_rows(path))
    assert [row.number for row in rows] == [2, 6]
    assert rows[0].text("text").split(end) == ["one", "two", "three"]
    assert rows[1].cells == {"text": "four", "label": "b"}


def test_blank_lines_of_jsonl_count_as_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\n\n{"text": "c"}\n')
    assert [(row.number, row.text("text")) for row in read_rows(path)] == [
        (1, "a\u2028b"),
        (3, "c"),
    ]


def test_class_labels_are_their_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    made = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    made.save_to_disk(tmp_path / "folder")
    first, second, unlabelled = read_rows(tmp_path / "folder")
    assert (first.category("label"), second.category("label")) == ("good", "bad")
    with pytest.raises(UserError, match="row 3, column 'label': the label is empty"):
        unlabelled.category("label")


def labelled_parquet(path, indices):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    texts = [f"text {i}" for i in range(len(indices))]
    made = Dataset.from_dict({"text": texts, "label": indices}, features=features)
    made.to_parquet(path)


def test_class_labels_of_parquet_are_their_names(tmp_path):
    labelled_parquet(tmp_path / "a.parquet", [1, 0, None])
    first, second, unlabelled = read_rows(tmp_path / "a.parquet", ("text", "label"))
    assert (first.category("label"), second.category("label")) == ("good", "bad")
    with pytest.raises(UserError, match="row 3, column 'label': the label is empty"):
        unlabelled.category("label")


def test_a_class_label_without_a_name_is_refused(tmp_path):
    labelled_parquet(tmp_path / "a.parquet", [1, 0])
    table = parquet.read_table(tmp_path / "a.parquet")
    more = table.set_column(1, table.schema.field("label"), pa.array([1, 2]))
    parquet.write_table(more, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 2, column 'label': the label 2 has no name"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("content", ["{", "[]", '{"info": {"features": {"label": {"_type": 3}}}}'])
def test_foreign_metadata_of_parquet_is_no_label(content, tmp_path):
    table = pa.table({"text": ["a"], "label": [1]})
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": content}), tmp_path / "a.parquet"
    )
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row.category("label") == "1"


def test_a_column_of_parquet_that_is_named_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: column 'text' is named twice"):
        list(read_rows(tmp_path / "a.parquet"))


def test_plain_text_is_cut_at_ends_of_lines_alone(tmp_path):
    path = tmp_path / "a.txt"
    odd = "one\u2028of\x0btwo\x0cthree\x1cfour\x85five"
    path.write_bytes(f"{odd}\nb\r\nc\rd\n \n".encode())
    assert read_lines("--plain-text", path) == [odd, "b", "c", "d"]


SEPARATED = "text{0}label{0}note\na film, short{0}good{0}x\n"


@pytest.mark.parametrize("mark", [";", "\t", "|"], ids=["semicolon", "tab", "bar"])
def test_the_header_shows_what_separates_columns(mark, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(SEPARATED.format(mark))
    (row,) = read_rows(path, ["text", "label"])
    assert row.cells == {"text": "a film, short", "label": "good"}
    (row,) = read_rows(path, needed=["text"])
    assert row.cells == {"text": "a film, short", "label": "good", "note": "x"}
    shown = "tabs" if mark == "\t" else repr(mark)
    assert note(path, ["text"], None) == (
        f"{path} seems separated by {shown} and is read so; --delimiter sets another one"
    )
    assert note(path, ["text"], mark) == ""


def test_a_header_that_fits_is_read_as_its_suffix_says(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,a;b;c\none,2;3;4\n")
    (row,) = read_rows(path, needed=["text"])
    assert row.cells == {"text": "one", "a;b;c": "2;3;4"}
    path.write_text("text;label|other\none;a|b\n")  # two characters split the header
    with pytest.raises(UserError, match=r"columns are 'text;label\|other'; a comma separates"):
        list(read_rows(path, ["label"]))
    (row,) = read_rows(path, ["text"])
    assert row.cells == {"text": "one"}


def test_a_delimiter_is_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(SEPARATED.format("^"))
    (row,) = read_rows(path, ["text"], delimiter="^")
    assert row.cells == {"text": "a film, short"}
    path.write_text(SEPARATED.format(",").replace("film,", "film"))
    assert note(path, ["text"], "^").endswith("seems separated by ',' and is read so; --delimiter "
                                              "sets another one")  # fmt: skip
    (row,) = read_rows(path, ["text"], delimiter="^")
    assert row.cells == {"text": "a film short"}


def test_columns_without_a_name_are_no_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text,,\n1,a,,\n2,b,x,\n")
    assert [row.cells for row in read_rows(path, ["text"])] == [{"text": "a"}, {"text": "b"}]
    rows = read_rows(path)
    assert next(rows).cells == {"id": "1", "text": "a"}
    with pytest.raises(UserError, match="row 3: 'x' is in a column without a name: name each"):
        next(rows)
    path.write_text(",text\n0,a\n")  # as pandas writes its index
    assert [row.cells for row in read_rows(path)] == [{"": "0", "text": "a"}]


def test_a_column_that_is_not_used_may_be_named_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("note,text,note\n1,a,2\n")
    assert [row.cells for row in read_rows(path, ["text"])] == [{"text": "a"}]
    for columns in (None, ["note"]):
        with pytest.raises(UserError, match="row 1: column 'note' is named twice"):
            list(read_rows(path, columns))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_a_pipe_is_read_as_often_as_a_file(name, tmp_path):
    content = write(tmp_path / name).read_bytes()
    with piped(tmp_path / f"pipe-{name}", content) as path:
        first, second = (list(read_rows(path)) for _ in range(2))
    assert first == second
    assert [row.text("text") for row in first] == [cells["text"] for cells in CELLS]
    assert first[0].place() == f"{path}, row {first[0].number}"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_pipe_without_a_suffix_is_what_it_begins_with(name, tmp_path):
    with piped(tmp_path / "pipe", write(tmp_path / name).read_bytes()) as path:
        rows = list(read_rows(path))
        assert [row.text("text") for row in rows] == [cells["text"] for cells in CELLS]
        assert name_of(path) == "stdin"
        assert place_to_save(path) == "-"


@contextmanager
def piped(path, content):
    """A FIFO that gives the content once."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    yield path
    writer.join(timeout=10)


def test_what_counts_as_missing_a_template_decides(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label\nNone\n")
    (row,) = read_rows(path)
    assert row.category("label", known={"None", "Some"}) == "None"
    with pytest.raises(UserError, match="row 2, column 'label': the label is None"):
        row.category("label")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    line = "some text,a label\n" if suffix == "csv" else '{"text": "some text", "label": "a"}\n'
    path.write_text("text,label\n" * (suffix == "csv") + line * 20_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 150_000 < path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("folder", "datasets")])
def test_a_missing_extra_is_named(name, library, tmp_path):
    path = write(tmp_path / name)
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"  # as if it were not installed
        "from pathlib import Path\n"
        "from abft_fast.errors import UserError\n"
        "from abft_fast.data.tables import read_rows\n"
        "try: list(read_rows(Path(sys.argv[1])))\n"
        "except UserError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    expected = f"{path} cannot be read without {library}: `pip install 'abft-fast[data]'`"
    assert result.stdout.strip() == expected


def test_what_means_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    assert all(map(is_table, ["a.csv", "no/where.JSONL", "some", "./some", str(tmp_path)]))
    assert not any(map(is_table, ["a", "a.txt", "", "imdb"]))
    assert name_of(tmp_path / "my.reviews.CSV") == "my.reviews"
    assert name_of(tmp_path / "v1.0") == "v1.0"
