"""Write the pages of docs/performance/ and their plots from the rows of results/.

    python -m benchmarks.report        # or `make report`

Nothing here is a figure: without its row it is "not measured yet". CI checks that what is committed
is what this writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from abft_fast.errors import UserError
from benchmarks.plots import PLOTS, draw
from benchmarks.rows import KINDS, QUESTIONS, Row, read
from benchmarks.tables import SUMMARIES, every_column, listed, origin, paragraph

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
COMMANDS = {"GPU": "make bench-gpu", "CPU": "make bench"}
FOLDER = "docs/performance"
SUMMARY, TABLES = f"{FOLDER}/index.md", f"{FOLDER}/measurements.md"
PLOTS_IN_SUMMARY = ("train_step", "scaling")
NOT_IN_SUMMARY = {("large_models", "CPU"), ("shared_prefix", "CPU"), ("shared_prefix", "GPU")}

Found = dict[tuple[str, str], list[Row]]


def report(results: Path, page: str) -> dict[str, bytes]:
    """Return contents by path: the summary, all tables, and every plot there are rows for.

    Args:
        results: folder of the rows.
        page: the summary's page as it is.

    Raises:
        UserError: a row is malformed, or the page lacks its marks.
    """
    found = read(results)
    plots = {
        f"{FOLDER}/plots/{name}-{kind.lower()}.svg": draw(plot, found[name, kind])
        for name, (plot, _) in PLOTS.items()
        for kind in KINDS
        if _summary(found, name, kind)
    }
    return {
        SUMMARY: insert(page, performance(found)).encode(),
        TABLES: measurements(found).encode(),
        **plots,
    }


def insert(page: str, section: str) -> str:
    """Replace what stands between a page's marks.

    Raises:
        UserError: the page does not have each mark once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or page.count(BEGIN) + page.count(END) > 2:
        raise UserError(f"{SUMMARY} needs the lines {BEGIN} and {END}, each once, in this order")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def performance(found: Found) -> str:
    """Return the summary: a few lines for each question that has rows."""
    blocks = []
    for name in SUMMARIES:
        kind = next((kind for kind in KINDS if _summary(found, name, kind)), None)
        if kind is None or (name, kind) in NOT_IN_SUMMARY:
            continue
        blocks.append(_summary(found, name, kind))
        if name in PLOTS_IN_SUMMARY:
            blocks.append(_image(name, kind))
    blocks += missing(found)
    return "\n\n".join(blocks)


def missing(found: Found) -> Iterable[str]:
    """Yield a paragraph for each kind of device that lacks rows."""
    for kind in KINDS:
        titles = [q.title for q in QUESTIONS if kind in q.kinds and not _told(found, q.name, kind)]
        if titles:
            yield paragraph(
                f"**Not measured yet** on a {kind} (`{COMMANDS[kind]}`): {listed(titles)}."
            )


def measurements(found: Found) -> str:
    """Return the page of all tables: every latest row, a section for each question."""
    blocks = [
        "# Measurements",
        paragraph(
            "`make report` writes this page from `benchmarks/results/`, which has every row with "
            "its date, commit, device, versions and seed. This page shows the last row of each "
            "case and contender, CPUs and GPUs apart. Brackets hold the 20th and the 80th "
            "percentile of rounds. `to floor` is the time divided by that of the contender in "
            "`floor`, round by round. `speedup` is the baseline's time divided by the contender's."
        ),
    ]
    for question in QUESTIONS:
        blocks.append(f"## {question.title[0].upper()}{question.title[1:]}, {question.name}.csv")
        for kind in KINDS:
            rows = found[question.name, kind]
            if not _told(found, question.name, kind):
                if kind in question.kinds:
                    blocks.append(f"{kind}: not measured yet (`{COMMANDS[kind]}`).")
                continue
            whence = origin(rows, "threads", "commit", "torch", "triton", "transformers")
            blocks.append(paragraph(f"{kind}: {whence}"))
            blocks.append(_summary(found, question.name, kind))
            if question.name in PLOTS and _summary(found, question.name, kind):
                blocks.append(_image(question.name, kind))
            blocks.append(every_column(rows))
    return "\n\n".join(filter(None, blocks)) + "\n"


def _summary(found: Found, name: str, kind: str) -> str:
    rows = found[name, kind]
    return SUMMARIES[name](rows) if rows and name in SUMMARIES else ""


def _told(found: Found, name: str, kind: str) -> bool:
    """Whether the rows hold all that the summary says of a question."""
    return bool(_summary(found, name, kind) if name in SUMMARIES else found[name, kind])


def _image(name: str, kind: str) -> str:
    _, text = PLOTS[name]
    return f"![{text}, on a {kind}](plots/{name}-{kind.lower()}.svg)"


def write(root: Path, contents: dict[str, bytes]) -> None:
    """Write files; remove plots whose rows are gone."""
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    for plot in (root / FOLDER / "plots").glob("*.svg"):
        if f"{FOLDER}/plots/{plot.name}" not in contents:
            plot.unlink()


def main() -> None:
    page = (ROOT / SUMMARY).read_text(encoding="utf-8")
    try:
        write(ROOT, report(ROOT / "benchmarks" / "results", page))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
