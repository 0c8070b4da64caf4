"""`make report`: the figures of docs/performance come from rows and from nowhere else."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from abft_fast.errors import UserError
from benchmarks import plots
from benchmarks.report import BEGIN, END, SUMMARY, TABLES, insert, report, write
from benchmarks.rows import ORIGIN, QUESTIONS, TIMING, read, slope

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
EMPTY = f"before\n{BEGIN}\n\nstale\n\n{END}\nafter\n"
HERE = {**dict.fromkeys(ORIGIN, "1"), "date": "2026-11-22", "device": "x86_64", "threads": 2}
CASE = {"model": "6x512", "prompts": 32, "tokens": 4800, "k": 4, "dtype": "float32"}


def timing(seconds, **cells):
    """Columns of a contender; every spread is a tenth to each side of a tenfold or so."""
    factors = {"p20": 0.9, "p50": 1.0, "p80": 1.1}
    scales = {"seconds": seconds, "to_floor": seconds / 2, "speedup": 8 / seconds}
    found = {f"{name}_{p}": scales[name] * f for name in scales for p, f in factors.items()}
    assert set(found) == set(TIMING)
    return {**found, **cells}


def step_row(contender, seconds, **cells):
    measured = timing(seconds, tokens_a_second=1, peak_bytes=3 * 2**20)
    return {**HERE, **CASE, "contender": contender, **measured, **cells}


def steps(**cells):
    """Eager and one other."""
    return [step_row("eager, one by one", 8.0), step_row("ABFT, full", 3.7, **cells)]


def scaling_row(mode, size, seconds, bytes_, axis="depth"):
    case = {"axis": axis, "size": size, "model": "8x64", "prompts": 4, "n": 256}
    return {**HERE, **case, "contender": mode, **timing(seconds), "peak_bytes": bytes_}


def attention_row(contender, n, seconds, part="forward"):
    case = {"dtype": "float32", "n": n, "prompts": 4, "heads": "4/1x64", "part": part}
    return {**HERE, **case, "contender": contender, **timing(seconds)}


def write_rows(folder, name, rows):
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def text_of(folder, name=SUMMARY):
    return report(folder, EMPTY)[name].decode()


def committed(folder):
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in (ROOT / folder).glob("*.svg")}


def test_what_is_committed_is_fresh(tmp_path):
    page = (ROOT / SUMMARY).read_text(encoding="utf-8")
    write(tmp_path, report(ROOT / "benchmarks" / "results", page))
    for name in (SUMMARY, TABLES):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), "run `make report`"
    drawn = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*.svg")}
    assert drawn == committed("docs/performance/plots"), "run `make report`"


def test_figures_are_those_of_rows(tmp_path):
    write_rows(tmp_path, "train_step", steps())
    before = text_of(tmp_path)
    assert "| 8.00 s<br>3.00 MiB | 2.16 (1.95 to 2.38)<br>1.85 of floor<br>3.00 MiB |" in before
    assert "x86_64, 2 threads, 2026-11-22" in before
    write_rows(tmp_path, "train_step", steps(speedup_p50=2.25, peak_bytes=5 * 2**20))
    after = text_of(tmp_path)
    assert "| 2.25 (1.95 to 2.38)<br>1.85 of floor<br>5.00 MiB |" in after
    assert after.replace("2.25 (", "2.16 (").replace("5.00 MiB", "3.00 MiB") == before


def test_the_last_row_of_a_case_and_contender_counts(tmp_path):
    gpu = {"device": "NVIDIA H200", "speedup_p50": 99.0}
    rows = [
        *steps(speedup_p50=1.5),
        step_row("ABFT, full", 3.7),
        step_row("ABFT, full", 3.7, **gpu),
    ]
    write_rows(tmp_path, "train_step", rows)
    found = read(tmp_path)
    shown = {(k, row["contender"]): row["speedup_p50"] for k in ("CPU", "GPU")
             for row in found["train_step", k]}  # fmt: skip
    assert shown == {
        ("CPU", "eager, one by one"): "1.0",
        ("CPU", "ABFT, full"): str(8 / 3.7),
        ("GPU", "ABFT, full"): "99.0",
    }


def test_a_gpu_comes_before_a_cpu_and_tables_have_both(tmp_path):
    gpu = {"device": "NVIDIA H200", "threads": 16}
    write_rows(tmp_path, "train_step", [*steps(), *({**row, **gpu} for row in steps())])
    section, tables = text_of(tmp_path), text_of(tmp_path, TABLES)
    assert "(NVIDIA H200, 2026-11-22)" in section and "x86_64" not in section
    assert "GPU: NVIDIA H200" in tables and "CPU: x86_64, 2 threads" in tables
    assert "(plots/train_step-gpu.svg)" in section


def test_without_rows_nothing_is_claimed(tmp_path):
    contents = report(tmp_path, EMPTY)
    assert set(contents) == {SUMMARY, TABLES}
    section = contents[SUMMARY].decode()
    for kind, command in (("GPU", "make bench-gpu"), ("CPU", "make bench")):
        [line] = re.findall(
            rf"\*\*Not measured yet\*\* on a {kind} \(`{command}`\):([^.]*)\.", section
        )
        named = " ".join(line.split())
        assert [q.name for q in QUESTIONS if (kind in q.kinds) != (q.title in named)] == []
    assert not re.search(r"\d\.\d", section)


def test_a_question_without_gpu_rows_is_not_measured_yet_there(tmp_path):
    write_rows(tmp_path, "train_step", steps())
    gpu, cpu = re.findall(r"\*\*Not measured yet\*\*[^.]*\.", text_of(tmp_path))
    assert "a step," in gpu and "a step," not in cpu


def test_rows_of_other_columns_are_not_measured_yet(tmp_path):
    rows = steps()
    for row in rows:
        del row["speedup_p80"]
    write_rows(tmp_path, "train_step", rows)
    assert text_of(tmp_path).count("a step,") == 2
    (tmp_path / "scaling.csv").write_text("")
    assert text_of(tmp_path).count("scaling,") == 2


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ({"speedup_p50": "fast"}, "speedup_p50 is 'fast', not a number"),
        ({"peak_bytes": "inf"}, "peak_bytes is 'inf', not a number"),
        ({"tokens": ""}, "tokens is '', not a number"),
        ({"date": "yesterday"}, "'yesterday' is no date"),
    ],
)
def test_a_malformed_row_names_its_line(tmp_path, cells, why):
    write_rows(tmp_path, "train_step", steps(**cells))
    with pytest.raises(UserError, match=f"train_step.csv, line 3: {why}"):
        report(tmp_path, EMPTY)


def test_a_cut_row_names_its_line(tmp_path):
    write_rows(tmp_path, "train_step", steps())
    file = tmp_path / "train_step.csv"
    file.write_text(file.read_text() + "2026-11-22,x86_64\n")
    with pytest.raises(UserError, match=r"train_step.csv, line 4: 2 cells, the header has"):
        report(tmp_path, EMPTY)


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_the_summary_needs_its_marks(page):
    with pytest.raises(UserError, match=r"index.md needs the lines"):
        insert(page, "section")


def test_only_the_section_changes(tmp_path):
    text = text_of(tmp_path)
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    assert "stale" not in text and insert(text, "stale") == EMPTY


@pytest.mark.parametrize("exponent", [-1, 0, 1, 1.5, 2])
def test_slope_of_a_power_law(exponent):
    xs = [3, 10, 40, 1000]
    assert slope(xs, [7 * x**exponent for x in xs]) == pytest.approx(exponent, abs=1e-12)


def test_slope_of_a_point_is_none():
    assert slope([3, 3], [1, 2]) != slope([3, 3], [1, 2])
    assert slope([1, 2], [0, 5]) != slope([1, 2], [0, 5])


def test_slopes_are_fitted_to_rows(tmp_path):
    rows = [
        scaling_row(mode, layers, 0.1 * layers, most)
        for layers in (6, 12, 24)
        for mode, most in (("inference", 2**20), ("local", 2**20), ("full", layers * 2**20))
    ]
    rows += [scaling_row("full", n, n**2, n, "length") for n in (2048, 8192)]
    write_rows(tmp_path, "scaling", rows)
    section = text_of(tmp_path)
    assert "| slope in depth | 1.00; 0.00 | 1.00; 0.00 | 1.00; 1.00 |" in section
    assert "| slope in length | -; - | -; - | 2.00; 1.00 |" in section
    assert "| memory over inference's, 24 layers | 1.00 | 1.00 | 24.0 |" in section


@pytest.fixture
def drawn(tmp_path):
    """Every plot, of rows made up."""
    write_rows(tmp_path, "train_step", steps())
    lengths = [(1, 512), (2, 1024), (4, 4096)]
    rows = [attention_row(way, n, s) for s, n in lengths for way in ("attention", "fused", "eager")]
    write_rows(tmp_path, "fused_attention", rows)
    write_rows(tmp_path, "scaling", [scaling_row("full", n, n, n * 2**20) for n in (6, 12)])
    return tmp_path


def test_plots_are_text_and_the_same_bytes_in_another_process(drawn):
    contents = report(drawn, EMPTY)
    images = {name: content for name, content in contents.items() if name.endswith(".svg")}
    assert len(images) == len(plots.PLOTS)
    for image in images.values():
        assert ElementTree.fromstring(image).tag.endswith("svg")
        assert b"<text" in image and b"<dc:date>" not in image and len(image) < 60_000
    assert images["docs/performance/plots/scaling-cpu.svg"].count(b">1.00</text>") == 2  # slopes
    code = (
        "import sys; from pathlib import Path; from benchmarks import report\n"
        f"report.write(Path(sys.argv[2]), report.report(Path(sys.argv[1]), {EMPTY!r}))"
    )
    again = drawn / "again"
    subprocess.run([sys.executable, "-c", code, drawn, again], cwd=ROOT, check=True)
    assert {name: (again / name).read_bytes() for name in contents} == contents


def test_half_of_a_plot_is_drawn(tmp_path):
    write_rows(tmp_path, "scaling", [scaling_row("full", n, n, "") for n in (2, 4)])
    write_rows(tmp_path, "fused_attention", [attention_row("fused", 512, 1.0)])
    write_rows(tmp_path, "train_step", [step_row("eager, one by one", 8.0, peak_bytes="")])
    assert len(report(tmp_path, EMPTY)) == 2 + len(plots.PLOTS)


def test_a_plot_whose_rows_are_gone_goes(drawn):
    out = drawn / "out"
    write(out, report(drawn, EMPTY))
    (drawn / "scaling.csv").unlink()
    write(out, report(drawn, EMPTY))
    names = {path.name for path in out.rglob("*.svg")}
    assert names == {"train_step-cpu.svg", "fused_attention-cpu.svg"}
