"""Any bytes give a result or one clear line: `make fuzz`.

Hypothesis keeps what fails in .hypothesis/ and tries it first in the next run. What has failed once
is an ordinary test, too: in tests/bad_inputs.py, or beside the tests of the reader.
"""

import csv
import io
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from abft_fast.commands.prediction_files import check_queries, open_output, read_queries
from abft_fast.data.tables import read_rows
from abft_fast.data.template_file import read_template
from abft_fast.data.text_lines import read_lines
from abft_fast.errors import UserError
from abft_fast.experiments.grid import read_cells
from abft_fast.experiments.sweep_file import OPTIONS, parse_overrides
from abft_fast.models.files import find_damage
from abft_fast.options import EvalConfig, MergeConfig, PredictConfig, TrainConfig
from abft_fast.options.resolve import resolve

pytestmark = pytest.mark.fuzz

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")),
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

WORDS = ("bad", "good")

# Pieces that mean something to a reader, and anything else between them.
odd = st.sampled_from(
    [
        ",",
        ";",
        "\t",
        '"',
        '""',
        "\n",
        "\r",
        "\r\n",
        "\0",
        "\ufeff",
        "\u2028",
        "\x85",
        "\\ud83d",
        "😀",
    ]
)
pieces = st.one_of(odd, st.sampled_from(["text", "label", "good", "null", "NaN", ""]), st.text())
texts = st.lists(pieces, max_size=30).map("".join)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), texts),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=6,
)
rows = st.dictionaries(st.sampled_from(["text", "label", "more", "prediction"]), json_values)
json_lines = st.lists(st.one_of(rows.map(json.dumps), texts), max_size=6).map("\n".join)
csv_rows = st.lists(st.lists(texts, min_size=2, max_size=3), max_size=5)


def as_csv(lines):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["text", "label"], *lines])
    return text.getvalue()


yaml_pieces = st.one_of(
    odd,
    st.sampled_from([
        ": ", "- ", "{", "}", "[", "]", "? ", "&a ", "*a", "!!int ", "!!timestamp ", "!!binary ",
        "!!set ", "!!python/name:os.x ", "<<: ", "---\n", "| ", "> ", "%", "@", "null", "~", "= ",
        "2024-13-01", "1:99", ".inf", "0x", "1_0", "yes", "'", "#", "\n  ", "\n",
    ]),
    st.sampled_from([
        *OPTIONS, "options", "grid", "settings", "input_prefix", "label_prefix", "labels",
    ]),
    st.text(max_size=5),
)  # fmt: skip
yaml_texts = st.one_of(
    st.lists(yaml_pieces, max_size=25).map("".join),
    st.dictionaries(st.sampled_from([*OPTIONS, "labels", "input_prefix"]), json_values).map(
        lambda content: yaml.safe_dump(content, allow_unicode=True)
    ),
    st.dictionaries(
        st.sampled_from(["options", "grid", "settings", "labels"]),
        st.dictionaries(st.sampled_from(OPTIONS), json_values),
    ).map(yaml.safe_dump),
)


def as_bytes(contents):
    """The content in UTF-8, damaged at times, or any bytes."""
    whole = contents.map(lambda text: text.encode("utf-8", "surrogatepass"))
    cut = st.tuples(whole, st.integers(0, 40)).map(lambda pair: pair[0][: -pair[1] or None])
    return st.one_of(
        whole,
        cut,
        st.binary(max_size=60),
        contents.map(lambda t: t.encode("utf-16", "surrogatepass")),
    )


@pytest.fixture(scope="module", autouse=True)
def folder():
    """Every file is written in one folder, so that paths in the inputs find no others."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as there:
        os.chdir(there)
        yield
        os.chdir(before)


def write(name, content):
    Path(name).write_bytes(content)
    return Path(name)


def result_or_line(function, *arguments):
    """What a function returns; None where it raises the line that a user reads."""
    try:
        return function(*arguments)
    except UserError as error:
        assert str(error).strip()
        return None


def cells(path, columns):
    found = []
    for row in read_rows(path, columns):
        found.append(row)
        result_or_line(row.text, "text")
        result_or_line(row.category, "label")
    return found


@fuzz
@given(st.sampled_from([".csv", ".tsv"]), as_bytes(st.one_of(texts, csv_rows.map(as_csv))))
def test_csv(suffix, content):
    result_or_line(cells, write(f"a{suffix}", content), ("text", "label"))


@fuzz
@given(as_bytes(json_lines))
def test_json_lines(content):
    result_or_line(cells, write("a.jsonl", content), ("text", "label"))


@fuzz
@given(
    st.lists(st.tuples(st.text(), st.integers(-2, 3))),
    st.binary(),
    st.integers(0, 2000),
    json_values,
)
def test_parquet(lines, noise, at, metadata):
    table = pa.table({
        "text": pa.array([text for text, _ in lines], pa.string()),
        "label": pa.array([label for _, label in lines], pa.int64()),
    })  # fmt: skip
    table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    parquet.write_table(table, "a.parquet")
    content = Path("a.parquet").read_bytes()
    content = content[:at] + noise + content[at + len(noise) :]
    result_or_line(cells, write("a.parquet", content), ("text", "label"))


@fuzz
@given(as_bytes(texts))
def test_plain_text(content):
    result_or_line(read_lines, "--plain-text", write("a.txt", content))


@fuzz
@given(as_bytes(yaml_texts))
def test_template(content):
    result_or_line(read_template, write("t.yaml", content))


@fuzz
@given(st.sampled_from([TrainConfig, EvalConfig, MergeConfig, PredictConfig]), as_bytes(yaml_texts))
def test_options(kind, content):
    result_or_line(resolve, kind, {"config": str(write("c.yaml", content))})


@fuzz
@given(as_bytes(yaml_texts), st.lists(yaml_pieces, max_size=6).map("".join))
def test_sweep(content, value):
    overrides = result_or_line(parse_overrides, [f"k={value}"])
    result_or_line(read_cells, write("s.yaml", content), overrides or {})


@fuzz
@given(as_bytes(st.one_of(texts, json_values.map(json.dumps))), st.binary(max_size=60))
def test_files_of_a_model(index, weights):
    Path("model").mkdir(exist_ok=True)
    write("model/model.safetensors.index.json", index)
    write("model/part.safetensors", weights)
    find_damage(Path("model"))


@fuzz
@given(st.sampled_from(["out.csv", "out.jsonl"]), as_bytes(json_lines))
def test_what_passes_the_check_is_written_as_it_was_read(output, content):
    write("a.jsonl", content)
    options = {"demonstrations": "a.jsonl", "input": "a.jsonl", "output": output}
    config = resolve(PredictConfig, options)
    if result_or_line(lambda: check_queries(config, WORDS) or True) is None:
        return
    queries = list(read_queries(config, WORDS))
    with open_output(config, WORDS) as writer:
        for row, _ in queries:
            writer.write(row, [0.25, 0.75])
    if output == "out.csv":
        with open(output, newline="", encoding="utf-8") as file:
            texts = [row["text"] for row in csv.DictReader(file, strict=True)]
    else:
        lines = Path(output).read_bytes().decode().split("\n")[:-1]
        texts = [json.loads(line, parse_constant=pytest.fail)["text"] for line in lines]
    assert texts == [row.cells["text"] for row, _ in queries]
